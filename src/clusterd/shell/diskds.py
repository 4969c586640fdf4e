"""diskd's control, as this node reaches it: leases and evidence of life.

Whatever is not a clear answer is "unanswered": the lease may then have been taken or not, and only asking
again tells.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog
import trio

from clusterd.config import DiskdAddresses
from clusterd.core.calls import ProbeReply
from clusterd.core.events import ImageLook, LeaseAnswer
from clusterd.core.types import Disk
from clusterd.core.vm_fate import LeaseSeen
from daemonkit.cli import call_once
from daemonkit.diskd_api import (
    BACKUP_RUN,
    IMAGE_ACTIVITY,
    IMAGE_DELETE,
    IMAGE_RESTORE,
    LEASE_ACQUIRE,
    LEASE_RELEASE,
    LEASE_SHOW,
    BackupReport,
    BackupRequest,
    DeleteImage,
    ImageName,
    ImageNames,
    Lease,
    LeaseRequest,
    RestoreReport,
    RestoreRequest,
)
from daemonkit.ports import Address
from daemonkit.rpc import CallFailed, CallRefused, connect

ACQUIRE_SECONDS_MAX = 4.5  # the core allows 5 s for all disks of a run
LOOK_SECONDS_MAX = 1.5
RELEASE_SECONDS_MAX = 2.0
DELETE_SECONDS_MAX = 30.0
IMAGES_PER_CALL_MAX = 1000

log = structlog.get_logger("diskds")


class Diskds:
    """Every diskd that NODE.toml names."""

    def __init__(
        self,
        diskds: Mapping[str, DiskdAddresses],
        key: bytes | None,
        *,
        acquire_seconds_max: float = ACQUIRE_SECONDS_MAX,
    ) -> None:
        self._diskds = diskds
        self._acquire_seconds_max = acquire_seconds_max
        self._key = key

    def _control(self, disk: Disk) -> Address:
        return self._control_of(disk.diskd)

    def _control_of(self, diskd: str) -> Address:
        if diskd not in self._diskds:
            raise CallFailed(f"this node's configuration names no diskd {diskd!r}")
        return self._diskds[diskd].control

    async def acquire(
        self, disks: Sequence[Disk], epoch: int, holder: str, dead_boots: Sequence[str] = ()
    ) -> tuple[LeaseAnswer, ...]:
        """An answer for each disk tried, in order; none is tried after the first that fails."""
        answers: list[LeaseAnswer] = []
        deadline = trio.current_time() + self._acquire_seconds_max
        for disk in disks:
            request = LeaseRequest(disk.image, epoch, holder, list(dead_boots))
            answer = await self._acquire(disk, request, max(0.1, deadline - trio.current_time()))
            answers.append(answer)
            if answer.outcome != "acquired":
                break
        return tuple(answers)

    async def _acquire(self, disk: Disk, request: LeaseRequest, seconds_max: float) -> LeaseAnswer:
        try:
            lease = await call_once(
                self._control(disk), LEASE_ACQUIRE, request, key=self._key, seconds_max=seconds_max
            )
        except CallRefused as error:
            newest = await self._newest_epoch(disk)
            return LeaseAnswer(disk.image, "refused", newest, str(error))
        except CallFailed as error:
            return LeaseAnswer(disk.image, "unanswered", 0, str(error))
        return LeaseAnswer(disk.image, "acquired", lease.epoch)

    async def _newest_epoch(self, disk: Disk) -> int:
        try:
            return (await self._show(disk)).epoch
        except (CallRefused, CallFailed):
            return 0

    async def _show(self, disk: Disk) -> Lease:
        return await call_once(
            self._control(disk),
            LEASE_SHOW,
            ImageName(disk.image),
            key=self._key,
            seconds_max=LOOK_SECONDS_MAX,
        )

    async def release(self, disks: Sequence[Disk], epoch: int, holder: str) -> None:
        """Once each; what is not answered shows as a lease still held, under an epoch that has ended."""
        for disk in disks:
            request = LeaseRequest(disk.image, epoch, holder)
            try:
                await call_once(
                    self._control(disk),
                    LEASE_RELEASE,
                    request,
                    key=self._key,
                    seconds_max=RELEASE_SECONDS_MAX,
                )
            except (CallRefused, CallFailed) as error:
                log.info("lease.not_released", image=disk.image, epoch=epoch, reason=str(error))

    async def probe(self, disks: Sequence[Disk]) -> ProbeReply:
        """Does every diskd concerned answer, and what is the newest epoch of each image?"""
        epochs: dict[str, int] = {}
        reasons: list[str] = []

        async def ask(disk: Disk) -> None:
            try:
                epochs[disk.image] = (await self._show(disk)).epoch
            except (CallRefused, CallFailed) as error:
                reasons.append(f"diskd {disk.diskd}: {error}")

        async with trio.open_nursery() as nursery:
            for disk in disks:
                nursery.start_soon(ask, disk)
        return ProbeReply(not reasons, min(reasons, default=""), dict(sorted(epochs.items())))

    async def look(self, disks: Sequence[Disk]) -> tuple[ImageLook, ...]:
        """What each diskd saw of its images; those of a diskd that does not answer are missing."""
        looks: list[ImageLook] = []

        async def ask(of_one: list[Disk]) -> None:
            try:
                report = await call_once(
                    self._control(of_one[0]),
                    IMAGE_ACTIVITY,
                    ImageNames([disk.image for disk in of_one]),
                    key=self._key,
                    seconds_max=LOOK_SECONDS_MAX,
                )
            except (CallRefused, CallFailed) as error:
                log.debug("image.not_seen", diskd=of_one[0].diskd, reason=str(error))
                return
            by_image = {disk.image: disk for disk in of_one}
            looks.extend(
                ImageLook(by_image[seen.image], seen.epoch, seen.holder, seen.last_io_age_ns)
                for seen in report.images
                if seen.image in by_image
            )

        async with trio.open_nursery() as nursery:
            for name in sorted({disk.diskd for disk in disks}):
                nursery.start_soon(ask, [disk for disk in disks if disk.diskd == name])
        return tuple(sorted(looks, key=lambda look: look.disk))

    async def leases(self, disks: Sequence[Disk]) -> tuple[tuple[LeaseSeen, ...], dict[str, str]]:
        """Who holds these images, and which diskd did not say, and why. An image that a diskd does not know
        has no lease there."""
        seen: list[LeaseSeen] = []
        silent: dict[str, str] = {}

        async def ask(diskd: str, images: list[str]) -> None:
            try:
                for first in range(0, len(images), IMAGES_PER_CALL_MAX):
                    some = ImageNames(images[first : first + IMAGES_PER_CALL_MAX])
                    report = await call_once(
                        self._control_of(diskd),
                        IMAGE_ACTIVITY,
                        some,
                        key=self._key,
                        seconds_max=LOOK_SECONDS_MAX,
                    )
                    seen.extend(LeaseSeen(diskd, one.image, one.epoch, one.holder) for one in report.images)
            except (CallRefused, CallFailed) as error:
                silent[diskd] = str(error)

        async with trio.open_nursery() as nursery:
            for diskd in sorted({disk.diskd for disk in disks}):
                images = sorted({disk.image for disk in disks if disk.diskd == diskd})
                nursery.start_soon(ask, diskd, images)
        return tuple(sorted(seen, key=lambda one: (one.diskd, one.image))), silent

    async def backup(
        self, diskd: str, request: BackupRequest, on_progress: Callable[[Any], None]
    ) -> BackupReport:
        """As long as it takes. Raises CallRefused, CallFailed; cancelling it cancels the backup."""
        async with connect(self._control_of(diskd), key=self._key) as client:
            return await client.call(BACKUP_RUN, request, on_progress=on_progress)

    async def restore(
        self, diskd: str, request: RestoreRequest, on_progress: Callable[[Any], None]
    ) -> RestoreReport:
        """As ``backup``; a restore that fails or is cancelled leaves no image."""
        async with connect(self._control_of(diskd), key=self._key) as client:
            return await client.call(IMAGE_RESTORE, request, on_progress=on_progress)

    async def delete_images(self, diskd: str, images: Sequence[str]) -> None:
        """Once each; what cannot be deleted is named in the log."""
        for image in images:
            try:
                await call_once(
                    self._control_of(diskd),
                    IMAGE_DELETE,
                    DeleteImage(image),
                    key=self._key,
                    seconds_max=DELETE_SECONDS_MAX,
                )
            except (CallRefused, CallFailed) as error:
                log.warning("image.not_deleted", image=image, reason=str(error))

"""All images under one root: the catalog of exports, leases, checkpoints, points, recovery and merges.

ROOT/daemons/                   the daemons that serve it (daemons.py): each image is one's (ADR 0014)
ROOT/images/NAME/               one image (DESIGN.md section 7)
ROOT/images/.new-NAME@DAEMON    being created or imported; swept at that daemon's start
ROOT/images/.gone-NAME@DAEMON   being deleted; swept at that daemon's start
ROOT/checkpoints/ID/            one checkpoint's record; whoever has its images has it
"""

import os
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import trio

from daemonkit import durable
from daemonkit.diskd_api import Activity, ActivityReport, BackupDisk, Lease
from diskd.core import lease
from diskd.core.inventory import (
    ChangesInfo,
    CheckpointInfo,
    HeldBy,
    ImageInfo,
    LibrarySettings,
    Outcome,
    PointInfo,
)
from diskd.core.ownership import Daemon, Lost
from diskd.core.ports import Export, FrozenVm, OnMerge
from diskd.errors import Refused
from diskd.shell import daemons
from diskd.shell.checkpoints import Checkpoints
from diskd.shell.exports import Exports
from diskd.shell.forks import Forks
from diskd.shell.handover import bring_here
from diskd.shell.held import refuse_live_backup
from diskd.shell.hooks import HookSettings
from diskd.shell.image import ImageSettings, Writer
from diskd.shell.images import STOP_SECONDS, Images
from diskd.shell.imports import Progress, fill_from_file, fill_from_stream
from diskd.shell.open_image import OpenImage
from diskd.shell.overlay_settings import OverlaySettings
from diskd.shell.owning import Claimant, Order

__all__ = ["Library", "Progress", "open_library"]


class Library:
    """Made by ``open_library``. Every refusal is Refused (an OperatorError), one line that says what to do.

    The lives of images are told in images.py, export names in exports.py, checkpoints in checkpoints.py;
    this is the one door to all of them. Implements ports.ExportCatalog: ``names``, ``open``, ``info``.
    """

    def __init__(
        self,
        root: Path,
        settings: LibrarySettings,
        image_settings: ImageSettings,
        me: Daemon | None = None,
        *,
        nursery_that_outlives_calls: trio.Nursery,
    ) -> None:
        me = me or daemons.identify(settings, image_settings.boot_id_file)
        self._root = root
        self._me = me
        self._key: bytes | None = None
        # VM: why no checkpoint of it begins now. Whoever reads a snapshot of it has no checkpoint any more.
        self.reserved: dict[str, str] = {}
        self._images: dict[str, OpenImage] = {}
        overlay_settings = OverlaySettings(
            settings.merge_batch_bytes,
            settings.avhd_limit_bytes,
            settings.merge_rate,
            settings.low_disk_limit,
        )
        self._checkpoints = Checkpoints(
            root / "checkpoints",
            self._images,
            Forks(image_settings.shared_dir, me.boot_id, overlay_settings),
            settings.checkpoint_resume_timeout_ns,
            me.name,
            HookSettings(settings.hooks_dir, settings.hook_timeout_ns),
            nursery_that_outlives_calls=nursery_that_outlives_calls,
        )
        self._lives = Images(
            root / "images",
            image_settings,
            self._images,
            self._checkpoints,
            Claimant(me, root / "daemons"),
            nursery_that_outlives_calls=nursery_that_outlives_calls,
        )
        self._exports = Exports(self._images, self._checkpoints)

    # --- exports -----------------------------------------------------------------------------------

    def names(self) -> Sequence[str]:
        """Export names that ``open`` would accept now."""
        return self._exports.names()

    async def open(self, name: str, *, peer: str, drop: Callable[[str], None]) -> Export:
        """ports.ExportCatalog.open: `IMAGE`, `IMAGE@EPOCH`, `IMAGE:CHECKPOINT`."""
        return await self._exports.open(name, peer=peer, drop=drop)

    async def info(self, name: str) -> Export:
        """ports.ExportCatalog.info."""
        return await self._exports.info(name)

    # --- images ------------------------------------------------------------------------------------

    def images(self) -> list[ImageInfo]:
        """Sorted by name; damaged and released ones included."""
        return self._lives.list_all()

    def image(self, name: str) -> ImageInfo:
        """Raises Refused where there is none of that name."""
        return self._lives.show(name)

    async def create_image(
        self, name: str, size_bytes: int, *, block_bytes: int = 4096, region_bytes: int = 1 << 20
    ) -> ImageInfo:
        """A new, sparse, empty image."""
        return await self._lives.create(name, size_bytes, block_bytes=block_bytes, region_bytes=region_bytes)

    async def import_image(self, name: str, source: Path, *, progress: Progress | None = None) -> ImageInfo:
        """A new image with the content of a raw file, or of whatever ``qemu-img convert`` reads."""
        return await self._lives.import_(
            name, lambda raw, check: fill_from_file(source, raw, check, progress)
        )

    async def receive_image(self, name: str, stream: trio.abc.Stream) -> ImageInfo:
        """A new image with the content that a client sends (core.import_stream). Raises Refused, or
        ProtocolError where it breaks off."""
        return await self._lives.import_(name, lambda raw, check: fill_from_stream(stream, raw, check))

    def new_images(self, sizes: Mapping[str, int]) -> AbstractAsyncContextManager[dict[str, Writer]]:
        """Several new images, filled by the body of the ``async with``; all or none."""
        return self._lives.new_images(sizes)

    async def resize_image(self, name: str, size_bytes: int) -> ImageInfo:
        """Grow it; connected clients keep the size they were told. Refused during a checkpoint or merge."""
        return await self._lives.resize(name, size_bytes)

    async def delete_image(self, name: str, *, dry_run: bool = False) -> list[str]:
        """The paths that are (or, dry, would be) removed. Refused while the image is in use."""
        return await self._lives.delete(name, dry_run=dry_run)

    async def release_image(self, name: str) -> ImageInfo:
        """Close it cleanly, so that another daemon can open it with its tracking intact."""
        return await self._lives.release(name)

    async def open_image(
        self, name: str, *, fenced: str | None = None, lost_lease: bool = False
    ) -> ImageInfo:
        """Serve an image that is released, was damaged and is repaired, or is a dead daemon's."""
        return await self._lives.open(name, Order("open", fenced, lost_lease))

    def opened(self, name: str) -> OpenImage | None:
        """An image that is served, to look at; None where there is none."""
        return self._images.get(name)

    def activity(self, images: list[str]) -> ActivityReport:
        """daemonkit.diskd_api.IMAGE_ACTIVITY."""
        known: list[Activity] = []
        unknown: list[str] = []
        for name in images:
            try:
                known.append(self._activity(name))
            except Refused:
                unknown.append(name)
        return ActivityReport(known, unknown)

    def _activity(self, name: str) -> Activity:
        """Raises Refused."""
        if name in self._images:
            return self._images[name].activity()
        lease = self.lease(name)
        return Activity(name, lease.epoch, None if lease.released else lease.holder, 0, None)

    # --- leases (S1) -------------------------------------------------------------------------------

    async def acquire_lease(
        self, image: str, epoch: int, holder: str, *, dead_boots: Collection[str] | None = None
    ) -> Lease:
        """Answers once the epoch is durable and every call of older epochs is finished and dropped.
        ``dead_boots`` as in daemonkit.diskd_api.LeaseRequest."""
        if dead_boots is not None and image not in self._images:
            await bring_here(self._lives, image, epoch, holder, dead_boots, self._key)
        return await self._change_lease(image, lease.acquire, epoch, holder)

    async def prepare_lease(self, image: str, epoch: int, holder: str) -> Lease:
        """Let ``epoch`` connect and read; its writes get EPERM until it is acquired."""
        return await self._change_lease(image, lease.prepare, epoch, holder)

    async def release_lease(self, image: str, epoch: int, holder: str) -> Lease:
        """The holder lets go; the epoch stays where it is."""
        return await self._change_lease(image, lease.release, epoch, holder)

    async def _change_lease(self, image: str, decision: lease.Decision, epoch: int, holder: str) -> Lease:
        found = self._lives.find(image)
        try:
            return await found.change_lease(decision, epoch, holder)
        except Lost as error:
            with trio.move_on_after(STOP_SECONDS, shield=True):  # it goes on after that
                await self._lives.lose(image, found, str(error))
            raise
        except OSError as error:
            raise Refused(f"the lease of image {image} could not be made durable: {error}") from error

    def lease(self, image: str) -> Lease:
        """The newest lease, also of an image that another daemon of the storage has."""
        if image in self._images:
            return self._images[image].show_lease()
        return self._lives.lease_elsewhere(image).show(image)

    async def hand_over(self, image: str, epoch: int, holder: str) -> None:
        """Let another daemon have it, for a run under a higher epoch."""
        await self._lives.hand_over(image, epoch, holder)

    # --- points and changes ------------------------------------------------------------------------

    def points(self, image: str) -> list[PointInfo]:
        """Oldest first, invalid and pending ones included."""
        return [
            PointInfo(
                point.id,
                point.rct_id,
                point.state == "valid",
                None
                if point.state == "valid"
                else point.reason or "pending: nobody has said yet whether its backup was committed",
            )
            for point in self._lives.find(image).image.points()
        ]

    async def delete_point(self, image: str, point: str) -> None:
        """Join its interval with the next. Refused while its checkpoint stands."""
        found = self._lives.find(image).image
        if point not in [known.id for known in found.points()]:
            raise Refused(f"image {image} has no point {point}")
        for info in self._checkpoints.infos():
            if info.point == point:
                raise Refused(f"point {point} belongs to checkpoint {info.checkpoint}, which is {info.state}")
        try:
            await found.delete_point(point)
        except OSError as error:
            raise Refused(f"point {point} cannot be deleted: {error}") from error

    async def changes(self, image: str, since: str) -> ChangesInfo:
        """The changes since a valid point up to now. Raises NoSuchPoint (T4)."""
        found = self._lives.find(image).image
        report = await found.changes(since)
        return ChangesInfo(
            image, since, found.block_bytes, report.exact, report.over_report_bytes, report.extents
        )

    # --- checkpoints -------------------------------------------------------------------------------

    async def begin_checkpoint(
        self,
        vm: str,
        disks: list[BackupDisk],
        config: str,
        *,
        held_by: HeldBy = "backup",
        target: str | None = None,
        allow_crash_consistent: bool = False,
        on_merge: OnMerge | None = None,
    ) -> FrozenVm:
        """Fork all disks of the VM at one instant (B1); waits for an earlier merge of the same images.

        Refused while a live backup or ``checkpoint begin`` holds a checkpoint of this VM or these images, and
        where one of the hooks of ``config`` fails, unless a crash-consistent point is good enough.
        If the caller dies without ``end``, its owner calls ``FrozenVm.end("discard")`` or ``("pending")``.
        """
        if vm in self.reserved:
            raise Refused(self.reserved[vm])
        return await self._checkpoints.begin(
            vm,
            disks,
            config,
            held_by,
            target,
            allow_crash_consistent=allow_crash_consistent,
            on_merge=on_merge,
        )

    async def resume_checkpoint(self, vm: str) -> FrozenVm:
        """The checkpoint that an interrupted backup of this VM left standing, also over a restart. Raises
        Refused with the remedy where there is none."""
        return self._checkpoints.resume(vm)

    async def end_checkpoint(self, checkpoint: str, outcome: Outcome) -> None:
        """``diskctl checkpoint end``: FrozenVm.end by id. Raises Refused; also: keep a live backup."""
        if outcome == "keep":
            refuse_live_backup(self._checkpoints.find(checkpoint))
        await self._checkpoints.end(checkpoint, outcome)

    async def flush_image(self, image: str) -> None:
        """As a guest's FLUSH: AVHD, then its map, then the parent, as far as they have unsynced writes."""
        await self._lives.find(image).image.flush()

    @property
    def daemon_name(self) -> str:
        """What this daemon is called among those that serve the root."""
        return self._me.name

    def frozen(self, checkpoint: str) -> FrozenVm:
        """A standing checkpoint by id. Raises Refused where there is none."""
        return self._checkpoints.frozen(checkpoint)

    def checkpoints(self) -> list[CheckpointInfo]:
        """Every checkpoint that has a record, oldest first, pending ones included."""
        return self._checkpoints.infos()

    def announce(self, control: str, key: bytes | None) -> None:
        """Tell other daemons of this root where this one answers. ``key``: to be let in by them."""
        self._key = key
        try:
            daemons.announce(self._root / "daemons", self._me, control)
        except OSError as error:
            raise Refused(f"{error.filename}: {error.strerror}") from error

    # --- start and stop ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Open every image, then take up what their checkpoints left behind. Called once."""
        await self._lives.start()

    async def stop(self) -> None:
        """Close every image cleanly. Nothing else of the library runs any more."""
        await self._lives.stop()
        self._checkpoints.close()


@asynccontextmanager
async def open_library(root: Path, settings: LibrarySettings | None = None) -> AsyncIterator[Library]:
    """The library under ``root`` (made where absent, locked), recovered and merging in the background.

    Leaving the context closes every image cleanly. Raises OperatorError (LockHeldError, Damaged ...).
    """
    chosen = settings or LibrarySettings()
    usual = ImageSettings()
    image_settings = ImageSettings(
        chosen.tracking_flush_interval_ns,
        chosen.max_open_bytes,
        usual.shared_dir if chosen.shared_dir is None else Path(chosen.shared_dir),
        usual.boot_id_file if chosen.boot_id_file is None else Path(chosen.boot_id_file),
    )
    try:
        for path in (root, root / "images", root / "checkpoints", root / "daemons"):
            path.mkdir(exist_ok=True, parents=path is root)
        durable.sync_directory(root)  # what is durable inside them is nothing without their names
        me = daemons.identify(chosen, image_settings.boot_id_file)
        lock = daemons.lock(root / "daemons", me)
    except OSError as error:
        raise Refused(f"{root}: {error.strerror}") from error
    failure: Exception | None = None
    library: Library | None = None
    try:
        async with trio.open_nursery() as nursery:
            library = Library(root, chosen, image_settings, me, nursery_that_outlives_calls=nursery)
            try:
                await library.start()
                yield library
            except Exception as error:  # noqa: BLE001 - raised below, without the nursery's group around it
                failure = error
            finally:
                nursery.cancel_scope.cancel(reason="the library stops")
        if failure is not None:
            raise failure
    finally:
        # Only now: a merge whose copy is under way in a thread must not write to an image that was closed.
        if library is not None:
            with trio.move_on_after(STOP_SECONDS, shield=True):
                await library.stop()
        daemons.withdraw(root / "daemons", me)
        os.close(lock)

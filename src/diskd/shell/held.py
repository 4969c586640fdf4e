"""A checkpoint that has a record, in memory, and the view of it that a backup holds (ports.FrozenVm)."""

import errno
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Protocol

import attrs
import trio

from daemonkit.diskd_api import BackupDisk
from diskd.core.checkpoint import Record, RecordDisk
from diskd.core.hooks import CRASH
from diskd.core.inventory import CONFIG_BYTES_MAX, DISKS_MAX, CheckpointInfo, HeldBy, Outcome, check_name
from diskd.core.ports import FrozenDisk
from diskd.errors import Refused
from diskd.shell.files import Files
from diskd.shell.frozen import FrozenImage
from diskd.shell.open_image import OpenImage

Invalidate = Callable[[str], Awaitable[None]]


@attrs.define(eq=False)
class Held:
    """A checkpoint with a record. ``images`` are those of its disks that are open here, by image name."""

    record: Record
    files: Files
    images: dict[str, OpenImage]
    disks: dict[str, FrozenImage] = attrs.field(factory=dict)
    invalid: bool = False
    may_stand: bool = False  # its end is decided, and on disk it may be sealed, and valid, all the same
    incomplete: bool = False  # an image of it is damaged: its next opening goes on
    lost: str | None = None  # why it is no longer this daemon's: an image of it is not
    idle: object | None = None  # since when nobody holds it: a token of that moment
    merging: set[str] = attrs.field(factory=set)
    lock: trio.Lock = attrs.field(factory=trio.Lock)  # one change of the record at a time

    @property
    def is_deserted(self) -> bool:
        """It stands for a backup that may go on; a new one need not wait for that."""
        return self.idle is not None and self.record.held_by == "backup" and self.record.state == "sealed"

    def require_ours(self) -> None:
        """Raises OSError once the record is another daemon's to change."""
        if self.lost is not None:
            raise OSError(errno.ESHUTDOWN, self.lost)


class Owner(Protocol):
    """What a held checkpoint asks of shell.checkpoints."""

    def pending(self, vm: str, target: str) -> list[str]: ...
    async def settle(self, vm: str, point: str, *, committed: bool) -> None: ...
    async def end(self, identifier: str, outcome: Outcome) -> None: ...
    async def suspend(self, identifier: str) -> None: ...


class StandingCheckpoint:
    """ports.FrozenVm."""

    def __init__(self, owner: Owner, held: Held) -> None:
        self._owner = owner
        self._held = held

    @property
    def checkpoint(self) -> str:
        return self._held.record.checkpoint

    @property
    def vm(self) -> str:
        return self._held.record.vm

    @property
    def point(self) -> str:
        return self._held.record.point

    @property
    def config(self) -> str:
        return self._held.record.config

    @property
    def consistency(self) -> str:
        return self._held.record.consistency

    @property
    def target(self) -> str | None:
        return self._held.record.target

    @property
    def disks(self) -> dict[str, FrozenDisk]:
        return dict(self._held.disks)

    def pending_at(self, target: str) -> list[str]:
        return self._owner.pending(self.vm, target)

    async def settle(self, point: str, *, committed: bool) -> None:
        await self._owner.settle(self.vm, point, committed=committed)

    async def end(self, outcome: Outcome) -> None:
        await self._owner.end(self.checkpoint, outcome)

    async def suspend(self) -> None:
        await self._owner.suspend(self.checkpoint)


def describe(held: Held) -> CheckpointInfo:
    """As ``checkpoint list`` reports it; ``exports`` only while the frozen view stands."""
    record = held.record
    state = "invalid" if held.invalid and record.state == "sealed" else record.state
    standing = record.state == "sealed" and not held.invalid
    return CheckpointInfo(
        record.checkpoint,
        record.vm,
        record.point,
        state,
        record.held_by,
        record.outcome,
        {disk.image: f"{disk.image}:{record.checkpoint}" for disk in record.disks if standing},
    )


def check_request(
    known: Mapping[str, OpenImage], vm: str, disks: Sequence[BackupDisk], config: str
) -> dict[str, OpenImage]:
    """The images of a checkpoint that may begin, in one order for all: so two holds cannot wait for each
    other. Raises Refused."""
    check_name("a VM", vm)
    if not 0 < len(disks) <= DISKS_MAX:
        raise Refused(f"a checkpoint has 1 to {DISKS_MAX} disks")
    if len(config.encode()) > CONFIG_BYTES_MAX:
        raise Refused(f"the VM's configuration is larger than {CONFIG_BYTES_MAX} bytes")
    images: dict[str, OpenImage] = {}
    for disk in disks:
        check_name("a disk", disk.name)
        if disk.image not in known:
            raise Refused(f"there is no open image {disk.image!r}")
        images[disk.image] = known[disk.image]
    if len(images) != len(disks) or len({disk.name for disk in disks}) != len(disks):
        raise Refused("every disk of a checkpoint has a name and an image of its own")
    return dict(sorted(images.items()))


def new_record(
    identifier: str,
    vm: str,
    disks: list[BackupDisk],
    config: str,
    held_by: HeldBy,
    target: str | None,
    images: Mapping[str, OpenImage],
) -> Record:
    """Whether the guest was quiet at the cut is known after it."""
    return Record(
        identifier,
        vm,
        f"rp-{secrets.token_hex(8)}",
        held_by,
        CRASH,
        time.time_ns(),
        config,
        [RecordDisk(disk.name, disk.image, str(images[disk.image].image.uuid)) for disk in disks],
        target=target,
    )


def refuse_standing(everything: Iterable[Held], vm: str, images: Mapping[str, OpenImage]) -> None:
    """Raises Refused where somebody holds a checkpoint of this VM or of one of these images."""
    for held in everything:
        if held.is_deserted or not held.record.is_standing:
            continue
        if held.record.vm == vm or not images.keys().isdisjoint(held.images):
            what = f"checkpoint {held.record.checkpoint} of VM {held.record.vm} is held"
            if held.record.held_by == "backup":
                raise Refused(f"{what} by a backup that runs: wait until that one has ended")
            raise Refused(f"{what} (by hand): end it first (diskctl checkpoint end {held.record.checkpoint})")


def refuse_live_backup(held: Held) -> None:
    """Raises Refused where a backup is at work with it: only its target can call its point good (B3)."""
    record = held.record
    if record.held_by == "backup" and record.is_standing and held.idle is None:
        raise Refused(
            f"checkpoint {record.checkpoint} of VM {record.vm} is held by a backup that runs:"
            " its target's word makes its point valid (--discard gives the backup up)"
        )

"""The seams of diskd: what the NBD server, the exporter and the storage engine ask of each other.

A *layer is a device*: tracked images, overlays, faulty devices for tests and plain memory all satisfy
``Device`` and pass one contract test (tests/shell/device_contract.py).
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, Protocol, TypeAlias

import attrs

from diskd.core.statistics import IoCounts

AllocationKind = Literal["data", "zero", "hole"]


@attrs.frozen
class Allocation:
    """One run of an image: ``zero`` reads as zeroes but is allocated, ``hole`` is neither."""

    offset: int
    length: int
    kind: AllocationKind


@attrs.frozen
class ChangeReport:
    """The changes since a point (T2: a superset; T3: whether it is exact).

    ``extents``: ascending, disjoint, coalesced (offset, length) in bytes, block-aligned except at the
    image's end. ``over_report_bytes``: by how much at most they exceed the truth; 0 where exact.
    """

    extents: list[tuple[int, int]]
    exact: bool
    over_report_bytes: int


class Device(Protocol):
    """Random access to a virtual disk. Ranges are validated by the caller against ``size_bytes``.

    Failures are OSError with the errno that the guest shall see (ENOSPC, EIO, EPERM; Fenced is
    ESHUTDOWN). ``*_nowait`` returns None or False where it would block: then await the other form.
    """

    @property
    def size_bytes(self) -> int: ...
    @property
    def is_read_only(self) -> bool: ...
    def read_nowait(self, offset: int, length: int) -> bytes | None: ...
    async def read(self, offset: int, length: int) -> bytes: ...
    def write_nowait(self, offset: int, data: bytes | memoryview) -> bool:
        """True when the write is submitted and complete as far as a reply without FUA needs."""
        ...

    async def write(self, offset: int, data: bytes | memoryview, *, fua: bool = False) -> None: ...
    async def write_zeroes(
        self, offset: int, length: int, *, may_trim: bool = True, fua: bool = False
    ) -> None: ...
    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None: ...
    async def flush(self) -> None: ...
    async def allocation(self, offset: int, length: int) -> list[Allocation]:
        """Ascending and without gaps from ``offset`` on, at least one entry, none beyond the range. After a
        few thousand entries it may end before the range does: ask again for the rest."""
        ...


class InPlace(Protocol):
    """A device that can do many small cached reads and writes in one step of the loop (core.nbd_plain).

    ``begin_in_place`` is called in that step, before the others: it checks what holds for all of them (S1)
    and raises as a read would; False where the device can not do anything in place now. The others raise
    as in Device, and answer False where the other forms must be used.
    """

    def begin_in_place(self) -> bool: ...
    def read_in_place(self, offset: int, buffer: memoryview) -> bool:
        """Fill the buffer."""
        ...

    def write_in_place(self, offset: int, data: memoryview) -> bool:
        """As Device.write_nowait, which looks after T1 and the hold."""
        ...


@attrs.frozen
class Export:
    """What a name on the NBD wire opens. ``contexts`` are dirty-bitmap points, by point id; what they answer
    may be asked for again and again.

    ``close`` is called once when the connection ends; it is synchronous and never fails. ``fast_zero``:
    zeroing never takes longer than writing zeroes would. ``counts``: where what is served past the device's
    own methods, in place, is counted.
    """

    device: Device
    multi_conn: bool
    contexts: "dict[str, Callable[[], Awaitable[ChangeReport]]]"
    close: Callable[[], None]
    preferred_block_bytes: int = 4096
    fast_zero: bool = False
    counts: IoCounts | None = None


class ExportCatalog(Protocol):
    """The names an NBD server offers. ``open`` raises Refused (a policy answer) or NoSuchExport."""

    def names(self) -> Sequence[str]:
        """Only what ``open`` would accept now."""
        ...

    async def open(self, name: str, *, peer: str, drop: Callable[[str], None]) -> Export:
        """``drop(reason)`` ends this connection from outside, at any time: fencing uses it."""
        ...

    async def info(self, name: str) -> Export:
        """As open, for NBD_OPT_INFO: nothing is held, nobody is disturbed, close does nothing."""
        ...


class FrozenDisk(Protocol):
    """One disk of a checkpoint, as the exporter reads it. It does not change while the checkpoint stands."""

    @property
    def image(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def points(self) -> list[str]:
        """Valid reference points, oldest first."""
        ...

    def changes_since(self, point: str) -> ChangeReport:
        """Raises NoSuchPoint with the reason and the remedy (T4)."""
        ...

    def allocation_blocking(self, offset: int, length: int) -> list[Allocation]:
        """For a worker thread."""
        ...

    def read_into_blocking(self, offset: int, buffer: memoryview) -> None:
        """For a worker thread: fills the buffer. Raises OSError, also once the checkpoint is invalid (B2)."""
        ...


# Told, now and then, how many bytes are left of the merge that a checkpoint waits for.
OnMerge: TypeAlias = Callable[[int], Awaitable[None]]


class FrozenVm(Protocol):
    """A checkpoint held for one backup: all disks of the VM at one instant, with its configuration (B1)."""

    @property
    def checkpoint(self) -> str: ...
    @property
    def vm(self) -> str: ...
    @property
    def point(self) -> str:
        """The id (``rp-`` and 16 hex digits) that becomes a reference point when the target has committed."""
        ...

    @property
    def config(self) -> str: ...
    @property
    def consistency(self) -> str: ...
    @property
    def target(self) -> str | None:
        """The repository that its backup goes to, where that is known."""
        ...

    @property
    def disks(self) -> "dict[str, FrozenDisk]":
        """By disk name."""
        ...

    def pending_at(self, target: str) -> list[str]:
        """Points of this VM whose acknowledgement by this target (or by an unknown one) was lost: to be
        settled with it first (B3)."""
        ...

    async def settle(self, point: str, *, committed: bool) -> None: ...
    async def end(self, outcome: Literal["keep", "discard", "pending"]) -> None:
        """``keep``: the target acknowledged, the point becomes valid. ``pending``: it may have committed.
        ``discard``: as if it had not been tried. Answers once that is durable; merging goes on behind."""
        ...

    async def suspend(self) -> None:
        """Let go of it without an end: it stands for a while, and whoever goes on with the backup gets it
        again. Then it is given up, as after ``end("pending")``."""
        ...


class Layer(Protocol):
    """Where the bytes of an open image go, below tracking, leases and the hold: the raw file, or an
    overlay (AVHD over the frozen parent). Marking (T1) has been done before any of these is called.

    ``write`` and friends are called without a hold in force; ``*_nowait`` as in Device.
    """

    def read_into_nowait(self, offset: int, buffer: bytearray | memoryview) -> bool:
        """Fills the buffer: False where ``read_nowait`` answers None."""
        ...

    def read_nowait(self, offset: int, length: int) -> bytes | None: ...
    async def read(self, offset: int, length: int) -> bytes: ...
    def write_nowait(self, offset: int, data: bytes | memoryview) -> bool: ...
    async def write(self, offset: int, data: bytes | memoryview) -> None: ...
    async def write_zeroes(self, offset: int, length: int, *, may_trim: bool) -> None: ...
    async def flush(self) -> None:
        """Everything written before is durable: AVHD data, then its map, then (where it has unsynced
        writes) the parent."""
        ...

    async def allocation(self, offset: int, length: int) -> list[Allocation]: ...
    async def close(self) -> None: ...

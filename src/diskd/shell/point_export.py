"""A committed point over NBD, before it is restored: every disk as a read-only export under its name.

Whatever is read has been verified with the digests of its source (B4): a damaged place is an I/O error for
whoever reads it, and a line in the log; all other places are served.
"""

import errno
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import structlog
import trio

from diskd.core.frame_index import Piece
from diskd.core.ports import Allocation, AllocationKind, Export
from diskd.core.stream import FrameKind
from diskd.errors import Damaged, NoSuchExport
from diskd.shell.chain_view import ChainView, OpenPoint
from diskd.shell.read_only import NoWrites

T = TypeVar("T")

# With so many runs an answer ends: whoever wants the rest asks again.
ALLOCATIONS_MAX: Final = 4096
_KINDS: Final[dict[FrameKind, AllocationKind]] = {
    FrameKind.DATA: "data",
    FrameKind.ZERO: "zero",
    FrameKind.HOLE: "hole",
}

log = structlog.get_logger("target")


class PointDevice:
    """ports.Device over one disk of a point. A view keeps what it read last, so one thread at a time."""

    def __init__(self, view: ChainView, size_bytes: int) -> None:
        self._view = view
        self._size_bytes = size_bytes
        self._turn = trio.Lock()
        writing = NoWrites("a point")
        self.write_nowait, self.write = writing.write_nowait, writing.write
        self.write_zeroes, self.trim, self.flush = writing.write_zeroes, writing.trim, writing.flush

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    @property
    def is_read_only(self) -> bool:
        return True

    async def _in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        async with self._turn:
            try:
                return await trio.to_thread.run_sync(function, *arguments)
            except Damaged as error:
                log.error("point.damaged", reason=str(error))  # noqa: TRY400 - one line, no trace
                raise OSError(errno.EIO, str(error)) from error

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        return None

    async def read(self, offset: int, length: int) -> bytes:
        return await self._in_thread(self._view.read, offset, length)

    async def allocation(self, offset: int, length: int) -> list[Allocation]:
        return await self._in_thread(self._allocation_blocking, offset, length)

    def _allocation_blocking(self, offset: int, length: int) -> list[Allocation]:
        found: list[Allocation] = []
        for piece in self._view.pieces(offset, length):
            kind = _kind(piece)
            if found and found[-1].kind == kind:
                found[-1] = Allocation(found[-1].offset, found[-1].length + piece.length, kind)
            elif len(found) == ALLOCATIONS_MAX:
                return found
            else:
                found.append(Allocation(piece.offset, piece.length, kind))
        return found


class PointCatalog:
    """ports.ExportCatalog: the disks of one open point."""

    def __init__(self, opened: OpenPoint) -> None:
        sizes = {disk.name: disk.virtual_size for disk in opened.manifest.disks}
        self._devices = {name: PointDevice(view, sizes[name]) for name, view in opened.views.items()}

    def names(self) -> Sequence[str]:
        return list(self._devices)

    async def open(self, name: str, *, peer: str, drop: Callable[[str], None]) -> Export:
        return await self.info(name)

    async def info(self, name: str) -> Export:
        await trio.lowlevel.checkpoint()
        if name not in self._devices:
            raise NoSuchExport(f"the point has no disk {name[:80]!r}")
        return Export(self._devices[name], multi_conn=True, contexts={}, close=_nothing)


def _kind(piece: Piece) -> AllocationKind:
    return _KINDS[piece.kind]


def _nothing() -> None:
    """A reader leaves no trace."""

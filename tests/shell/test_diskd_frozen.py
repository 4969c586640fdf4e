"""The frozen view while a write goes to its parent after all (B2): newer bytes are never called frozen."""

import attrs
import pytest
import trio

from diskd.core.overlay import Mode
from diskd.core.ports import Allocation
from diskd.shell.frozen import FrozenDevice, FrozenImage

SIZE = 4096


@attrs.define
class Overlay:
    mode: Mode = Mode.FORKED


@attrs.define
class ParentUnderWrite:
    """A parent that the AVHD gives up on within every read: what is read may be newer than the cut."""

    overlay: Overlay
    is_cached: bool = False

    def read_into_blocking(self, offset: int, buffer: memoryview) -> None:
        self.overlay.mode = Mode.MERGING
        buffer[:] = b"n" * len(buffer)

    def allocation_blocking(self, offset: int, length: int) -> list[Allocation]:
        self.overlay.mode = Mode.MERGING
        return [Allocation(offset, length, "data")]

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        return b"o" * length if self.is_cached else None

    async def read(self, offset: int, length: int) -> bytes:
        await trio.lowlevel.checkpoint()
        self.overlay.mode = Mode.MERGING
        return b"n" * length

    async def allocation(self, offset: int, length: int) -> list[Allocation]:
        await trio.lowlevel.checkpoint()
        return self.allocation_blocking(offset, length)


@attrs.define
class Image:
    raw: ParentUnderWrite
    name: str = "a"
    size_bytes: int = SIZE
    block_bytes: int = 4096


def view(*, is_cached: bool = False) -> FrozenImage:
    overlay = Overlay()
    return FrozenImage(Image(ParentUnderWrite(overlay, is_cached)), overlay, "rp-0123456789abcdef")


def test_what_an_export_read_meanwhile_is_refused():
    with pytest.raises(OSError, match="ended"):
        view().read_into_blocking(0, memoryview(bytearray(SIZE)))
    with pytest.raises(OSError, match="ended"):
        view().allocation_blocking(0, SIZE)


async def test_what_a_third_party_read_meanwhile_is_refused():
    with pytest.raises(OSError, match="ended"):
        await FrozenDevice(view()).read(0, SIZE)
    with pytest.raises(OSError, match="ended"):
        await FrozenDevice(view()).allocation(0, SIZE)


async def test_what_was_read_before_is_frozen_and_nothing_comes_after():
    disk = view(is_cached=True)
    assert await FrozenDevice(disk).read(0, SIZE) == b"o" * SIZE
    disk.end("the AVHD is at its limit")
    for read in (disk.read(0, SIZE), disk.changes("rp-0123456789abcdee")):
        with pytest.raises(OSError, match="at its limit"):
            await read
    with pytest.raises(OSError, match="at its limit"):
        disk.read_into_nowait(0, bytearray(SIZE))

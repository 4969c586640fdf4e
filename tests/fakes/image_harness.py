"""Open images on real files for tests: shared memory in a directory of the test's own, on tmpfs where there
is /dev/shm; a daemon's death (all let go, nothing recorded) and a power loss (shared memory gone)."""

import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import attrs
import trio

from diskd.core.ports import Allocation
from diskd.shell.image import Image, ImageSettings, Writer

MiB = 1 << 20
SIZE = 64 * MiB


@attrs.frozen
class Place:
    """Where an image lives."""

    directory: Path
    settings: ImageSettings

    async def open(self) -> Image:
        return await Image.open(self.directory, self.settings)

    def lose_power(self) -> None:
        """As after a boot: nothing is left in shared memory. Call it after ``abandon``."""
        for path in self.settings.shared_dir.iterdir():
            path.unlink()


@contextlib.contextmanager
def new_place(tmp_path: Path) -> Iterator[Place]:
    parent = "/dev/shm" if Path("/dev/shm").is_dir() else None
    shared = Path(tempfile.mkdtemp(prefix="holdfast-test-", dir=parent))
    try:
        # Flushing is done by the tests, when they want it.
        settings = ImageSettings(shared_dir=shared, tracking_flush_interval_ns=3600 * 10**9)
        yield Place(tmp_path / "disk", settings)
    finally:
        shutil.rmtree(shared)


@contextlib.asynccontextmanager
async def open_image(place: Place) -> AsyncIterator[Image]:
    """Closed, or after a failure abandoned, at the end."""
    image = await place.open()
    try:
        yield image
    finally:
        image.abandon()


def any_writer(image: Image) -> Writer:
    return image.open_writer(lambda: None)


async def cut(image: Image, number: int) -> str:
    """A valid point."""
    point = f"rp-{number:016x}"
    await image.prepare_cut()
    async with image.held():
        image.freeze(point)
    await image.persist_cut()
    await image.validate_point(point)
    return point


class GatedLayer:
    """A layer that waits at a gate before each write, and says what it saw there."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.gate = trio.Event()
        self.arrived = trio.Event()
        self.marked: list[bool] = []

    def read_into_nowait(self, offset: int, buffer: bytearray | memoryview) -> bool:
        return self.image.raw.read_into_nowait(offset, buffer)

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        return self.image.raw.read_nowait(offset, length)

    async def read(self, offset: int, length: int) -> bytes:
        return await self.image.raw.read(offset, length)

    def write_nowait(self, offset: int, data: bytes | memoryview) -> bool:
        return False

    async def write(self, offset: int, data: bytes | memoryview) -> None:
        self.arrived.set()
        await self.gate.wait()
        await self.image.raw.write(offset, data)

    async def write_zeroes(self, offset: int, length: int, *, may_trim: bool) -> None:
        await self.image.raw.write_zeroes(offset, length, may_trim=may_trim)

    async def flush(self) -> None:
        await self.image.raw.flush()

    async def allocation(self, offset: int, length: int) -> list[Allocation]:
        return await self.image.raw.allocation(offset, length)

    async def close(self) -> None:
        return None


async def create(place: Place, size: int = SIZE) -> None:
    """An empty image there."""
    await Image.create(place.directory, size)


def blocks(image: Image, point: str) -> set[int]:
    """The numbers of the blocks that are said to have changed since."""
    found: set[int] = set()
    for offset, length in image.changes_since(point).extents:
        found.update(range(offset // 4096, (offset + length) // 4096))
    return found

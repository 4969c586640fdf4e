"""The shell's own order of durable steps: everything stops before any one of them, on real files.

The simulator crashes the scripts of the core anywhere, but mirrors by hand what the shell puts between them.
"""

import contextlib
import errno
import itertools
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from image_harness import SIZE, MiB, Place, any_writer, blocks, create, cut, new_place, open_image

from daemonkit.errors import HoldfastError
from diskd.core.steps import Names, Read, Size, Step
from diskd.shell import resizing
from diskd.shell.files import Files
from diskd.shell.image import Image

SECOND_POINT = "rp-0000000000000002"
Act = Callable[[Image], Awaitable[None]]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with new_place(tmp_path) as made:
        yield made


class Stopping(Files):
    """Does so many more changes, and then nothing at all any more. ``memory``: what lay in shared memory at
    that instant, which a killed daemon leaves just so."""

    def __init__(self, place: Place, left: int) -> None:
        super().__init__(place.directory)
        self.left = left
        self.memory: dict[Path, bytes] | None = None
        self._shared_dir = place.settings.shared_dir

    def _step(self, step: Step) -> Any:
        if not isinstance(step, Read | Size | Names):
            self._count()
        return super()._step(step)

    def sync(self, name: str) -> None:
        if name == "disk.raw":  # of the others the step was counted
            self._count()
        super().sync(name)

    def _count(self) -> None:
        if self.left <= 0:
            if self.memory is None:
                self.memory = {path: path.read_bytes() for path in self._shared_dir.iterdir()}
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.left -= 1


async def cut_and_write(image: Image) -> None:
    """Both halves of a cut have writes of their own."""
    await image.prepare_cut()
    async with image.held():
        image.freeze(SECOND_POINT)
    await any_writer(image).write(MiB + 8192, b"y")
    await image.persist_cut()
    await image.validate_point(SECOND_POINT)


async def cut_and_take_back(image: Image) -> None:
    await image.prepare_cut()
    async with image.held():
        image.freeze(SECOND_POINT)
    await any_writer(image).write(MiB + 8192, b"y")
    await image.cancel_cut()


async def grow(image: Image) -> None:
    await resizing.grow(image, 2 * SIZE)


async def delete(image: Image) -> None:
    await cut(image, 2)
    await any_writer(image).write(MiB + 8192, b"y")
    await cut(image, 3)
    await image.delete_point(SECOND_POINT)


async def close(image: Image) -> None:
    await image.close()


async def stopped(place: Place, act: Act, left: int) -> tuple[str, set[int], dict[Path, bytes] | None]:
    """The first point and what was certainly written since, after everything stopped; what was left in shared
    memory then, or None where it did not stop."""
    async with open_image(place) as image:
        point = image.points()[0].id
        await any_writer(image).write(MiB, b"x")
        known = blocks(image, point)
        usual, files = image.files, Stopping(place, left)
        files._descriptors, usual._descriptors = usual._descriptors, {}  # the image's locks among them
        image.files = image.raw._files = files
        with contextlib.suppress(OSError, HoldfastError):
            await act(image)
        if not image.is_closed:
            known = blocks(image, point) if image.points() else known
        usual.close()
    return point, known, files.memory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "kind"),
    [
        *itertools.product([cut_and_write, cut_and_take_back, grow, close], ["daemon", "kill", "power"]),
        *itertools.product([delete], ["daemon", "power"]),
    ],
)
async def test_wherever_it_stops_no_change_and_no_point_is_lost(place: Place, act: Act, kind: str) -> None:
    for left in range(100):
        place.directory.exists() and place.directory.rename(place.directory.with_name(f"old{left}"))
        await create(place)
        async with open_image(place) as image:
            await cut(image, 1)
        point, known, memory = await stopped(place, act, left)
        if kind == "power":
            place.lose_power()
        elif kind == "kill" and memory is not None:
            # Unlike a daemon whose files have failed, it has tidied nothing up.
            place.lose_power()
            for path, content in memory.items():
                path.write_bytes(content)
        async with open_image(place) as image:
            assert image.opened_how != "new_generation", (left, image.opened_reason)
            found = {known.id: known.state for known in image.points()}
            assert found[point] == "valid"
            for name, state in found.items():
                if state == "valid":
                    image.changes_since(name)  # nothing that its answer needs is missing
            assert blocks(image, point) >= known
            if kind != "power":
                assert image.changes_since(point).exact
            await image.close()
        if memory is None:
            break
    assert memory is None
    assert left > 5

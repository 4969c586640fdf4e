"""The hold around a cut: writes go on while a long TRIM is waited for, and are held for a moment only."""

import pytest
import trio
import trio.testing
from image_harness import GatedLayer, MiB, any_writer, new_place, open_image

from diskd.core.tracker import REQUEST_BYTES_MAX
from diskd.core.zero_parts import PART_BYTES_MIN, PART_NS_GOAL, next_part
from diskd.shell.image import Image


class SlowTrims(GatedLayer):
    """Zeroing waits at the gate; writes do not."""

    def __init__(self, image: Image) -> None:
        super().__init__(image)
        self.zeroing = 0

    async def write(self, offset: int, data: bytes | memoryview) -> None:
        await self.image.raw.write(offset, data)

    async def write_zeroes(self, offset: int, length: int, *, may_trim: bool) -> None:
        self.zeroing += 1
        self.arrived.set()
        await self.gate.wait()
        await self.image.raw.write_zeroes(offset, length, may_trim=may_trim)


@pytest.fixture
def place(tmp_path):
    with new_place(tmp_path) as made:
        yield made


async def test_writes_go_on_while_a_cut_waits_for_a_trim(place):
    await Image.create(place.directory, 8 * MiB)
    async with open_image(place) as image:
        layer = image.layer = SlowTrims(image)
        writer = any_writer(image)
        entered, leave = trio.Event(), trio.Event()

        async def hold() -> None:
            async with image.held():
                assert not image.writes and image.is_held
                entered.set()
                await leave.wait()

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(writer.trim, 0, 4096)
                await layer.arrived.wait()
                nursery.start_soon(hold)
                await trio.testing.wait_all_tasks_blocked()
                assert not image.is_held
                await writer.write(MiB, b"w" * 4096)
                nursery.start_soon(writer.trim, 2 * MiB, 4096)
                await trio.testing.wait_all_tasks_blocked()
                assert layer.zeroing == 1 and not entered.is_set(), "a further trim waits for the cut"
                layer.gate.set()
                await entered.wait()
                held = trio.Event()

                async def write() -> None:
                    await writer.write(MiB, b"x" * 4096)
                    held.set()

                nursery.start_soon(write)
                await trio.testing.wait_all_tasks_blocked()
                assert not held.is_set() and layer.zeroing == 1
                leave.set()
        assert layer.zeroing == 2 and held.is_set() and not image.is_held
        assert await writer.read(MiB, 4096) == b"x" * 4096


@pytest.mark.parametrize("verb", ["write", "trim"])
async def test_nobody_who_waits_for_the_same_write_is_forgotten(place, verb):
    await Image.create(place.directory, 8 * MiB)
    async with open_image(place) as image:
        layer = image.layer = GatedLayer(image) if verb == "write" else SlowTrims(image)
        writer = any_writer(image)
        entered: list[str] = []

        async def hold(name: str) -> None:
            async with image.held():
                entered.append(name)

        async def drain(name: str) -> None:
            await image.drain(writer)
            entered.append(name)

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                if verb == "write":
                    nursery.start_soon(writer.write, 0, b"w" * (2 * MiB))
                else:
                    nursery.start_soon(writer.trim, 0, 4096)
                await layer.arrived.wait()
                for name in ("resize", "cut"):
                    nursery.start_soon(hold, name)
                    nursery.start_soon(drain, f"{name}'s drain")
                await trio.testing.wait_all_tasks_blocked()
                assert entered == []
                layer.gate.set()
            assert sorted(entered) == ["cut", "cut's drain", "resize", "resize's drain"]
            assert not image.is_held and not image.zeroes_are_held
            await writer.write(0, b"x" * 4096)


def test_parts_follow_what_they_cost():
    part = PART_BYTES_MIN
    for _ in range(20):
        part = next_part(part, 10_000)
    assert part == REQUEST_BYTES_MAX
    assert next_part(part, PART_NS_GOAL // 2) == part
    for _ in range(20):
        part = next_part(part, 1_000_000_000)
    assert part == PART_BYTES_MIN

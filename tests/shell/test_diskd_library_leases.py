"""Leases of a served image: fencing, preparing, promoting, and races for the next epoch (S1)."""

import random

import pytest
import trio
from diskd_library import BLOCK, SIZE, get, opened, put, serving

from diskd.errors import Fenced, NoSuchExport, Refused


async def test_content_and_lease_survive_a_restart(tmp_path):
    async with serving(tmp_path) as library:
        await library.create_image("a", SIZE)
        await library.acquire_lease("a", 7, "n1/web")
        export = await opened(library, "a@7")
        await put(export.device, 0, b"x" * BLOCK)
        export.close()
    async with serving(tmp_path) as library:
        assert library.lease("a").epoch == 7 and list(library.names()) == ["a@7"]
        export = await opened(library, "a@7")
        assert await get(export.device, 0, BLOCK) == b"x" * BLOCK
        for name in ("a", "a@6", "a@8"):
            with pytest.raises(Refused):
                await opened(library, name)
        for name in ("a@07", "a@", "b", "a:cp-1", "a@7:cp-1", "a@x"):
            with pytest.raises(NoSuchExport):
                await opened(library, name)
        export.close()


async def test_a_higher_epoch_fences_drops_and_answers_afterwards(tmp_path):
    dropped: list[str] = []
    async with serving(tmp_path) as library:
        await library.create_image("a", SIZE)
        plain = await opened(library, "a", dropped)
        await put(plain.device, 0, b"1" * BLOCK)
        await library.acquire_lease("a", 1, "n1/web")
        assert len(dropped) == 1
        with pytest.raises(Fenced):
            plain.device.write_nowait(0, b"0" * BLOCK)
        first = await opened(library, "a@1", dropped)
        await library.acquire_lease("a", 1, "n1/web")  # changes nothing
        assert len(dropped) == 1
        await put(first.device, 0, b"2" * BLOCK)
        await library.acquire_lease("a", 2, "n2/web")
        assert len(dropped) == 2
        for call in (first.device.write, first.device.read):
            with pytest.raises(Fenced):
                await call(0, b"0" * BLOCK if call == first.device.write else BLOCK)
        second = await opened(library, "a@2", dropped)
        assert await get(second.device, 0, BLOCK) == b"2" * BLOCK
        third = await opened(library, "a@2", dropped)  # a newer connection takes over
        assert len(dropped) == 3
        with pytest.raises(Fenced):
            await second.device.write(0, b"0" * BLOCK)
        await put(third.device, 0, b"3" * BLOCK)
        await library.release_lease("a", 2, "n2/web")
        assert len(dropped) == 4 and library.lease("a").released
        with pytest.raises(Refused):
            await library.acquire_lease("a", 2, "n2/web")
        for export in (plain, first, second, third):
            export.close()


async def test_prepared_reads_and_is_promoted(tmp_path):
    async with serving(tmp_path) as library:
        await library.create_image("a", SIZE)
        await library.acquire_lease("a", 1, "n1/web")
        source = await opened(library, "a@1")
        await put(source.device, 0, b"1" * BLOCK)
        await library.prepare_lease("a", 2, "n2/web")
        assert sorted(library.names()) == ["a@1", "a@2"]
        destination = await opened(library, "a@2")
        assert await get(destination.device, 0, BLOCK) == b"1" * BLOCK
        with pytest.raises(PermissionError):
            destination.device.write_nowait(0, b"2" * BLOCK)
        with pytest.raises(Refused, match="prepared for"):
            await library.acquire_lease("a", 2, "n3/web")
        await library.acquire_lease("a", 2, "n2/web")
        await put(destination.device, 0, b"2" * BLOCK)
        with pytest.raises(Fenced):
            await source.device.write(0, b"1" * BLOCK)
        source.close()
        destination.close()


async def test_of_many_acquirers_one_wins_each_epoch(tmp_path):
    rng = random.Random(5)
    won: list[tuple[int, str]] = []
    async with serving(tmp_path) as library:
        await library.create_image("a", SIZE)

        async def acquire(holder: str, epoch: int) -> None:
            try:
                lease = await library.acquire_lease("a", epoch, holder)
            except Refused:
                return
            assert (lease.epoch, lease.holder) == (epoch, holder)
            won.append((epoch, holder))

        async with trio.open_nursery() as nursery:
            for number in range(40):
                nursery.start_soon(acquire, f"n{number}/web", rng.randrange(1, 10))
        epochs = [epoch for epoch, _ in won]
        assert epochs == sorted(set(epochs)), "each epoch once, never down"
        assert library.lease("a").epoch == epochs[-1]

"""Two real daemons over one storage directory: handing images over, taking them over, and being refused."""

import json
import signal
from pathlib import Path

import pytest
import trio
from diskd_process import DiskdProcess
from diskd_storage import point_of, qemu_io, storage
from programs import need, run

pytestmark = [pytest.mark.interop, pytest.mark.slow]

KiB, MiB = 1 << 10, 1 << 20


async def exact(daemon: DiskdProcess, image: str, point: str) -> list[list[int]]:
    changes = await daemon.json("changes", image, "--since", point)
    assert (changes["exact"], changes["over_report_bytes"]) == (True, 0)
    return changes["extents"]


async def test_an_image_goes_to_and_fro_with_its_tracking_its_lease_and_its_points(tmp_path: Path) -> None:
    need("qemu-io")
    async with storage(tmp_path) as shared:
        one, two = await shared.start("n1", "host1"), await shared.start("n2", "host2")
        await one.do("image", "create", "d", "16MiB")
        point = await point_of(one, "d")
        written, epoch = [], 0
        here, there = one, two
        for turn in range(3):
            epoch += 5
            await here.do("lease", "acquire", "d", "--epoch", str(epoch), "--holder", "n/web")
            await qemu_io(f"{here.nbd}/d@{epoch}", f"write -P {turn + 1} {turn}M 64k")
            written.append([turn * MiB, 64 * KiB])
            assert await exact(here, "d", point) == written
            # Neither may be served by both, nor touched by stock tools, whoever serves it.
            refused = await there.refuses("image", "open", "d")
            assert f"served by diskd {'n1' if here is one else 'n2'} on host" in refused
            assert here.ready["control"] in refused
            raw = str(shared.root / "images" / "d" / "disk.raw")
            assert (await run("qemu-io", "-f", "raw", "-c", "write 0 512", raw)).code != 0
            assert "under lease" in await here.refuses("image", "release", "d")
            await here.do("lease", "release", "d", "--epoch", str(epoch), "--holder", "n/web")
            await here.do("image", "release", "d")
            await there.do("image", "open", "d")
            shown = await there.json("lease", "show", "d")
            assert (shown["epoch"], shown["holder"]) == (epoch, None)
            refused = await there.refuses("lease", "acquire", "d", "--epoch", str(epoch), "--holder", "x")
            assert "is refused" in refused
            elsewhere = await here.json("image", "show", "d")
            assert elsewhere["state"] == "elsewhere"
            assert elsewhere["owner"]["control"] == there.ready["control"]
            here, there = there, here
        assert await exact(here, "d", point) == written
        assert await one.end() == 0
        assert await two.end() == 0


async def test_a_killed_daemons_image_is_taken_over_on_the_same_host_exactly(tmp_path: Path) -> None:
    need("qemu-io")
    async with storage(tmp_path) as shared:
        one, two = await shared.start("n1a", "host1"), await shared.start("n1b", "host1")
        await one.do("image", "create", "d", "16MiB")
        point = await point_of(one, "d")
        await one.do("lease", "acquire", "d", "--epoch", "7", "--holder", "n1/web")
        await qemu_io(f"{one.nbd}/d@7", "write -P 1 1M 64k")
        await one.end(signal.SIGKILL)
        assert (await two.json("image", "show", "d"))["state"] == "elsewhere"
        await two.do("image", "open", "d")
        assert await exact(two, "d", point) == [[MiB, 64 * KiB]]
        assert (await two.json("lease", "show", "d"))["epoch"] == 7
        assert "is refused" in await two.refuses("lease", "acquire", "d", "--epoch", "7", "--holder", "x")
        # The former owner comes back, and leaves it alone.
        await one.start()
        assert (await one.json("image", "show", "d"))["owner"]["daemon"] == "n1b"
        assert "served by diskd n1b" in await one.refuses("image", "open", "d")
        await qemu_io(f"{two.nbd}/d@7", "write -P 2 2M 4k")
        await two.end(signal.SIGKILL)
        await one.do("image", "open", "d")
        assert await exact(one, "d", point) == [[MiB, 64 * KiB], [2 * MiB, 4 * KiB]]


async def test_another_host_needs_the_word_that_the_owner_is_fenced(tmp_path: Path) -> None:
    need("qemu-io")
    async with storage(tmp_path) as shared:
        one, two = await shared.start("n1", "host1"), await shared.start("n2", "host2")
        await one.do("image", "create", "d", "64MiB")
        point = await point_of(one, "d")
        await qemu_io(f"{one.nbd}/d", "write -P 1 3M 4k", "flush")
        await one.end(signal.SIGKILL)
        refused = await two.refuses("image", "open", "d")
        assert "belongs to diskd n1 on host host1" in refused
        assert "--fenced host1" in refused
        assert "names another host" in await two.refuses("image", "open", "d", "--fenced", "host2")
        await two.do("image", "open", "d", "--fenced", "host1")
        changes = await two.json("changes", "d", "--since", point)
        assert changes["exact"] is False
        assert 0 < changes["over_report_bytes"] <= MiB
        assert any(start <= 3 * MiB < start + length for start, length in changes["extents"])
        assert sum(length for _, length in changes["extents"]) <= MiB
        # host1 boots again: what was its own is not any more.
        shared.hosts["host1"].reboot()
        await one.start()
        assert (await one.json("image", "show", "d"))["owner"]["daemon"] == "n2"
        assert "served by diskd n2" in await one.refuses("image", "open", "d", "--fenced", "host2")
        # A clean stop needs no word: everything of it is durable, and it says so.
        await qemu_io(f"{two.nbd}/d", "write -P 2 9M 4k")
        assert await two.end() == 0
        closed = await one.json("image", "show", "d")
        assert (closed["state"], closed["owner"]["state"]) == ("elsewhere", "closed")
        await one.do("image", "open", "d")
        again = await one.json("changes", "d", "--since", point)
        assert sum(length for _, length in again["extents"]) <= MiB + 4 * KiB


async def test_daemons_that_start_at_once_share_the_images_out(tmp_path: Path) -> None:
    """Whatever the race, each image has one owner; two of one name are not served at all."""
    async with storage(tmp_path) as shared:
        first = await shared.start("n0", "host0")
        names = [f"d{number}" for number in range(6)]
        for name in names:
            await first.do("image", "create", name, "1MiB")
        await first.end(signal.SIGKILL)
        for name in names:  # nobody's: as images are that were copied here
            for path in (shared.root / "images" / name).glob("owner.[0-9]*"):
                path.unlink()
        daemons = [shared.daemon(f"n{number}", f"host{number}") for number in (1, 2, 3)]
        async with trio.open_nursery() as nursery:
            for daemon in daemons:
                nursery.start_soon(daemon.start)
        owned: list[str] = []
        for daemon in daemons:
            for info in await daemon.json("image", "list"):
                assert info["state"] in ("open", "elsewhere"), info
                if info["state"] == "open":
                    owned.append(info["name"])
                    assert info["owner"]["daemon"] == daemon.arguments[1]
        assert sorted(owned) == names
        namesake = shared.daemon("n1", "host4")
        with pytest.raises(AssertionError, match="a diskd named n1 serves this root already"):
            await namesake.start()


async def test_openers_that_race_have_one_winner(tmp_path: Path) -> None:
    async with storage(tmp_path) as shared:
        first = await shared.start("n0", "host0")
        await first.do("image", "create", "d", "1MiB")
        daemons = [await shared.start(f"n{number}", f"host{number}") for number in (1, 2)]
        for _ in range(3):
            await first.do("image", "release", "d")
            outcomes: dict[str, int] = {}

            async def attempt(daemon: DiskdProcess, outcomes: dict[str, int]) -> None:
                outcomes[daemon.arguments[1]] = (await daemon.ctl("image", "open", "d")).code

            async with trio.open_nursery() as nursery:
                for daemon in daemons:
                    nursery.start_soon(attempt, daemon, outcomes)
            (winner,) = [name for name, code in outcomes.items() if code == 0]
            for daemon in daemons:
                shown = await daemon.json("image", "show", "d")
                assert shown["owner"]["daemon"] == winner
                assert (shown["state"] == "open") == (daemon.arguments[1] == winner)
                if daemon.arguments[1] == winner:
                    await daemon.do("image", "release", "d")
            await first.do("image", "open", "d")


async def test_who_finds_the_image_taken_away_stops_serving_it(tmp_path: Path) -> None:
    """An operator lied: the fenced host was alive. Or somebody removed the lock."""
    need("qemu-io")
    async with storage(tmp_path) as shared:
        one = await shared.start("n1", "host1")
        for name in ("d", "e"):
            await one.do("image", "create", name, "16MiB")
        await one.do("lease", "acquire", "d", "--epoch", "3", "--holder", "n1/web")
        # Storage that passes no locks on between hosts: the lock of host1 is not seen on host2.
        for name in ("d", "e"):
            lock = shared.root / "images" / name / "owner.lock"
            lock.rename(lock.with_name("hidden"))
            lock.touch()
        with trio.fail_after(20):
            while {info["state"] for info in await one.json("image", "list")} != {"damaged"}:  # noqa: ASYNC110 - it is another process
                await trio.sleep(0.05)
        assert "its lock is gone" in (await one.json("image", "show", "d"))["reason"]
        assert "image.lost" in one.log()
        assert (await run("qemu-io", "-f", "raw", "-c", "read 0 512", f"{one.nbd}/d@3")).code != 0
        assert "damaged" in await one.refuses("lease", "acquire", "d", "--epoch", "9", "--holder", "n1/web")
        two = await shared.start("n2", "host2")
        await two.do("image", "open", "d", "--fenced", "host1")
        await two.do("lease", "acquire", "d", "--epoch", "4", "--holder", "n2/web")
        shown = await one.json("image", "show", "d")
        assert (shown["state"], shown["owner"]["daemon"], shown["epoch"]) == ("elsewhere", "n2", 4)
        assert json.loads((await one.ctl("lease", "show", "d", "--json")).out or "null") is None
        # Nothing was lost but the service: e is its own still, and is opened again.
        await one.do("image", "open", "e")
        await qemu_io(f"{one.nbd}/e", "write -P 1 0 64k", "read -P 1 0 64k")
        assert await one.end() == 0
        assert "Traceback" not in one.log()

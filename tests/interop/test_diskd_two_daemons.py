"""Two real daemons over one storage directory: handing images over, taking them over, and being refused."""

import signal
from pathlib import Path

import pytest
import trio
from diskd_storage import Control, qemu_io, storage
from programs import need, run

from daemonkit.diskd_api import LEASE_RELEASE, LEASE_SHOW, ImageName, LeaseRequest
from daemonkit.errors import OperatorError
from diskd.core import calls

pytestmark = [pytest.mark.interop, pytest.mark.slow]

KiB, MiB = 1 << 10, 1 << 20


async def test_an_image_goes_to_and_fro_with_its_tracking_its_lease_and_its_points(tmp_path: Path) -> None:
    need("qemu-io")
    async with storage(tmp_path) as shared:
        one, two = await shared.start("n1", "host1"), await shared.start("n2", "host2")
        here, there = Control(one), Control(two)
        await here.create("d", 16 * MiB)
        point = await here.point("d")
        written: list[tuple[int, int]] = []
        for turn in range(3):
            epoch = 5 * (turn + 1)
            await here.acquire("d", epoch)
            await qemu_io(f"{here.daemon.nbd}/d@{epoch}", f"write -P {turn + 1} {turn}M 64k")
            written.append((turn * MiB, 64 * KiB))
            assert await here.exact("d", point) == written
            # Neither may be served by both, nor touched by stock tools, whoever serves it.
            refused = await there.refuses_open("d")
            assert f"served by diskd {'n1' if here.daemon is one else 'n2'} on host" in refused
            assert here.daemon.ready["control"] in refused
            raw = str(shared.root / "images" / "d" / "disk.raw")
            assert (await run("qemu-io", "-f", "raw", "-c", "write 0 512", raw)).code != 0
            assert "under lease" in await here.refuses(calls.IMAGE_RELEASE, ImageName("d"))
            await here.ask(LEASE_RELEASE, LeaseRequest("d", epoch, "n/web"))
            await here.release("d")
            await there.open("d")
            shown = await there.ask(LEASE_SHOW, ImageName("d"))
            assert (shown.epoch, shown.holder) == (epoch, None)
            assert "is refused" in await there.refuses_acquire("d", epoch)
            elsewhere = await here.show("d")
            assert elsewhere.state == "elsewhere"
            assert elsewhere.owner is not None
            assert elsewhere.owner.control == there.daemon.ready["control"]
            here, there = there, here
        assert await here.exact("d", point) == written
        assert await one.end() == 0
        assert await two.end() == 0


async def test_a_killed_daemons_image_is_taken_over_on_the_same_host_exactly(tmp_path: Path) -> None:
    need("qemu-io")
    async with storage(tmp_path) as shared:
        first, second = await shared.start("n1a", "host1"), await shared.start("n1b", "host1")
        one, two = Control(first), Control(second)
        await one.create("d", 16 * MiB)
        point = await one.point("d")
        await one.acquire("d", 7)
        await qemu_io(f"{first.nbd}/d@7", "write -P 1 1M 64k")
        await first.end(signal.SIGKILL)
        assert (await two.show("d")).state == "elsewhere"
        await two.open("d")
        assert await two.exact("d", point) == [(MiB, 64 * KiB)]
        assert (await two.ask(LEASE_SHOW, ImageName("d"))).epoch == 7
        assert "is refused" in await two.refuses_acquire("d", 7)
        # The former owner comes back, and leaves it alone.
        await first.start()
        owner = (await one.show("d")).owner
        assert owner is not None
        assert owner.daemon == "n1b"
        assert "served by diskd n1b" in await one.refuses_open("d")
        await qemu_io(f"{second.nbd}/d@7", "write -P 2 2M 4k")
        await second.end(signal.SIGKILL)
        await one.open("d")
        assert await one.exact("d", point) == [(MiB, 64 * KiB), (2 * MiB, 4 * KiB)]


async def test_another_host_needs_the_word_that_the_owner_is_fenced(tmp_path: Path) -> None:
    need("qemu-io")
    async with storage(tmp_path) as shared:
        first, second = await shared.start("n1", "host1"), await shared.start("n2", "host2")
        one, two = Control(first), Control(second)
        await one.create("d", 64 * MiB)
        point = await one.point("d")
        await qemu_io(f"{first.nbd}/d", "write -P 1 3M 4k", "flush")
        await first.end(signal.SIGKILL)
        refused = await second.refuses("image", "open", "d")
        assert "belongs to diskd n1 on host host1" in refused
        assert "--fenced host1" in refused
        assert "names another host" in await second.refuses("image", "open", "d", "--fenced", "host2")
        await second.do("image", "open", "d", "--fenced", "host1")
        changes = await two.changes("d", point)
        assert changes.exact is False
        assert 0 < changes.over_report_bytes <= MiB
        assert any(start <= 3 * MiB < start + length for start, length in changes.extents)
        assert sum(length for _, length in changes.extents) <= MiB
        # host1 boots again: what was its own is not any more.
        shared.hosts["host1"].reboot()
        await first.start()
        shown = await first.json("image", "show", "d")
        assert (shown["state"], shown["owner"]["daemon"], shown["owner"]["host"]) == (
            "elsewhere",
            "n2",
            "host2",
        )
        assert "served by diskd n2" in await one.refuses_open("d", "host2")
        # A clean stop needs no word: everything of it is durable, and it says so.
        await qemu_io(f"{second.nbd}/d", "write -P 2 9M 4k")
        assert await second.end() == 0
        closed = await one.show("d")
        assert closed.owner is not None
        assert (closed.state, closed.owner.state) == ("elsewhere", "closed")
        await one.open("d")
        again = await one.changes("d", point)
        assert sum(length for _, length in again.extents) <= MiB + 4 * KiB


async def test_daemons_that_start_at_once_share_the_images_out(tmp_path: Path) -> None:
    """Whatever the race, each image has one owner; two of one name are not served at all."""
    async with storage(tmp_path) as shared:
        first = await shared.start("n0", "host0")
        names = [f"d{number}" for number in range(6)]
        for name in names:
            await Control(first).create(name, MiB)
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
            for info in await Control(daemon).images():
                assert info.state in ("open", "elsewhere"), info
                if info.state == "open":
                    owned.append(info.name)
                    assert info.owner is not None
                    assert info.owner.daemon == daemon.arguments[1]
        assert sorted(owned) == names
        namesake = shared.daemon("n1", "host4")
        with pytest.raises(AssertionError, match="a diskd named n1 serves this root already"):
            await namesake.start()


async def test_openers_that_race_have_one_winner(tmp_path: Path) -> None:
    async with storage(tmp_path) as shared:
        first = Control(await shared.start("n0", "host0"))
        await first.create("d", MiB)
        openers = [Control(await shared.start(f"n{number}", f"host{number}")) for number in (1, 2)]
        for _ in range(10):
            await first.release("d")
            refused: list[Control] = []

            async def attempt(opener: Control, refused: list[Control]) -> None:
                try:
                    await opener.open("d")
                except OperatorError:
                    refused.append(opener)

            async with trio.open_nursery() as nursery:
                for opener in openers:
                    nursery.start_soon(attempt, opener, refused)
            (winner,) = [opener for opener in openers if opener not in refused]
            for opener in openers:
                shown = await opener.show("d")
                assert shown.owner is not None
                assert shown.owner.daemon == winner.daemon.arguments[1]
                assert (shown.state == "open") == (opener is winner)
            await winner.release("d")
            await first.open("d")


async def test_who_finds_the_image_taken_away_stops_serving_it(tmp_path: Path) -> None:
    """An operator lied: the fenced host was alive. Or somebody removed the lock."""
    need("qemu-io")
    async with storage(tmp_path) as shared:
        first = await shared.start("n1", "host1")
        one = Control(first)
        for name in ("d", "e"):
            await one.create(name, 16 * MiB)
        await one.acquire("d", 3)
        # Storage that passes no locks on between hosts: the lock of host1 is not seen on host2.
        for name in ("d", "e"):
            lock = shared.root / "images" / name / "owner.lock"
            lock.rename(lock.with_name("hidden"))
            lock.touch()
        with trio.fail_after(20):
            while {info.state for info in await one.images()} != {"damaged"}:  # noqa: ASYNC110 - a process
                await trio.sleep(0.05)
        assert "its lock is gone" in ((await one.show("d")).reason or "")
        assert "image.lost" in first.log()
        assert (await run("qemu-io", "-f", "raw", "-c", "read 0 512", f"{first.nbd}/d@3")).code != 0
        assert "damaged" in await one.refuses_acquire("d", 9)
        two = Control(await shared.start("n2", "host2"))
        await two.open("d", "host1")
        await two.acquire("d", 4)
        shown = await one.show("d")
        assert shown.owner is not None
        assert (shown.state, shown.owner.daemon, shown.epoch) == ("elsewhere", "n2", 4)
        assert (await one.ask(LEASE_SHOW, ImageName("d"))).epoch == 4
        assert "diskd n2" in await one.refuses_acquire("d", 9)
        # Nothing was lost but the service: e is its own still, and is opened again.
        await one.open("e")
        await qemu_io(f"{first.nbd}/e", "write -P 1 0 64k", "read -P 1 0 64k")
        assert await first.end() == 0
        assert "Traceback" not in first.log()

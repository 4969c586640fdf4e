"""One diskd per host over shared storage, as a cluster uses them: a lease brings its image along."""

import signal
from pathlib import Path

import pytest
from diskd_storage import Control, qemu_io, storage
from programs import good, need, run

from daemonkit.diskd_api import IMAGE_ACTIVITY, LEASE_SHOW, ImageName, ImageNames
from diskd.core import calls

pytestmark = [pytest.mark.interop, pytest.mark.slow]

KiB, MiB = 1 << 10, 1 << 20


async def test_a_lease_brings_its_image_along_and_fences_the_run_there(tmp_path: Path) -> None:
    need("qemu-io")
    async with storage(tmp_path) as shared:
        one = Control(await shared.start("n1", "host1"))
        two = Control(await shared.start("n2", "host2"))
        await one.create("d", 16 * MiB)
        point = await one.point("d")
        written: list[tuple[int, int]] = []
        here, there = one, two
        for epoch in (1, 2, 3, 4):
            await here.take("d", epoch)
            await qemu_io(f"{here.daemon.nbd}/d@{epoch}", f"write -P {epoch} {epoch}M 4k")
            written.append((epoch * MiB, 4 * KiB))
            assert await here.exact("d", point) == written
            # The other host's daemon knows what the storage says, and serves nothing of it.
            assert (await there.ask(LEASE_SHOW, ImageName("d"))).epoch == epoch
            (seen,) = (await there.ask(IMAGE_ACTIVITY, ImageNames(["d"]))).images
            assert (seen.epoch, seen.connections, seen.last_io_age_ns) == (epoch, 0, None)
            assert (
                await run("qemu-io", "-f", "raw", "-c", "read 0 4k", f"{there.daemon.nbd}/d@{epoch}")
            ).code
            refused = await there.refuses_acquire("d", epoch + 1)  # without the word to bring it
            assert f"diskd {'n1' if here is one else 'n2'} on host" in refused
            assert f"epoch {epoch} is refused" in await there.refuses_take("d", epoch, holder="another")
            assert (await here.show("d")).state == "open"
            here, there = there, here
        for control in (one, two):
            assert await control.daemon.end() == 0
            assert "Traceback" not in control.daemon.log()


async def test_a_checkpoint_goes_along_and_is_merged_there(tmp_path: Path) -> None:
    need("qemu-io")
    async with storage(tmp_path) as shared:
        one = Control(await shared.start("n1", "host1"))
        two = Control(await shared.start("n2", "host2"))
        await one.create("d", 16 * MiB)
        base = await one.point("d")
        await one.take("d", 1)
        disk = calls.BackupDisk("d", "d")
        begun = await one.ask(calls.CHECKPOINT_BEGIN, calls.BeginCheckpoint("vm", [disk]))
        await qemu_io(f"{one.daemon.nbd}/d@1", "write -P 7 5M 64k")
        await two.take("d", 2)
        assert (await one.ask(calls.CHECKPOINT_LIST, calls.Nothing())).checkpoints == []
        await qemu_io(f"{two.daemon.nbd}/d@2", "read -P 7 5M 64k", "write -P 8 6M 4k")
        (found,) = (await two.ask(calls.CHECKPOINT_LIST, calls.Nothing())).checkpoints
        assert (found.checkpoint, found.state) == (begun.checkpoint, "sealed")
        frozen = f"{two.daemon.nbd}/{found.exports['d']}"
        await good("qemu-io", "-r", "-f", "raw", "-c", "read -P 0 5M 64k", frozen)
        await two.ask(calls.CHECKPOINT_END, calls.EndCheckpoint(begun.checkpoint, "keep"))
        assert await two.exact("d", begun.point) == [(5 * MiB, 64 * KiB), (6 * MiB, 4 * KiB)]
        assert await two.exact("d", base) == [(5 * MiB, 64 * KiB), (6 * MiB, 4 * KiB)]


async def test_from_a_dead_host_only_with_a_proof_of_that_boot(tmp_path: Path) -> None:
    need("qemu-io")
    async with storage(tmp_path) as shared:
        one = Control(await shared.start("n1", "host1"))
        two = Control(await shared.start("n2", "host2"))
        await one.create("d", 16 * MiB)
        point = await one.point("d")
        await one.take("d", 1)
        await qemu_io(f"{one.daemon.nbd}/d@1", "write -P 1 1M 4k", "flush")
        await one.daemon.end(signal.SIGKILL)
        boot = shared.hosts["host1"].boot_id
        refused = await two.refuses_take("d", 2)
        assert "belongs to diskd n1 on host host1" in refused
        assert f"{one.daemon.ready['control']} says: cannot connect" in refused
        assert "belongs to" in await two.refuses_take("d", 2, "00000000-0000-4000-8000-000000000000")
        assert (await two.ask(LEASE_SHOW, ImageName("d"))).epoch == 1
        await two.take("d", 2, boot)
        changes = await two.changes("d", point)
        assert not changes.exact
        assert any(start <= MiB < start + length for start, length in changes.extents)
        # It comes back, under another boot: the image is not its own any more, and is handed back when asked.
        shared.hosts["host1"].reboot()
        await one.daemon.start()
        assert (await one.show("d")).state == "elsewhere"
        await one.take("d", 3, boot)
        assert (await one.show("d")).state == "open"
        assert (await two.show("d")).state == "elsewhere"

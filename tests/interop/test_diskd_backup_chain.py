"""The whole path with real processes and stock tools: qemu-io writes, diskctl backs up, qemu-img judges."""

import json
import subprocess
from functools import partial

import pytest
import trio
from diskd_process import diskd
from diskd_target import start_deaf_proxy
from diskd_target_process import BINARIES, target_process
from programs import good, need

pytestmark = [pytest.mark.interop, pytest.mark.slow]

WRITES = ["write -P 1 0 8M", "write -P 2 20M 64k"]
CHANGES = ["write -P 3 1M 12k", "write -z 4M 1M", "discard 6M 128k", "write -P 4 32M 4k"]


def commands(lines):
    return [part for line in lines for part in ("-c", line)]


async def points_of(daemon, target):
    listed = json.loads(await daemon.do("target", "list", "--json", "--target", str(target.address)))
    return [point["point"] for point in listed]


async def check_point(repository, point, disk, live):
    """The chain is clean, and as of ``point`` identical with the image as it is now."""
    path = repository / "web" / point / f"{disk}.qcow2"
    await good("qemu-img", "check", str(path))
    compared = await good("qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(path), live)
    assert "identical" in compared.out


async def test_backup_twice_and_everything_after(tmp_path):
    for program in ("qemu-img", "qemu-io"):
        need(program)
    repository = tmp_path / "repository"
    async with diskd(tmp_path / "disks") as daemon, target_process(repository) as target:
        to = ("--target", str(target.address))
        live = f"{daemon.nbd}/system"
        config = tmp_path / "web.toml"
        config.write_text('name = "web"\n[[disks]]\nname = "root"\nimage = "system"\n')
        await daemon.do("image", "create", "system", "64MiB")
        await good("qemu-io", "-f", "raw", *commands(WRITES), live)
        lines = (
            await daemon.do("backup", "--vm", "web", "--config", str(config), "--json", *to)
        ).splitlines()
        first = json.loads(lines[-1])
        assert (first["kind"], first["base"]) == ("full", None)
        assert first["disks"][0]["sent_bytes"] == (8 << 20) + (64 << 10)
        await check_point(repository, first["point"], "root", live)

        await good("qemu-io", "-f", "raw", *commands(CHANGES), live)
        out = await daemon.do("backup", "--vm", "web", "--config", str(config), "--json", *to)
        second = json.loads(out.splitlines()[-1])
        assert (second["kind"], second["base"]) == ("differential", first["point"])
        assert second["disks"][0]["exact"]
        changed = (12 << 10) + (1 << 20) + (128 << 10) + (4 << 10)
        assert second["disks"][0]["changed_bytes"] == changed
        assert second["disks"][0]["sent_bytes"] == 16 << 10
        await check_point(repository, second["point"], "root", live)
        await good("qemu-img", "check", str(repository / "web" / first["point"] / "root.qcow2"))
        size = (repository / "web" / second["point"] / "root.qcow2").stat().st_size
        assert size < 128 << 10

        for disk_format in ("raw", "qcow2"):
            out = tmp_path / f"restored-{disk_format}"
            await daemon.do(
                "target", "restore", "web", second["point"], "--to", str(out), "--format", disk_format, *to
            )
            file = str(out / f"root.{disk_format}")
            await good("qemu-img", "compare", "-f", disk_format, "-F", "raw", file, live)
            assert (out / "vm.toml").read_text() == config.read_text()
        await good("qemu-img", "check", str(tmp_path / "restored-qcow2" / "root.qcow2"))

        argv = ["target", "serve", "web", second["point"], "--nbd", "127.0.0.1:0", "--json", *to]
        async with trio.open_nursery() as nursery:
            start = partial(
                trio.run_process, [BINARIES / "diskctl", *argv], stdout=subprocess.PIPE, check=False
            )
            process = await nursery.start(start)
            line = b""
            with trio.fail_after(30):
                while not line.endswith(b"\n"):
                    line += await process.stdout.receive_some(4096)
            served = json.loads(line)["exports"]["root"]
            await good("qemu-img", "compare", "-f", "raw", "-F", "raw", served, live)
            process.terminate()
            await process.stdout.aclose()

        await daemon.do("target", "synthesize", "web", second["point"], *to)
        await check_point(repository, second["point"], "root", live)
        assert (
            "backing"
            not in (
                await good("qemu-img", "info", str(repository / "web" / second["point"] / "root.qcow2"))
            ).out
        )
        await daemon.do("target", "verify", *to)
        assert await points_of(daemon, target) == [first["point"], second["point"]]
        prune = ("target", "prune", "web", "--keep-last", "1", *to)
        assert f"{first['point']}: would be removed" in await daemon.do(
            *prune, "--dry-run", "--keep-daily", "1"
        )
        assert json.loads((await daemon.do(*prune, "--json")).splitlines()[-1])["removed"] == [first["point"]]
        await check_point(repository, second["point"], "root", live)
        assert await points_of(daemon, target) == [second["point"]]


async def test_refusals_are_one_line(tmp_path):
    async with diskd(tmp_path / "disks") as daemon, target_process(tmp_path / "repository") as target:
        to = ("--target", str(target.address))
        await daemon.do("image", "create", "d", "1MiB")
        backup = ("backup", "--vm", "d", "--image", "d", *to)
        assert "--full" in await daemon.refuses(*backup, "--since", "rp-" + "0" * 16)
        assert "no interrupted backup" in await daemon.refuses(*backup, "--resume")
        assert "nowhere" in await daemon.refuses("backup", "--vm", "d", "--image", "nowhere", *to)
        assert "take a backup first" in await daemon.refuses("target", "audit", "d", *to)
        assert "point" in await daemon.refuses("target", "serve", "d", "p", "--nbd", "127.0.0.1:0", *to)
        assert "no VM" in await daemon.refuses("target", "verify", "d", *to)
        assert "no VM" in await daemon.refuses("target", "prune", "d", "--keep-last", "1", *to)
        assert "point" in await daemon.refuses("target", "synthesize", "d", "rp-" + "0" * 16, *to)
        out = str(tmp_path / "out")
        assert "point" in await daemon.refuses("target", "restore", "d", "rp-" + "0" * 16, "--to", out, *to)
        await daemon.do(*backup)
        path = next((tmp_path / "repository" / "d").glob("rp-*/d.qcow2"))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        assert "d.qcow2" in await daemon.refuses("target", "verify", *to)


@pytest.mark.parametrize("options", [(), ("--compress",), ("--compress-level", "9")])
async def test_export_and_apply(tmp_path, options):
    need("qemu-io")
    async with diskd(tmp_path / "disks") as daemon:
        live = f"{daemon.nbd}/d"
        await daemon.do("image", "create", "d", "8MiB")
        await good("qemu-io", "-f", "raw", *commands(["write -P 7 1M 1M"]), live)
        full, change, raw = (str(tmp_path / name) for name in ("full", "change", "raw"))
        await daemon.do("export", "d", "--full", "-o", full, *options)
        assert ((await trio.Path(full).stat()).st_size < 10000) is bool(options)
        point = (await daemon.json("point", "list", "d"))[-1]["point"]
        await good("qemu-io", "-f", "raw", *commands(["write -P 8 1M 8k", "discard 1536k 64k"]), live)
        await daemon.do("export", "d", "--since", point, "-o", change, *options)
        await daemon.do("apply", full, raw)
        await daemon.do("apply", change, raw)
        await good("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, live)
        assert "full backup" in await daemon.refuses(
            "export", "d", "--since", "rp-" + "0" * 16, "-o", raw + "2"
        )
        assert "exists already" in await daemon.refuses("export", "d", "--full", "-o", full)


async def test_a_lost_acknowledgement_is_settled_at_the_next_contact(tmp_path, nursery):
    """B3 with real processes: the target committed, its answer was swallowed; nothing is sent twice."""
    need("qemu-io")
    async with diskd(tmp_path / "disks") as daemon, target_process(tmp_path / "repository") as target:
        proxy, swallow = await start_deaf_proxy(nursery, target.address)
        live = f"{daemon.nbd}/d"
        await daemon.do("image", "create", "d", "8MiB")
        await good("qemu-io", "-f", "raw", *commands(["write -P 1 0 2M"]), live)
        swallow.append(True)
        await daemon.refuses(
            "backup", "--vm", "web", "--image", "d", "--target", str(proxy), "--retry-for", "0s"
        )
        swallow.clear()
        [lost] = await points_of(daemon, target)
        await good("qemu-io", "-f", "raw", *commands(["write -P 2 64k 8k"]), live)
        to = ("--target", str(target.address))
        out = await daemon.do("backup", "--vm", "web", "--image", "d", "--json", *to)
        done = json.loads(out.splitlines()[-1])
        assert done["base"] == lost
        assert done["disks"][0]["changed_bytes"] == 8 << 10
        await check_point(tmp_path / "repository", done["point"], "d", live)

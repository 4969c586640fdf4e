"""A real diskd grows images: stock clients see it, old points cover it, a backup across it is exact."""

import json
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio
from diskd_process import DiskdProcess, diskd
from diskd_target_process import target_process
from programs import good, need

pytestmark = [pytest.mark.interop, pytest.mark.slow]

MiB = 1 << 20


async def qemu_io(url: str, *commands: str) -> None:
    arguments = [part for command in commands for part in ("-c", command)]
    await good("qemu-io", "-f", "raw", *arguments, url)


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(30):
        while not condition():
            await trio.lowlevel.checkpoint()


def begun_or_grown(directory: Path, size_bytes: int, begun: bool) -> bool:
    return (directory / "disk.raw").stat().st_size > size_bytes or (begun and (directory / "resize").exists())


async def merged(daemon: DiskdProcess, image: str) -> None:
    with trio.fail_after(30):
        while (await daemon.json("image", "show", image))["checkpoint"] is not None:
            continue


async def test_a_grown_image_and_its_points(tmp_path: Path) -> None:
    need("qemu-io")
    need("nbdinfo")
    async with diskd(tmp_path / "root") as daemon:
        url = f"{daemon.nbd}/d"
        await daemon.do("image", "create", "d", "64MiB")
        begun = await daemon.json("checkpoint", "begin", "--vm", "vm", "--image", "d")
        assert begun["checkpoint"] in await daemon.refuses("image", "resize", "d", "128MiB")
        await daemon.do("checkpoint", "end", begun["checkpoint"], "--keep-point")
        await qemu_io(url, "write -P 1 1M 4k")
        await merged(daemon, "d")
        assert (await daemon.json("image", "resize", "d", "200MiB"))["size"] == 200 * MiB
        assert "has 200MiB" in await daemon.do("image", "resize", "d", "200MiB")
        assert "cannot shrink" in await daemon.refuses("image", "resize", "d", "64MiB")
        assert (await good("nbdinfo", "--size", url)).out.strip() == str(200 * MiB)
        await qemu_io(url, "read -P 1 1M 4k", "read -P 0 64M 136M", "write -P 2 199M 1M")
        expected = [[MiB, 4096], [64 * MiB, 136 * MiB]]
        assert (await daemon.json("changes", "d", "--since", begun["point"]))["extents"] == expected
        await daemon.end(signal.SIGKILL)
        await daemon.start()
        changes = await daemon.json("changes", "d", "--since", begun["point"])
        assert (changes["extents"], changes["exact"]) == (expected, True)
        await qemu_io(f"{daemon.nbd}/d", "read -P 2 199M 1M")
        raw = tmp_path / "root" / "images" / "d" / "disk.raw"
        assert raw.stat().st_size == 200 * MiB
        assert await daemon.end() == 0


async def test_a_differential_across_a_resize_restores_exactly(tmp_path: Path) -> None:
    for program in ("qemu-img", "qemu-io"):
        need(program)
    repository = tmp_path / "repository"
    async with diskd(tmp_path / "disks") as daemon, target_process(repository) as target:
        to = ("--target", str(target.address))
        vm = ("--vm", "web", "--image", "d")
        live = f"{daemon.nbd}/d"
        await daemon.do("image", "create", "d", "40MiB")
        await qemu_io(live, "write -P 1 0 6M", "write -P 2 39M 1M")
        backups = [json.loads((await daemon.do("backup", *vm, "--json", *to)).splitlines()[-1])]
        for size, written in (("99999744", "write -P 3 41M 64k"), ("1GiB", "write -P 4 1023M 1M")):
            await merged(daemon, "d")
            await daemon.do("image", "resize", "d", size)
            await qemu_io(live, written, "write -P 5 2M 4k")
            backups.append(json.loads((await daemon.do("backup", *vm, "--json", *to)).splitlines()[-1]))
            assert backups[-1]["kind"] == "differential"
            assert backups[-1]["base"] == backups[-2]["point"]
            assert backups[-1]["disks"][0]["sent_bytes"] < 4 * MiB, "what was never written is not sent"
        last = backups[-1]["point"]
        path = repository / "web" / last / "d.qcow2"
        await good("qemu-img", "check", str(path))
        assert (
            "identical"
            in (await good("qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(path), live)).out
        )
        await daemon.do("target", "verify", "web", *to)
        for point, size in zip(backups, (40 * MiB, 99999744, 1024 * MiB), strict=True):
            out = tmp_path / point["point"]
            await daemon.do("target", "restore", "web", point["point"], "--to", str(out), *to)
            assert (out / "d.raw").stat().st_size == size
        await good("qemu-img", "compare", "-f", "raw", "-F", "raw", str(tmp_path / last / "d.raw"), live)
        await daemon.do("target", "synthesize", "web", last, *to)
        await good("qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(path), live)


async def test_a_kill_in_the_middle_of_a_resize(tmp_path: Path) -> None:
    need("qemu-io")
    async with diskd(tmp_path / "root") as daemon:
        await daemon.do("image", "create", "d", "64MiB")
        begun = await daemon.json("checkpoint", "begin", "--vm", "vm", "--image", "d")
        await daemon.do("checkpoint", "end", begun["checkpoint"], "--keep-point")
        await qemu_io(f"{daemon.nbd}/d", "write -P 7 3M 4k")
        await merged(daemon, "d")
        directory = tmp_path / "root" / "images" / "d"
        size = 64
        for step in range(6):
            before, size = size, size + 64 * (step + 1)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(daemon.ctl, "image", "resize", "d", f"{size}MiB")
                # Every other time as soon as it is bound to happen, else once the raw file has grown.
                await until(partial(begun_or_grown, directory, before * MiB, step % 2 == 0))
                await daemon.end(signal.SIGKILL)
            await daemon.start()
            assert (await daemon.json("image", "show", "d"))["size"] == size * MiB
            assert (directory / "disk.raw").stat().st_size == size * MiB
            assert not (directory / "resize").exists()
            changes = await daemon.json("changes", "d", "--since", begun["point"])
            assert changes["exact"]
            assert changes["extents"] == [[3 * MiB, 4096], [64 * MiB, (size - 64) * MiB]]
        assert await daemon.end() == 0

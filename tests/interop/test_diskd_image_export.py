"""Exporting images as disk files: every format, from under a guest that goes on writing, and in pipes."""

import json
import os
import random
import signal
import subprocess
from pathlib import Path

import pytest
import trio
from diskd_process import BINARIES, SECONDS_MAX, DiskdProcess, diskd
from programs import good

from daemonkit.units import KiB, MiB

pytestmark = [pytest.mark.interop, pytest.mark.slow]

SIZE = 20 * MiB
FORMATS = ("raw", "qcow2", "vmdk", "vhdx", "vdi")


def raw_disk(path: Path, *, full: bool = False) -> Path:
    with path.open("wb") as file:
        if full:
            file.write(random.Random(3).randbytes(SIZE))
        file.truncate(SIZE)
        file.seek(3 * MiB + 512)
        file.write(random.Random(2).randbytes(300 * KiB))
        file.seek(SIZE - 512)
        file.write(b"end!" * 128)
    return path


def control(daemon: DiskdProcess, *arguments: str) -> list[str]:
    return [str(BINARIES / "diskctl"), "--control", daemon.ready["control"], *arguments]


async def until(condition) -> None:
    with trio.fail_after(SECONDS_MAX):
        while not await condition():  # noqa: ASYNC110 - what is waited for lies in another process
            await trio.sleep(0.02)


async def test_every_format_holds_the_disk_and_nothing_stays_behind(tmp_path):
    raw = raw_disk(tmp_path / "disk.raw")
    out = tmp_path / "out"
    out.mkdir()
    async with diskd(tmp_path / "root") as daemon:
        await daemon.do("image", "import", "a", str(raw))
        for kind in FORMATS:
            path = out / f"web.{kind}"
            lines = (await daemon.do("image", "export", "a", str(path), "--json")).splitlines()
            assert json.loads(lines[-1])["format"] == kind
            await good("qemu-img", "compare", "-f", "raw", "-F", kind, str(raw), str(path))
            assert path.stat().st_blocks * 512 < 12 * MiB, kind  # a VHDX has blocks of 8 MiB
        assert (out / "web.raw").stat().st_blocks * 512 < MiB
        await good("qemu-img", "check", "-f", "qcow2", str(out / "web.qcow2"))
        assert b'"web.vmdk"' in (out / "web.vmdk").read_bytes()[:2048], "a VMDK contains its own name"
        assert sorted(os.listdir(out)) == sorted(f"web.{kind}" for kind in FORMATS)
        # At the source it is as if nothing had been.
        assert await daemon.json("point", "list", "a") == []

        async def merged() -> bool:
            return await daemon.json("checkpoint", "list") == []

        await until(merged)


async def test_a_copy_is_of_one_instant_while_the_guest_writes_on(tmp_path):
    """The pipe is not read before the guest has overwritten everything: the copy is of before. (There
    is more of it than the stream's window and all buffers on the way hold.)"""
    raw = raw_disk(tmp_path / "disk.raw", full=True)
    async with diskd(tmp_path / "root") as daemon:
        await daemon.do("image", "import", "a", str(raw))
        process = await trio.lowlevel.open_process(
            control(daemon, "image", "export", "a", "-"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None and process.stderr is not None
        copy = bytearray(await process.stdout.receive_some(1))
        await good("qemu-io", "-f", "raw", "-c", "write -P 9 0 20M", f"{daemon.nbd}/a")
        async for part in process.stdout:
            copy += part
        said = b"".join([part async for part in process.stderr])
        assert await process.wait() == 0 and said.endswith(b"of raw in -\n")
        await process.stderr.aclose()
        assert bytes(copy) == raw.read_bytes()
        await good("qemu-io", "-f", "raw", "-c", "read -P 9 0 20M", f"{daemon.nbd}/a")


async def test_what_exists_is_replaced_only_by_force_and_only_by_a_whole_copy(tmp_path):
    raw = raw_disk(tmp_path / "disk.raw")
    there = tmp_path / "there.qcow2"
    there.write_text("mine")
    async with diskd(tmp_path / "root") as daemon:
        await daemon.do("image", "import", "a", str(raw))
        for arguments, why in (
            (("a", str(there)), "use --force"),
            (("a", str(tmp_path)), "is a directory"),
            (("a", "/dev/null", "--force"), "no plain file"),
            (("a", str(tmp_path / "no" / "where")), "cannot be written"),
            (("absent", str(tmp_path / "b.raw")), "image 'absent'"),
            (("absent", str(tmp_path / "b.vdi")), "image 'absent'"),
            (("absent", str(there), "--force"), "image 'absent'"),
            (("a", "-", "--format", "vdi"), "into a pipe"),
        ):
            assert why in await daemon.refuses("image", "export", *arguments), arguments
        assert there.read_text() == "mine"
        await daemon.do("image", "export", "a", str(there), "--force")
        await good("qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(raw), str(there))
        assert sorted(os.listdir(tmp_path)) == ["disk.raw", "root", "root.log", "there.qcow2"]


@pytest.mark.parametrize("kind", ["raw", "vdi"])
async def test_an_interrupted_export_leaves_neither_file_nor_checkpoint(kind, tmp_path):
    """A pipe that nobody reads stops the raw one; qemu-img is slowed down to nothing by a stopped diskd."""
    raw = raw_disk(tmp_path / "disk.raw")
    out = tmp_path / "out"
    out.mkdir()
    async with diskd(tmp_path / "root") as daemon:
        await daemon.do("image", "import", "a", str(raw))
        target = "-" if kind == "raw" else str(out / "a.vdi")
        process = await trio.lowlevel.open_process(
            control(daemon, "image", "export", "a", target), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

        async def frozen() -> bool:
            return len(await daemon.json("checkpoint", "list")) == 1 or process.poll() is not None

        await until(frozen)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL if kind == "raw" else signal.SIGINT)
        assert process.stdout is not None
        await process.wait()
        await process.stdout.aclose()

        async def merged() -> bool:
            return await daemon.json("checkpoint", "list") == []

        await until(merged)
        assert await daemon.json("point", "list", "a") == []
        if process.returncode:
            assert os.listdir(out) == []

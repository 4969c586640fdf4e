"""Importing images: each format as qemu-img makes it, pipes, and files that want to be refused."""

import json
import os
import random
import signal
import subprocess
from pathlib import Path

import pytest
import trio
from diskd_library import until
from diskd_process import BINARIES, SECONDS_MAX, DiskdProcess, diskd
from programs import good, need

from daemonkit.units import KiB, MiB

pytestmark = [pytest.mark.interop, pytest.mark.slow]

SIZE = 20 * MiB


def raw_disk(path: Path, *, size: int = SIZE) -> Path:
    """Mostly holes, some data, and blocks of written zeroes."""
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(3 * MiB + 700)
        file.write(random.Random(1).randbytes(300 * KiB))
        file.seek(8 * MiB)
        file.write(bytes(4 * MiB))
        file.seek(size - 512)
        file.write(b"end" * 170)
    return path


async def same(daemon: DiskdProcess, name: str, raw: Path) -> None:
    await good("qemu-img", "compare", "-f", "raw", "-F", "raw", str(raw), f"{daemon.nbd}/{name}")


def left_over(root: Path) -> list[str]:
    return sorted(os.listdir(root / "images"))


async def piped(daemon: DiskdProcess, name: str, source: Path, *arguments: str):
    argv = [str(BINARIES / "diskctl"), "--control", daemon.ready["control"], "image", "import", name, "-"]
    with source.open("rb") as file, trio.fail_after(SECONDS_MAX):
        return await trio.run_process(
            [*argv, *arguments], stdin=file, capture_stdout=True, capture_stderr=True, check=False
        )


VARIANTS = {
    "raw": ("raw",),
    "qcow2": ("qcow2",),
    "old": ("qcow2", "-o", "compat=0.10"),
    "vhdx": ("vhdx",),
    "vmdk": ("vmdk",),
    "stream": ("vmdk", "-o", "subformat=streamOptimized"),
    "vdi": ("vdi",),
}


async def test_every_format_arrives_whole_sparse_and_tracked(tmp_path):
    raw = raw_disk(tmp_path / "disk.raw")
    async with diskd(tmp_path / "root") as daemon:
        for name, (kind, *options) in VARIANTS.items():
            source = tmp_path / f"{name} named after nothing"
            await good("qemu-img", "convert", "-f", "raw", "-O", kind, *options, str(raw), str(source))
            lines = (await daemon.do("image", "import", name, str(source), "--json")).splitlines()
            document = json.loads(lines[-1])
            assert all(json.loads(line)["progress"]["total_bytes"] == SIZE for line in lines[:-1])
            # A VMDK has whole grains of 64 KiB, a VDI whole mebibytes: 20 MiB is both.
            assert document["size"] == SIZE and document["allocated"] < MiB and document["points"] == 0, name
            await same(daemon, name, raw)
        assert left_over(daemon.root) == sorted(VARIANTS)
        # From here on everything is tracked: a point, one block, and exactly that block.
        begun = await daemon.json("checkpoint", "begin", "--vm", "a", "--image", *VARIANTS)
        await daemon.do("checkpoint", "end", begun["checkpoint"], "--keep-point")
        for name in VARIANTS:
            await good("qemu-io", "-f", "raw", "-c", "write -P 7 1M 4k", f"{daemon.nbd}/{name}")
            changes = await daemon.json("changes", name, "--since", begun["point"])
            assert changes["extents"] == [[MiB, 4 * KiB]] and changes["exact"], name
        opened = [json.loads(line) for line in daemon.log().splitlines() if '"image.opened"' in line]
        assert {line["how"] for line in opened} == {"clean"}, "the side files fit the raw file from the start"


async def test_a_raw_disk_comes_through_a_pipe(tmp_path):
    raw = raw_disk(tmp_path / "disk.raw", size=SIZE + 512)
    async with diskd(tmp_path / "root") as daemon:
        control = daemon.ready["control"]
        script = f"cat {raw} | {BINARIES / 'diskctl'} --control {control} image import a -"
        done = await trio.run_process(["sh", "-c", script], capture_stdout=True, capture_stderr=True)
        assert done.stdout.decode() == "image a of 20.0MiB imported\n" and done.stderr == b""
        await same(daemon, "a", raw)
        assert (await daemon.json("image", "show", "a"))["allocated"] < MiB
        # From a redirected file too, whose holes are not even read.
        assert (await piped(daemon, "b", raw, "--json")).returncode == 0
        await same(daemon, "b", raw)


async def test_what_a_pipe_cannot_carry_is_refused_with_the_reason(tmp_path):
    qcow2, empty = tmp_path / "a.qcow2", tmp_path / "empty"
    empty.touch()
    async with diskd(tmp_path / "root") as daemon:
        await good("qemu-img", "create", "-f", "qcow2", str(qcow2), "1M")
        for source, why in ((qcow2, b"the pipe carries qcow2"), (empty, b"before its first byte")):
            done = await piped(daemon, "a", source)
            assert done.returncode == 1 and why in done.stderr and done.stderr.count(b"\n") == 1, done
        await daemon.do("image", "create", "b", "1MiB")
        done = await piped(daemon, "b", raw_disk(tmp_path / "disk.raw"))
        assert done.returncode == 1 and b"exists already" in done.stderr
        assert left_over(daemon.root) == ["b"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
async def test_half_an_import_leaves_nothing_behind(number, tmp_path):
    """The client is interrupted, or killed, in the middle of a pipe that goes on for ever."""
    async with diskd(tmp_path / "root") as daemon:
        argv = [str(BINARIES / "diskctl"), "--control", daemon.ready["control"], "image", "import", "a", "-"]
        process = await trio.lowlevel.open_process(argv, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdin is not None
        await process.stdin.send_all(b"data" * MiB)
        await until(lambda: list(daemon.root.glob("images/.new-a*/disk.raw")))
        process.send_signal(number)
        await process.wait()
        await process.stdin.aclose()
        assert process.returncode in (130, -number)
        await until(lambda: left_over(daemon.root) == [])
        assert await daemon.json("image", "list") == []


async def test_a_killed_daemon_leaves_half_an_import_to_its_successor(tmp_path):
    async with diskd(tmp_path / "root") as daemon:
        argv = [str(BINARIES / "diskctl"), "--control", daemon.ready["control"], "image", "import", "a", "-"]
        process = await trio.lowlevel.open_process(argv, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdin is not None and process.stderr is not None
        await process.stdin.send_all(b"data" * MiB)
        await until(lambda: list(daemon.root.glob("images/.new-a*/disk.raw")))
        await daemon.end(signal.SIGKILL)
        await process.stdin.aclose()
        assert await process.wait() == 1
        said = b"".join([part async for part in process.stderr])
        assert said.count(b"\n") == 1
        await process.stderr.aclose()
        await daemon.start()
        assert await daemon.json("image", "list") == [] and left_over(daemon.root) == []


SECRET = "root:$y$secret"


async def evil_files(folder: Path) -> dict[str, Path]:
    """Files whose content is meant to be somebody else's."""
    secret = folder / "shadow"
    secret.write_text(SECRET * 4096)
    evil = {}
    for name, arguments in {
        "backing": ["-b", str(secret), "-F", "raw"],
        "data": ["-o", f"data_file={folder / 'data'},data_file_raw=on"],
    }.items():
        evil[name] = folder / f"{name}.qcow2"
        await good("qemu-img", "create", "-f", "qcow2", *arguments, str(evil[name]), "1M")
    base, child = folder / "base.vmdk", folder / "child.vmdk"
    await good("qemu-img", "create", "-f", "vmdk", str(base), "1M")
    await good("qemu-img", "create", "-f", "vmdk", "-b", str(base), "-F", "vmdk", str(child))
    evil["parent"] = child
    flat = folder / "flat.vmdk"
    lines = ["# Disk DescriptorFile", "version=1", "CID=fffffffe", "parentCID=ffffffff"]
    flat.write_text("\n".join([*lines, 'createType="monolithicFlat"', f'RW 8 FLAT "{secret}" 0', ""]))
    evil["flat"] = flat
    # A sparse VMDK without a capacity makes QEMU read the extents' names from its embedded descriptor.
    embedded = folder / "embedded.vmdk"
    head = bytearray(base.read_bytes()[:512])
    head[12:20] = bytes(8)
    head[28:44] = (1).to_bytes(8, "little") + (2).to_bytes(8, "little")
    embedded.write_bytes(bytes(head) + flat.read_bytes().ljust(1024, b"\0"))
    evil["embedded"] = embedded
    return evil


async def test_files_that_lead_to_others_are_refused(tmp_path):
    evil = await evil_files(tmp_path)
    async with diskd(tmp_path / "root") as daemon:
        for name, path in evil.items():
            line = await daemon.refuses("image", "import", "a", str(path))
            assert "is not imported" in line, name
            assert left_over(daemon.root) == [], name


async def test_absurd_sizes_and_things_that_are_no_files_are_refused(tmp_path):
    huge, fifo, text = tmp_path / "huge.qcow2", tmp_path / "fifo", tmp_path / "text.qcow2"
    os.mkfifo(fifo)
    async with diskd(tmp_path / "root") as daemon:
        await good("qemu-img", "create", "-f", "qcow2", "-o", "cluster_size=2M", str(huge), "128T")
        text.write_bytes(b"QFI\xfb" + b"\0\0\0\3" + bytes(64) + bytes(range(200)))
        for source, why in (
            (huge, "at most 64TiB"),
            (fifo, "neither a file nor a block device"),
            (tmp_path, "neither a file nor a block device"),
            (tmp_path / "absent", "No such file"),
            (text, "is not imported"),
        ):
            assert why in await daemon.refuses("image", "import", "a", str(source))
        assert left_over(daemon.root) == []


async def test_without_qemu_img_the_package_is_named(tmp_path):
    need("qemu-img")
    source = tmp_path / "a.qcow2"
    await good("qemu-img", "create", "-f", "qcow2", str(source), "1M")
    empty = tmp_path / "bin"
    empty.mkdir()
    root = tmp_path / "root"
    root.mkdir()
    argv = [
        str(BINARIES / "diskd"),
        "run",
        "--root",
        str(root),
        "--nbd",
        "127.0.0.1:0",
        "--control",
        "127.0.0.1:0",
    ]
    env = {**os.environ, "PATH": str(empty)}
    process = await trio.lowlevel.open_process(
        argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        with trio.fail_after(SECONDS_MAX):
            ready = await process.stdout.receive_some(4096)
        control = ready.decode().split('"control": "')[1].split('"')[0]
        outcome = await run_ctl(control, "image", "import", "a", str(source))
        assert outcome.returncode == 1 and b"apt install qemu-utils" in outcome.stderr
    finally:
        process.terminate()
        await process.wait()
        await process.stdout.aclose()


async def run_ctl(control: str, *arguments: str):
    argv = [str(BINARIES / "diskctl"), "--control", control, *arguments]
    with trio.fail_after(SECONDS_MAX):
        return await trio.run_process(argv, capture_stdout=True, capture_stderr=True, check=False)

"""`diskd nbd`, started by the client over socket activation or as inetd does; fio and nbdkit as judges."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import nbd_client as client
import pytest
import trio
from diskd_process import BINARIES, diskd
from programs import good, need, run

pytestmark = [pytest.mark.interop, pytest.mark.slow]

MiB = 1 << 20
DISKD = str(BINARIES / "diskd")


def raw_file(path: Path, size: int = 8 * MiB) -> tuple[Path, bytes]:
    """A sparse file with data at its begin and end, and its bytes."""
    data = b"\x5a" * 65536 + bytes(size - 131072) + os.urandom(65536)
    with path.open("wb") as file:
        file.truncate(size)
        file.write(data[:65536])
        file.seek(size - 65536)
        file.write(data[-65536:])
    return path, data


def zeroes_fast(path: Path) -> bool:
    """By util-linux: whether the file system zeroes a range without writing it."""
    probe = path.with_name("probe")
    probe.write_bytes(b"x" * 8192)
    done = subprocess.run(["fallocate", "-z", "-n", "-l", "8192", probe], capture_output=True, check=False)
    return done.returncode == 0


async def test_a_raw_file_for_libnbds_tools(tmp_path: Path) -> None:
    need("nbdinfo")
    need("nbdcopy")
    path, data = raw_file(tmp_path / "disk.img")
    server = ["[", DISKD, "nbd", "--raw", str(path), "]"]
    assert (await good("nbdinfo", "--size", "--", *server)).out.strip() == str(len(data))
    assert zeroes_fast(path) == ((await run("nbdinfo", "--can", "fast-zero", "--", *server)).code == 0)
    copy = tmp_path / "copy.img"
    await good("nbdcopy", "--", *server, str(copy))
    assert copy.read_bytes() == data
    _, other = raw_file(copy)
    await good("nbdcopy", "--flush", "--", str(copy), *server)
    assert path.read_bytes() == other


async def test_a_map_of_many_extents_is_true(tmp_path: Path) -> None:
    """A fragmented disk has far more runs than one reply: no hole of it is called data."""
    need("nbdinfo")
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(128 * MiB)
        for index in range(6000):
            os.pwrite(file.fileno(), b"x" * 4096, index * 16384)
    mapped = await good("nbdinfo", "--json", "--map", "--", "[", DISKD, "nbd", "--raw", str(path), "]")
    runs = json.loads(mapped.out)
    assert sum(run["length"] for run in runs) == 128 * MiB
    assert [run["offset"] for run in runs if run["type"] == 0] == [index * 16384 for index in range(6000)]
    assert {run["length"] for run in runs if run["type"] == 0} == {4096}


async def test_an_image_by_its_name_or_none(tmp_path: Path) -> None:
    need("nbdcopy")
    async with diskd(tmp_path / "root") as daemon:
        await daemon.json("image", "create", "d", "8MiB")
        assert await daemon.end() == 0
    path, data = raw_file(tmp_path / "disk.img")
    server = ["[", DISKD, "nbd", "--root", str(tmp_path / "root"), "--image", "d", "]"]
    await good("nbdcopy", "--", str(path), *server)
    listed = await good("nbdinfo", "--list", "--", *server)
    assert 'export="d":' in listed.out
    async with diskd(tmp_path / "root") as daemon:
        copy = tmp_path / "copy.img"
        await good("nbdcopy", f"{daemon.nbd}/d", str(copy))
        assert copy.read_bytes() == data
        refused = await run(DISKD, "nbd", "--root", str(tmp_path / "root"), "--image", "d")
        assert refused.code == 1
        assert len(refused.err.splitlines()) == 1


async def test_one_connection_on_standard_input(tmp_path: Path) -> None:
    path, data = raw_file(tmp_path / "disk.img")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        argv = [DISKD, "nbd", "--raw", str(path)]
        process = await trio.lowlevel.open_process(argv, stdin=theirs.fileno(), stdout=subprocess.DEVNULL)
        theirs.close()
        try:
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
            read = client.request(client.READ, 0, 4096, cookie=3)
            with trio.fail_after(20):
                await stream.send_all(client.FIXED_NO_ZEROES + client.option(client.EXPORT_NAME) + read)
                await stream.send_all(client.request(client.DISC))
                received = b""
                while part := await stream.receive_some(65536):
                    received += part
                assert received.endswith(data[:4096])
                assert await process.wait() == 0
        finally:
            process.kill()


async def test_a_signal_ends_it(tmp_path: Path) -> None:
    path, _ = raw_file(tmp_path / "disk.img")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        argv = [DISKD, "nbd", "--raw", str(path)]
        process = await trio.lowlevel.open_process(argv, stdin=theirs.fileno(), stdout=subprocess.DEVNULL)
        theirs.close()
        try:
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
            with trio.fail_after(20):
                assert await stream.receive_some(1)  # the greeting: it serves
                process.send_signal(signal.SIGTERM)
                assert await process.wait() == 0
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a disk"),
        (["--raw", "x", "--image", "d"], "name a disk"),
        (["--raw", "disk.img", "--root", "."], "name a disk"),
        (["--raw", "nothing.img"], "standard input is not a connected socket"),
    ],
)
async def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    outcome = await run(DISKD, "nbd", *arguments)
    assert outcome.code == 1
    assert message in outcome.err
    assert len(outcome.err.splitlines()) == 1


async def test_a_wrong_activation_is_one_line(tmp_path: Path) -> None:
    path, _ = raw_file(tmp_path / "disk.img")
    script = f'LISTEN_PID=$$ LISTEN_FDS=1 exec "{DISKD}" nbd --raw "{path}" 3</dev/null'
    outcome = await run("sh", "-c", script)
    assert outcome.code == 1
    assert outcome.err == "diskd: LISTEN_FDS: descriptor 3 is not a listening socket\n"


ACTIVATE = """
import os, sys
listener, *argv = sys.argv[1:]
os.dup2(int(listener), 3)
os.execve(argv[0], argv, {**os.environ, "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"})
"""


async def test_diskd_run_takes_systemds_socket(tmp_path: Path) -> None:
    need("nbdinfo")
    (tmp_path / "root").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        argv = [sys.executable, "-c", ACTIVATE, str(listener.fileno()), DISKD, "run"]
        argv += ["--root", str(tmp_path / "root"), "--control", "127.0.0.1:0"]
        process = await trio.lowlevel.open_process(
            argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=(listener.fileno(),)
        )
        try:
            assert process.stdout is not None
            async with process.stdout:
                with trio.fail_after(30):
                    ready = json.loads(await process.stdout.receive_some(65536))
                assert ready["nbd"] == f"127.0.0.1:{listener.getsockname()[1]}"
                await good(
                    str(BINARIES / "diskctl"), "--control", ready["control"], "image", "create", "d", "8MiB"
                )
                assert (await good("nbdinfo", "--size", f"nbd://{ready['nbd']}/d")).out.strip() == str(
                    8 * MiB
                )
                process.send_signal(signal.SIGTERM)
                with trio.fail_after(20):
                    assert await process.wait() == 0
        finally:
            process.kill()


async def test_fio_verifies_what_it_wrote(tmp_path: Path) -> None:
    need("fio")
    if "nbd" not in (await good("fio", "--enghelp")).out:
        pytest.skip("this fio was built without its nbd engine")
    async with diskd(tmp_path / "root") as daemon:
        await daemon.json("image", "create", "d", "32MiB")
        job = [
            "--name=verify",
            "--ioengine=nbd",
            f"--uri={daemon.nbd}/d",
            "--rw=randwrite",
            "--bsrange=512-64k",
        ]
        job += [
            "--size=32m",
            "--io_size=8m",
            "--iodepth=16",
            "--verify=crc32c",
            "--do_verify=1",
            "--norandommap",
        ]
        outcome = await good("fio", *job, f"--aux-path={tmp_path}", "--output-format=terse", "--fsync=64")
        assert "verify:" not in outcome.err


async def test_nbdkits_sparse_random_survives_a_round_trip(tmp_path: Path) -> None:
    need("nbdkit")
    need("nbdcopy")
    async with diskd(tmp_path / "root") as daemon:
        await daemon.json("image", "create", "d", "64MiB")
        there = f'nbdcopy "$uri" {daemon.nbd}/d && nbdcopy {daemon.nbd}/d "$uri"'
        # The plugin refuses a write of anything that it would not have given itself.
        await good("nbdkit", "-U", "-", "sparse-random", "64M", "percent=20", "seed=7", "--run", there)
        mapped = await good("nbdinfo", "--map", "--totals", f"{daemon.nbd}/d")
        assert "hole,zero" in mapped.out

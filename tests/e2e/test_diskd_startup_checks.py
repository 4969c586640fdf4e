"""What keeps diskd from starting is named, with what to do; what will only hurt is in its log."""

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
from diskd_process import BINARIES, SECONDS_MAX, diskd

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
FREE = "127.0.0.1:0"


def refusal(*arguments: str) -> str:
    argv = [str(BINARIES / "diskd"), "run", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=SECONDS_MAX)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done
    assert done.stdout == ""
    return done.stderr


def test_a_port_in_use_is_named_with_a_way_out(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments in (
            ("--nbd", f"127.0.0.1:{port}", "--control", FREE),
            ("--control", f"127.0.0.1:{port}"),
        ):
            line = refusal("--root", str(tmp_path), "--nbd", FREE, *arguments)
            assert f"127.0.0.1:{port}" in line and "another process listens there" in line
    assert "no such address" in refusal("--root", str(tmp_path), "--nbd", "192.0.2.1:0", "--control", FREE)


def test_a_root_that_cannot_be_written_is_named(tmp_path):
    for root, why in ((Path("/proc/self"), "cannot be written"), (tmp_path / "absent", "no such directory")):
        assert why in refusal("--root", str(root), "--nbd", FREE, "--control", FREE)


async def test_what_will_hurt_is_logged(tmp_path):
    root = tmp_path / "root"
    async with diskd(root) as daemon:
        await daemon.do("image", "create", "a", "1MiB")
        await daemon.end()
        ahead = 4_000_000_000
        os.utime(root / "images/a/disk.raw", (ahead, ahead))
        argv = daemon.argv
        daemon.argv = lambda: ["sh", "-c", 'ulimit -n 1000; exec "$@"', "sh", *argv()]
        await daemon.start()
        assert not list(root.glob(".probe*"))
    lines = [json.loads(line) for line in daemon.log().splitlines()]
    told = {line["event"]: line for line in lines}
    assert "1000 files" in told["startup.open_files"]["reason"]
    assert "NTP" in told["startup.clock"]["reason"]

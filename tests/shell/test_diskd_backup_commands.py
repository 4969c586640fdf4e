"""The backup commands' bad input: one line that says what to do, and the right exit code."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from diskd_target_peers import backup, two_disks
from diskd_target_process import target_process

BINARIES = Path(sys.executable).parent
pytestmark = pytest.mark.slow


def run(program, *arguments, **environment):
    done = subprocess.run(
        [BINARIES / program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", **environment},
    )
    assert "Traceback" not in done.stderr
    return done


def refused(code, text, program, *arguments, **environment):
    done = run(program, *arguments, **environment)
    assert done.returncode == code, (done.stdout, done.stderr)
    assert done.stderr.count("\n") == 1
    assert text in done.stderr
    assert done.stdout == ""


def test_a_target_that_cannot_start_says_why(tmp_path):
    refused(1, "no such directory", "diskd", "target", "--root", tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    refused(1, "no such directory", "diskd", "target", "--root", tmp_path / "file")
    refused(2, "HOST:PORT", "diskd", "target", "--root", tmp_path, "--listen", "here")
    refused(2, "--root", "diskd", "target")
    refused(2, "--rot", "diskd", "target", "--rot", tmp_path)
    refused(1, "--key", "diskd", "target", "--root", tmp_path, "--listen", "0.0.0.0:0")
    refused(1, "nokey", "diskd", "target", "--root", tmp_path, "--key", tmp_path / "nokey")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        refused(1, address, "diskd", "target", "--root", tmp_path, "--listen", address)


async def test_one_target_per_root(tmp_path):
    async with target_process(tmp_path / "root") as target:
        refused(1, "in use", "diskd", "target", "--root", tmp_path / "root", "--listen", "127.0.0.1:0")
        done = run("diskctl", "target", "list", "--json", HOLDFAST_TARGET=str(target.address))
        assert (done.returncode, done.stdout) == (0, "[]\n")


async def test_a_restore_prints_lines_of_json(tmp_path):
    async with target_process(tmp_path / "root") as target:
        done = await backup(two_disks(), target.address)
        to = {"HOLDFAST_TARGET": str(target.address)}
        restore = ("diskctl", "target", "restore", "web", done.point, "--to", tmp_path / "out", "--json")
        told = await trio.to_thread.run_sync(lambda: run(*restore, **to))
    assert (told.returncode, told.stderr) == (0, "")
    *progress, result = [json.loads(line) for line in told.stdout.splitlines()]
    assert progress
    for line in progress:
        assert list(line) == ["progress"]
        assert line["progress"]["step"] == "restore"
        assert 0 < line["progress"]["done_bytes"] <= result["data_bytes"]
    assert [disk["file"] for disk in result["disks"]] == [
        str(tmp_path / "out" / name) for name in ("system.raw", "journal.raw")
    ]


NOBODY = "127.0.0.1:1"


@pytest.mark.parametrize(
    ("code", "text", "arguments"),
    [
        (2, "--target", ["backup", "--vm", "web", "--image", "d"]),
        (2, "--image", ["backup", "--vm", "web", "--target", NOBODY]),
        (2, "exclude", ["backup", "--vm", "w", "--image", "d", "--target", NOBODY, "--full", "--resume"]),
        (
            1,
            "cannot connect",
            ["--control", NOBODY, "backup", "--vm", "w", "--image", "d", "--target", NOBODY],
        ),
        (1, "No such file", ["backup", "--vm", "w", "--config", "nowhere.toml", "--target", NOBODY]),
        (1, "cannot connect", ["target", "list", "--target", NOBODY]),
        (1, "cannot connect", ["target", "restore", "web", "rp-1", "--to", "x", "--target", NOBODY]),
        (2, "--to", ["target", "restore", "web", "rp-1", "--target", NOBODY]),
        (2, "--since", ["export", "d", "-o", "x"]),
        (1, "cannot connect", ["--control", NOBODY, "export", "d", "--full", "-o", "x"]),
        (1, "No such file", ["apply", "nowhere", "raw"]),
        (1, "verify", ["apply", "-", "raw"]),
        (2, "--keep-last", ["target", "prune", "web", "--keep-last", "0", "--target", NOBODY]),
        (2, "--keep-daily", ["target", "prune", "web", "--target", NOBODY]),
        (2, "--keep-weekly", ["target", "prune", "web", "--keep-weekly", "-1"]),
        (2, "exclude", ["checkpoint", "end", "cp-0123456789abcdef", "--keep-point", "--discard"]),
        (2, "exclude", ["san", "end", "rp-0123456789abcdef", "--discard", "--keep-point"]),
    ],
)
def test_bad_commands(code, text, arguments):
    refused(code, text, "diskctl", *arguments)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xff\xfe", "UTF-8"),
        (b"[[disks]\n", "line 1"),
        (b"name = 'web'\n", "no [[disks]]"),
        (b"[[disks]]\nname = 'root'\n", "a name and an image"),
    ],
)
def test_bad_vm_files(tmp_path, content, text):
    path = tmp_path / "web.toml"
    path.write_bytes(content)
    refused(1, text, "diskctl", "backup", "--vm", "web", "--config", path, "--target", NOBODY)


def test_a_vm_file_that_is_no_text_is_no_checkpoints(tmp_path):
    path = tmp_path / "web.toml"
    path.write_bytes(b"\xff\xfe")
    freeze = ("checkpoint", "begin", "--vm", "web", "--image", "d", "--config", path)
    refused(1, "UTF-8", "diskctl", "--control", NOBODY, *freeze)


def test_garbage_is_not_applied(tmp_path):
    (tmp_path / "garbage").write_bytes(b"\0" * 100_000)
    refused(1, "nothing was applied", "diskctl", "apply", tmp_path / "garbage", tmp_path / "raw")
    assert not (tmp_path / "raw").exists()

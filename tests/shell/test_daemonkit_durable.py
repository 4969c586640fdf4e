"""Small durable files, locks and the log's queue."""

import json
import os
from pathlib import Path

import pytest

from daemonkit.durable import LockHeldError, lock_file, read_small_file, remove_file, replace_file
from daemonkit.errors import OperatorError
from daemonkit.log import QueuedWriter


def test_replace_and_remove(tmp_path: Path) -> None:
    path = tmp_path / "state"
    replace_file(path, b"one")
    replace_file(path, b"two", mode=0o600)
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]
    remove_file(path)
    remove_file(path)
    assert not path.exists()


def test_a_failed_replacement_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.mkdir()
    (path / "kept").write_bytes(b"x")
    with pytest.raises(OSError, match="state"):
        replace_file(path, b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]
    assert (path / "kept").exists()


def test_a_small_file_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"x" * 11)
    assert read_small_file(path, size_bytes_max=11) == b"x" * 11
    with pytest.raises(OperatorError, match="larger than 10"):
        read_small_file(path, size_bytes_max=10)


def test_a_lock_excludes_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    held = lock_file(path)
    with pytest.raises(LockHeldError, match="in use"):
        lock_file(path)
    os.close(held)
    os.close(lock_file(path))


def test_a_log_that_nobody_reads_drops_lines_and_says_so() -> None:
    reading, writing = os.pipe()
    writer = QueuedWriter(writing, lines_max=4)
    # A pipe holds 64 KiB: lines beyond it and the queue must be dropped, and msg must not block.
    for _ in range(200):
        writer.msg("x" * 4096)
    assert writer.dropped > 0
    text = b""
    while b"log.dropped" not in text:
        text += os.read(reading, 1 << 16)
        writer.msg("after")
    line = next(line for line in text.split(b"\n") if b"log.dropped" in line)
    assert json.loads(line)["lines"] > 0
    os.close(reading)
    writer.stop()
    os.close(writing)

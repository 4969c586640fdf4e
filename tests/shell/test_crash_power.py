"""The power supply that fails: what was synced stays, what was not may go, torn and reordered."""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

import diskd
import holdfast.crash
from diskd.shell.files import KEEP_SIZE, PUNCH_HOLE
from holdfast.crash import power
from holdfast.crash.journal import Journal, Place
from holdfast.crash.syscalls import SystemCalls

A, B, C = (letter * 4096 for letter in (b"a", b"b", b"c"))


@pytest.fixture
def place(tmp_path):
    (tmp_path / "root").mkdir()
    made = Place(tmp_path / "power")
    made.saved.mkdir(parents=True)
    return made


@pytest.fixture
def root(place):
    return place.directory.parent / "root"


@pytest.fixture
def calls(place, root):
    return SystemCalls(root, place)


def file(calls, root, name="f", content=A):
    """A file that is there for good."""
    descriptor = calls.open(root / name, os.O_RDWR | os.O_CREAT, 0o644)
    calls.pwrite(descriptor, content, 0)
    calls.fsync(descriptor)
    sync_directory(calls, root)
    return descriptor


def sync_directory(calls, path):
    descriptor = os.open(path, os.O_RDONLY)
    calls.fsync(descriptor)
    os.close(descriptor)


def lose(place, root, keep="nothing", seed=1):
    return power.fail(place, root, Random(seed), keep)


def test_what_was_synced_stays_and_what_was_not_goes(place, root, calls):
    descriptor = file(calls, root)
    calls.pwrite(descriptor, B, 4096)
    calls.pwrite(descriptor, C, 0)
    calls.fdatasync(descriptor)
    calls.pwrite(descriptor, A, 4096)
    assert lose(place, root).sectors == 8
    assert (root / "f").read_bytes() == C + B
    assert lose(place, root).sectors == 0, "after a loss everything is durable"


def test_sectors_are_torn_and_reordered(place, root, calls):
    descriptor = file(calls, root)
    calls.pwrite(descriptor, B, 0)
    calls.pwrite(descriptor, C[:2048], 1024)
    lose(place, root, "sectors")
    content = (root / "f").read_bytes()
    sectors = [content[start : start + 512] for start in range(0, 4096, 512)]
    assert all(len(set(sector)) == 1 for sector in sectors), "never inside a sector"
    found = [chr(sector[0]) for sector in sectors]
    assert set(found) == {"a", "b", "c"}
    assert "c" not in found[:2] + found[6:]


def test_everything_may_be_kept(place, root, calls):
    descriptor = file(calls, root)
    calls.pwrite(descriptor, B + C, 0)
    calls.mkdir(root / "d")
    assert lose(place, root, "everything") == power.Lost("everything", 0, 0, 0)
    assert (root / "f").read_bytes() == B + C
    assert (root / "d").is_dir()


def test_earlier_means_that_later_changes_are_the_ones_to_go(place, root, calls):
    descriptor = file(calls, root)
    for number in range(1, 6):
        calls.pwrite(descriptor, bytes([number]) * 512, number * 512)
    for seed in range(20):
        lose(place, root, "earlier", seed)
        written = [(root / "f").read_bytes()[number * 512] == number for number in range(1, 6)]
        assert written == sorted(written, reverse=True)


@pytest.mark.parametrize("before", [4096, 8192])
def test_sizes_go_back(place, root, calls, before):
    descriptor = file(calls, root, content=(A + B)[:before])
    calls.ftruncate(descriptor, 1000)
    calls.pwrite(descriptor, C, 3 * 4096)
    lose(place, root)
    assert (root / "f").read_bytes() == (A + B)[:before]


def test_a_punch_goes_back(place, root, calls):
    descriptor = file(calls, root, content=A + B)
    library = ctypes.CDLL(None)
    library.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    assert calls.fallocate(library.fallocate)(descriptor, PUNCH_HOLE | KEEP_SIZE, 0, 4096) == 0
    assert (root / "f").read_bytes() == bytes(4096) + B
    lose(place, root)
    assert (root / "f").read_bytes() == A + B


@pytest.mark.parametrize("synced", [False, True])
def test_names_last_once_their_directory_is_synced(place, root, calls, synced):
    file(calls, root, "old", A)
    file(calls, root, "gone", A)
    calls.mkdir(root / "empty")
    sync_directory(calls, root)
    new = calls.open(root / ".new", os.O_RDWR | os.O_CREAT, 0o644)
    calls.pwrite(new, B, 0)
    calls.fsync(new)
    calls.rename(root / ".new", root / "old")
    calls.unlink(root / "gone")
    calls.rmdir(root / "empty")
    calls.mkdir(root / "d")
    if synced:
        sync_directory(calls, root)
    lose(place, root)
    assert sorted(path.name for path in root.iterdir()) == (
        ["d", "old"] if synced else ["empty", "gone", "old"]
    )
    assert (root / "old").read_bytes() == (B if synced else A)


def test_what_lies_in_a_directory_goes_with_its_name(place, root, calls):
    calls.mkdir(root / "d")
    calls.open(root / "d" / "f", os.O_RDWR | os.O_CREAT, 0o644)
    sync_directory(calls, root / "d")
    lose(place, root)
    assert list(root.iterdir()) == []


def test_a_later_life_may_sync_what_an_earlier_one_wrote(place, root, calls):
    descriptor = file(calls, root)
    calls.pwrite(descriptor, B, 0)
    later = SystemCalls(root, place)
    again = later.open(root / "f", os.O_RDWR)
    later.fdatasync(again)
    later.pwrite(again, C, 0)
    lose(place, root)
    assert (root / "f").read_bytes() == B


def test_a_sync_that_is_noted_late_takes_nothing_back(place, root):
    """Two descriptors of a file are synced at once: the one that began first may end last."""
    (root / "f").write_bytes(B)
    found = (root / "f").stat()
    journal = Journal(place)
    journal.add(os.write, "data", found.st_ino, found.st_size, found.st_mtime_ns, 0, A)
    journal.add(os.write, "sync", found.st_ino, 1)
    journal.add(os.write, "sync", found.st_ino, 0)
    assert lose(place, root).sectors == 0
    assert (root / "f").read_bytes() == B


def test_times_are_told_as_a_power_loss_leaves_them(place, root, calls):
    descriptor = file(calls, root)
    before = os.fstat(descriptor)
    calls.pwrite(descriptor, B, 0)
    lose(place, root)
    later = SystemCalls(root, place)
    told = later.fstat(descriptor)
    assert (told.st_mtime_ns, told.st_ctime_ns) == (before.st_mtime_ns, before.st_mtime_ns)
    assert told.st_blocks == os.fstat(descriptor).st_blocks
    later.pwrite(descriptor, C, 0)
    assert later.fstat(descriptor).st_ctime_ns == os.fstat(descriptor).st_ctime_ns


def test_files_elsewhere_leave_no_note(place, root, calls, tmp_path):
    descriptor = calls.open(tmp_path / "f", os.O_RDWR | os.O_CREAT, 0o644)
    calls.pwrite(descriptor, A, 0)
    assert lose(place, root, "nothing").sectors == 0
    assert (tmp_path / "f").read_bytes() == A


def test_an_exchange_goes_back(place, root, calls):
    for name in ("one", "other"):
        calls.mkdir(root / name)
        calls.mkdir(root / name / f"in-{name}")
        sync_directory(calls, root / name)
    sync_directory(calls, root)
    library = ctypes.CDLL(None)
    exchange = calls.exchange(library.renameat2)
    assert exchange(-100, os.fsencode(root / "one"), -100, os.fsencode(root / "other"), ctypes.c_uint(2)) == 0
    assert (root / "one" / "in-other").is_dir()
    lose(place, root)
    assert (root / "one" / "in-one").is_dir()
    assert (root / "other" / "in-other").is_dir()


DYING = """
import os, sys
from pathlib import Path
from holdfast.crash.journal import Journal, Place
from holdfast.crash.syscalls import Moment, SystemCalls
root, place = Path(sys.argv[1]), Place(Path(sys.argv[2]))
SystemCalls(root, place).install()
Moment.ask(place.moment, "f", 3)
for name in ("f", "g"):
    file = os.open(root / name, os.O_RDWR | os.O_CREAT)
    for number in range(2):
        os.pwrite(file, b"%d" % number, 0)
        os.fsync(file)
"""


def test_a_process_dies_before_the_change_that_was_asked_for(place, root):
    """Before the fourth change or sync of f, which is its second sync: g was not begun."""
    (root / "f").write_bytes(b"before")
    path = f"{Path(holdfast.crash.__file__).parents[2]}:{Path(diskd.__file__).parents[1]}"
    died = subprocess.run(
        [sys.executable, "-c", DYING, root, place.directory],
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert died.returncode == -signal.SIGKILL
    assert (root / "f").read_bytes() == b"1efore"
    assert not (root / "g").exists()
    assert lose(place, root).sectors == 1
    assert (root / "f").read_bytes() == b"0efore"

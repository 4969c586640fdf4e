"""Scripts on real files and on the simulated disk: one contract; a failed sync is final on both."""

import errno
import mmap
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

import numpy as np
import pytest
from step_contract import CASES, Run, steps

from diskd.core.steps import Read, Sync, Truncate, Write
from diskd.shell.files import WRITE_PIECE_BYTES, Files, write_data, zeroes
from diskd.sim.disk import Crashed, SimDisk


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_real_files(case, tmp_path: Path) -> None:
    files = Files(tmp_path)
    try:
        case(files.run_blocking)
    finally:
        files.close()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_simulated_disk(case) -> None:
    case(SimDisk(Random(1)).run)


async def test_scripts_run_in_a_thread(tmp_path: Path) -> None:
    files = Files(tmp_path)
    try:
        await files.run(steps(Truncate("a", 10), Write("a", 0, b"x"), Sync("a")))
        assert await files.run(steps(Read("a", 0, 2))) == [b"x\0"]
    finally:
        files.close()


@pytest.mark.parametrize(
    "length", [0, 1, WRITE_PIECE_BYTES, WRITE_PIECE_BYTES + 1, 4 * WRITE_PIECE_BYTES + 777]
)
def test_data_is_written_whole_in_small_pieces(length: int, tmp_path: Path) -> None:
    data = Random(length).randbytes(length)
    with (tmp_path / "disk").open("w+b", buffering=0) as file:
        file.write(b"\xff" * (length + 100))
        write_data(file.fileno(), data, 50)
        assert os.pread(file.fileno(), length + 100, 0) == b"\xff" * 50 + data + b"\xff" * 50


def test_zeroes_are_written_from_the_start_of_a_page_on() -> None:
    """Where the kernel misses a page of what it writes, it stops: killed then, it leaves half a sector."""
    for length in (1, 512, 1 << 20, (1 << 20) + 1):
        assert zeroes(length) == bytes(length)
    assert np.frombuffer(zeroes(512), np.uint8).ctypes.data % mmap.PAGESIZE == 0


# Forks, lets the child write zeroes over a file of ones, kills it at some moment, and looks where it stopped.
KILLED_WRITERS = """
import os, random, signal, sys
from diskd.shell.files import write_zeroes
descriptor, size, chance = os.open(sys.argv[1], os.O_RDWR), 1 << 18, random.Random(int(sys.argv[2]))
for _ in range(400):
    os.pwrite(descriptor, b"\\xff" * size, 0)
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.write(writer, b"!")
        write_zeroes(descriptor, 0, size)
        os._exit(0)
    os.read(reader, 1)
    for _ in range(chance.randrange(2000)):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader), os.close(writer)
    stopped = os.pread(descriptor, size, 0).find(b"\\xff")
    print(stopped if stopped >= 0 else size)
"""


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs /dev/shm, where a killed write stops")
def test_a_killed_write_of_zeroes_tears_no_sector(tmp_path: Path) -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="holdfast-test-") as file:
        argv = [sys.executable, "-c", KILLED_WRITERS, file.name, "1"]
        done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=120)
    stopped = [int(line) for line in done.stdout.split()]
    assert len(stopped) == 400
    assert [at for at in stopped if at % 512] == []


def failed_sync_is_final(run: Run) -> None:
    run(steps(Truncate("a", 10), Truncate("b", 10)))
    for step in (Sync("a"), Sync("a"), Write("a", 0, b"x"), Read("a", 0, 1)):
        with pytest.raises(OSError, match=r".") as caught:
            run(steps(step))
        assert caught.value.errno == errno.EIO
    run(steps(Write("b", 0, b"x"), Read("b", 0, 1)))


def test_a_failed_sync_is_final_for_real_files(tmp_path: Path) -> None:
    calls: list[int] = []

    def sync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    files = Files(tmp_path, sync=sync)
    try:
        failed_sync_is_final(files.run_blocking)
        assert len(calls) == 1, "the kernel would have said success the second time"
    finally:
        files.close()


def test_a_failed_sync_is_final_in_the_simulator() -> None:
    disk = SimDisk(Random(1))
    disk.fail_when = lambda step: errno.EIO if step == Sync("a") else None
    failed_sync_is_final(disk.run)
    disk.daemon_crash()
    disk.fail_when = lambda step: None
    disk.run(steps(Write("a", 0, b"x"), Sync("a")))


def test_the_simulated_disk_loses_tears_and_reorders() -> None:
    seen: set[tuple[bytes, bytes]] = set()
    for seed in range(60):
        disk = SimDisk(Random(seed))
        disk.run(steps(Truncate("a", 1024), Write("a", 0, b"o" * 1024), Sync("a")))
        disk.run(steps(Write("a", 0, b"1" * 1024), Write("a", 0, b"2" * 512)))
        disk.power_loss()
        content = disk.peek("a")
        assert {content[:512], content[512:]} <= {b"o" * 512, b"1" * 512, b"2" * 512}
        seen.add((content[:1], content[512:513]))
    assert seen == {(a, b) for a in (b"o", b"1", b"2") for b in (b"o", b"1")}


def test_the_simulated_disk_keeps_what_was_synced_and_a_daemon_crash_keeps_all() -> None:
    for seed in range(20):
        disk = SimDisk(Random(seed))
        disk.run(
            steps(Truncate("a", 2048), Write("a", 0, b"x" * 1500), Sync("a"), Write("a", 1500, b"y" * 9))
        )
        disk.daemon_crash()
        assert disk.peek("a")[:1509] == b"x" * 1500 + b"y" * 9
        disk.run(steps(Sync("a")))
        disk.power_loss()
        assert disk.peek("a")[:1509] == b"x" * 1500 + b"y" * 9


def test_the_simulated_disk_crashes_before_the_step_that_it_was_told() -> None:
    disk = SimDisk(Random(1))
    disk.crash_in = 2
    with pytest.raises(Crashed):
        disk.run(steps(Truncate("a", 10), Write("a", 0, b"x"), Write("a", 1, b"y")))
    disk.daemon_crash()
    assert disk.peek("a") == b"x" + bytes(9)

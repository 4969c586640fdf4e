"""The NBD servers under comparison, each a separate process on a loopback port with a disk of its own.

Peers run at their best settings for this comparison: nbdkit's file plugin (no tracking at all) with its
default 16 threads, qemu-nbd on qcow2 with a persistent dirty bitmap, io_uring left to its default.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs

READY_SECONDS_MAX = 20.0
STOP_SECONDS_MAX = 20.0


class BenchFailed(Exception):
    """A server or a client of the benchmark failed; the message is one line."""


@attrs.frozen
class Server:
    """A running server: what to call it in the table, and the URI under which clients reach its disk."""

    name: str
    uri: str
    pid: int


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout:
        process.stdout.close()


def wait_listening(process: subprocess.Popen[bytes], port: int) -> None:
    """Until something accepts on the port; the process ending first is a failure."""

    deadline = time.monotonic() + READY_SECONDS_MAX
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BenchFailed(f"{process.args!r} ended with {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
            return
        time.sleep(0.02)
    raise BenchFailed(f"{process.args!r} does not listen on port {port}")


@contextlib.contextmanager
def holdfast(directory: Path, size_bytes: int) -> Iterator[Server]:
    """diskd with tracking on, as users run it."""
    root = directory / "holdfast"
    root.mkdir()
    binaries = Path(sys.executable).parent
    argv = [str(binaries / "diskd"), "run", "--root", str(root), "--nbd", "127.0.0.1:0"]
    log = (directory / "diskd.log").open("wb")
    process = subprocess.Popen([*argv, "--control", "127.0.0.1:0"], stdout=subprocess.PIPE, stderr=log)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise BenchFailed(f"diskd did not start: see {directory / 'diskd.log'}")
        ready = json.loads(line)
        create = [str(binaries / "diskctl"), "--control", ready["control"], "image", "create", "disk"]
        subprocess.run([*create, str(size_bytes)], check=True, stdout=subprocess.DEVNULL)
        yield Server("holdfast", f"nbd://{ready['nbd']}/disk", process.pid)
    finally:
        _stop(process)
        log.close()


@contextlib.contextmanager
def nbdkit(directory: Path, size_bytes: int) -> Iterator[Server]:
    """nbdkit's file plugin: C, no tracking."""
    path = directory / "nbdkit.raw"
    with path.open("wb") as file:
        file.truncate(size_bytes)
    port = free_port()
    process = subprocess.Popen(["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "file", str(path)])
    try:
        wait_listening(process, port)
        yield Server("nbdkit", f"nbd://127.0.0.1:{port}", process.pid)
    finally:
        _stop(process)


@contextlib.contextmanager
def qemu_nbd(directory: Path, size_bytes: int) -> Iterator[Server]:
    """qemu-nbd on qcow2 with a persistent dirty bitmap: QEMU's own change tracking."""
    path = directory / "qemu.qcow2"
    quiet = {"check": True, "stdout": subprocess.DEVNULL}
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(size_bytes)], **quiet)  # type: ignore[call-overload] # the shared keywords defeat run's overloads
    subprocess.run(["qemu-img", "bitmap", "--add", path, "b0"], **quiet)  # type: ignore[call-overload] # likewise
    port = free_port()
    argv = [
        "qemu-nbd",
        "-f",
        "qcow2",
        "-b",
        "127.0.0.1",
        "-p",
        str(port),
        "-t",
        "-e",
        "4",
        "--cache=writeback",
    ]
    process = subprocess.Popen([*argv, str(path)])
    try:
        wait_listening(process, port)
        yield Server("qemu-nbd", f"nbd://127.0.0.1:{port}", process.pid)
    finally:
        _stop(process)


Starter = Callable[[Path, int], contextlib.AbstractContextManager[Server]]


def available() -> tuple[dict[str, Starter], list[str]]:
    """The servers that can run here, ours first, and why the others cannot."""
    starters: dict[str, Starter] = {"holdfast": holdfast}
    missing = []
    for name, program, starter in (("nbdkit", "nbdkit", nbdkit), ("qemu-nbd", "qemu-nbd", qemu_nbd)):
        if shutil.which(program):
            starters[name] = starter
        else:
            missing.append(f"{name}: {program} is not installed")
    return starters, missing


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

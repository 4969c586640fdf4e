"""The NBD servers under comparison, each a process with its own disk, on loopback TCP or a Unix socket.

Peers run at their best settings for this comparison: nbdkit's file plugin (no tracking at all) with its
default 16 threads, qemu-nbd on qcow2 with a persistent dirty bitmap. ``untracked`` is our own server over the
bare raw file: what tracking, leases and the hold cost is the difference between it and ``holdfast``.
"""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import attrs

READY_SECONDS_MAX = 20.0
STOP_SECONDS_MAX = 20.0

Transport = Literal["TCP", "Unix socket"]


class BenchFailed(Exception):
    """A server or a client of the benchmark failed; the message is one line."""


@attrs.frozen
class Server:
    """A running server: what to call it in the table, and the URI under which clients reach its disk.

    ``fresh`` makes a new, empty disk of so many bytes and returns its URI, where the server has that.
    ``diskctl`` runs that command against the daemon, and returns what it printed; ``image`` is the disk.
    """

    name: str
    uri: str
    pid: int
    size_bytes: int
    fresh: Callable[[int], str] | None = None
    diskctl: Callable[..., str] | None = None
    image: str = ""


@attrs.frozen
class Place:
    """Where a server listens."""

    transport: Transport
    port: int
    path: Path

    @classmethod
    def make(cls, transport: Transport, directory: Path, name: str) -> "Place":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return cls(transport, probe.getsockname()[1], directory / f"{name}.sock")

    def uri(self, export: str = "") -> str:
        if self.transport == "TCP":
            return f"nbd://127.0.0.1:{self.port}/{export}"
        return f"nbd+unix:///{export}?socket={self.path}"

    def connect(self) -> None:
        """Raises OSError where nobody listens."""
        if self.transport == "TCP":
            socket.create_connection(("127.0.0.1", self.port), 0.2).close()
        else:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(self.path))


@contextlib.contextmanager
def running(argv: list[str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process with its stderr in a file; SIGTERM at the end."""
    with log.open("wb") as errors:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=errors)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def wait_listening(process: "subprocess.Popen[bytes]", place: Place) -> None:
    """Until something accepts there; the process ending first is a failure."""
    deadline = time.monotonic() + READY_SECONDS_MAX
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BenchFailed(f"{process.args!r} ended with {process.returncode}")
        with contextlib.suppress(OSError):
            place.connect()
            return
        time.sleep(0.02)
    raise BenchFailed(f"{process.args!r} does not listen")


@contextlib.contextmanager
def holdfast(directory: Path, size_bytes: int, transport: Transport) -> Iterator[Server]:
    """diskd with tracking on, as users run it."""
    root, log = directory / "root", directory / "diskd.log"
    root.mkdir()
    place = Place.make(transport, directory, "diskd")
    binaries = Path(sys.executable).parent
    argv = [str(binaries / "diskd"), "run", "--root", str(root), "--control", "127.0.0.1:0"]
    argv += ["--nbd", f"127.0.0.1:{place.port}"] if transport == "TCP" else ["--nbd-socket", str(place.path)]
    made: list[str] = []
    with running(argv, log) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise BenchFailed(f"diskd did not start: {log.read_text()[-300:]}")
        control = json.loads(line)["control"]

        def diskctl(*arguments: str) -> str:
            argv = [str(binaries / "diskctl"), "--control", control, *arguments]
            return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout

        def fresh(size: int) -> str:
            made.append(f"disk{len(made)}")
            diskctl("image", "create", made[-1], str(size))
            return place.uri(made[-1])

        yield Server("holdfast", fresh(size_bytes), process.pid, size_bytes, fresh, diskctl, made[0])


@contextlib.contextmanager
def untracked(directory: Path, size_bytes: int, transport: Transport) -> Iterator[Server]:
    """Our NBD server over the bare file: no tracking, no lease, no hold."""
    place = Place.make(transport, directory, "untracked")
    where = str(place.port) if transport == "TCP" else str(place.path)
    argv = [sys.executable, "-m", "holdfast.bench.untracked", _file(directory, size_bytes), where]
    with running(argv, directory / "untracked.log") as process:
        wait_listening(process, place)
        yield Server("untracked", place.uri(), process.pid, size_bytes)


@contextlib.contextmanager
def nbdkit(directory: Path, size_bytes: int, transport: Transport) -> Iterator[Server]:
    """nbdkit's file plugin: C, no tracking."""
    place = Place.make(transport, directory, "nbdkit")
    where = ["-i", "127.0.0.1", "-p", str(place.port)] if transport == "TCP" else ["-U", str(place.path)]
    argv = ["nbdkit", "-f", *where, "file", _file(directory, size_bytes)]
    with running(argv, directory / "nbdkit.log") as process:
        wait_listening(process, place)
        yield Server("nbdkit", place.uri(), process.pid, size_bytes)


@contextlib.contextmanager
def qemu_nbd(directory: Path, size_bytes: int, transport: Transport) -> Iterator[Server]:
    """qemu-nbd on qcow2 with a persistent dirty bitmap: QEMU's own change tracking."""
    path = str(directory / "qemu.qcow2")
    for argv in (
        ["qemu-img", "create", "-q", "-f", "qcow2", path, str(size_bytes)],
        ["qemu-img", "bitmap", "--add", path, "b0"],
    ):
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    place = Place.make(transport, directory, "qemu-nbd")
    where = ["-b", "127.0.0.1", "-p", str(place.port)] if transport == "TCP" else ["-k", str(place.path)]
    argv = ["qemu-nbd", "-f", "qcow2", *where, "-t", "-e", "4", "--cache=writeback", path]
    with running(argv, directory / "qemu-nbd.log") as process:
        wait_listening(process, place)
        yield Server("qemu-nbd", place.uri(), process.pid, size_bytes)


def _file(directory: Path, size_bytes: int) -> str:
    path = directory / "disk.raw"
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return str(path)


Starter = Callable[[Path, int, Transport], contextlib.AbstractContextManager[Server]]


def available() -> tuple[dict[str, Starter], list[str]]:
    """The servers that can run here, ours first, and why the others cannot."""
    starters: dict[str, Starter] = {"holdfast": holdfast, "untracked": untracked}
    missing = []
    for name, program, starter in (("nbdkit", "nbdkit", nbdkit), ("qemu-nbd", "qemu-nbd", qemu_nbd)):
        if shutil.which(program):
            starters[name] = starter
        else:
            missing.append(f"{name}: {program} is not installed")
    return starters, missing


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has used so far, threads that have ended included."""
    # The kernel's number for "the CPU clock of that process" (clock_getcpuclockid): nanoseconds, not ticks.
    return time.clock_gettime(~pid << 3 | 2)

"""The lab's processes: started apart from the lab, found again by identity, ended and nobody else's.

A process is known by its pid *and* its start time, so that a later process of the same number is never
mistaken for it. All of them, and whatever they start (the VMs of the nodes), carry the lab's random id
in their environment: so even what a killed clusterd left behind is found, and nothing else is.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from daemonkit.errors import OperatorError

LAB_ID: Final = "HOLDFAST_LAB"
READY_SECONDS_MAX: Final = 30.0
READY_BYTES_MAX: Final = 64 << 10
ENVIRON_BYTES_MAX: Final = 1 << 20
POLL_SECONDS: Final = 0.02
# Below Linux' ephemeral ports, so that no outgoing connection takes a port between stop and start.
PORTS: Final = range(15_000, 32_000)


@attrs.frozen
class ProcessRecord:
    """Which process it is: for as long as the machine runs."""

    pid: int
    start_time: str


def program(name: str) -> list[str]:
    """The argv that starts one of our programs: the script beside this interpreter, else from PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise OperatorError(f"{name} is not installed beside {sys.executable} nor on PATH")
    return [found]


def interpreter() -> list[str]:
    """The argv that starts this Python, for modules of our own."""
    return [sys.executable]


def start_time(pid: int) -> str | None:
    """In ticks since boot; None where there is no such process, or only its remains (a zombie)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def lives(record: ProcessRecord) -> bool:
    return start_time(record.pid) == record.start_time


def send(record: ProcessRecord, number: signal.Signals) -> bool:
    """Signal exactly this process; False where it is gone."""
    if not lives(record):
        return False
    try:
        descriptor = os.pidfd_open(record.pid)
    except OSError:
        return False
    try:
        if not lives(record):  # The pid may have changed hands before the descriptor was opened.
            return False
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


async def spawn(name: str, argv: list[str], *, log: Path, environment: dict[str, str]) -> ProcessRecord:
    """Start detached and wait for the ready line. Raises OperatorError, the process ended, if none comes."""
    with log.open("ab") as errors:
        child = subprocess.Popen(  # noqa: ASYNC220 - not a child to wait for: it outlives this command
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            start_new_session=True,
        )
    assert child.stdout is not None
    record = ProcessRecord(child.pid, start_time(child.pid) or "gone")
    ready = False
    try:
        with trio.move_on_after(READY_SECONDS_MAX):
            ready = await _read_ready(child.stdout.fileno())
    finally:
        child.stdout.close()
        if not ready:
            send(record, signal.SIGKILL)
        # It belongs to nobody now: forgotten here on purpose, found again by its record.
        child.returncode = 0
    if not ready:
        raise OperatorError(f"{name} did not come up: {_last_line(log)} (all of it: {log})")
    return record


async def _read_ready(descriptor: int) -> bool:
    os.set_blocking(descriptor, False)
    line = b""
    while b"\n" not in line and len(line) < READY_BYTES_MAX:
        await trio.lowlevel.wait_readable(descriptor)
        data = os.read(descriptor, READY_BYTES_MAX)
        if not data:
            return False
        line += data
    try:
        ready: Any = json.loads(line.partition(b"\n")[0])
    except ValueError:
        return False
    return isinstance(ready, dict) and ready.get("event") == "ready"


def _last_line(log: Path) -> str:
    with contextlib.suppress(OSError):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if lines:
            return lines[-1][:400]
    return "it said nothing"


async def wait_gone(records: Iterable[ProcessRecord], seconds_max: float) -> list[ProcessRecord]:
    """Wait until these have ended; returns those that have not."""
    left = list(records)
    with trio.move_on_after(seconds_max):
        while left := [record for record in left if lives(record)]:
            _reap(left)
            await trio.sleep(POLL_SECONDS)
    return left


def _reap(records: Iterable[ProcessRecord]) -> None:
    """Where this very process started them, their remains are ours to remove."""
    for record in records:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(record.pid, os.WNOHANG)


async def end(records: Iterable[ProcessRecord], *, seconds_max: float) -> None:
    """Ask these to end, all at once, then insist. Raises OperatorError where even that does not help."""
    chosen = list(records)
    for record in chosen:
        send(record, signal.SIGCONT)
        send(record, signal.SIGTERM)
    left = await wait_gone(chosen, seconds_max)
    for record in left:
        send(record, signal.SIGKILL)
    if stuck := await wait_gone(left, 10.0):
        raise OperatorError(f"process {stuck[0].pid} does not end even when killed")
    _reap(chosen)


@attrs.frozen
class Marked:
    """A process that carries the lab's id. ``host`` and ``vm`` are set for what a node's VM runs."""

    record: ProcessRecord
    host: str | None
    vm: str | None


def marked(lab_id: str) -> list[Marked]:
    """Every live process with the lab's id in its environment, but this one."""
    found = []
    wanted = f"{LAB_ID}={lab_id}".encode()
    for name in os.listdir("/proc"):
        if not name.isdecimal() or int(name) == os.getpid():
            continue
        try:
            with Path(f"/proc/{name}/environ").open("rb") as file:
                entries = file.read(ENVIRON_BYTES_MAX).split(b"\0")
        except OSError:
            continue
        began = start_time(int(name))
        if wanted in entries and began is not None:
            values = dict(entry.decode(errors="replace").partition("=")[::2] for entry in entries)
            record = ProcessRecord(int(name), began)
            found.append(Marked(record, values.get("HOLDFAST_HOST"), values.get("HOLDFAST_VM")))
    return found


def free_ports(pick: Callable[[int], int]) -> Iterator[int]:
    """Ports on which nobody listens, stream or datagram, each given once. ``pick(n)`` is below n."""
    first = pick(len(PORTS))
    for step in range(len(PORTS)):
        port = PORTS[(first + step) % len(PORTS)]
        if all(_is_free(port, kind) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)):
            yield port
    raise OperatorError("no free port is left on this machine")


def _is_free(port: int, kind: socket.SocketKind) -> bool:
    with socket.socket(socket.AF_INET, kind) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True

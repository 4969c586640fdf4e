"""`make bench` part `checkpoint`: how long a guest's writes take while its disk is being backed up.

A guest (checkpoint_guest.py) writes 4 KiB blocks all over its disk, one at a time, without a pause, from the
first phase to the last. Beside it checkpoints begin and end, merges run, and backups go to a slow target (a
relay that lets 10 MB/s through) and to one that died in the middle (a relay that goes silent after 8 MiB).
Every phase has windows in time, and before each of them a control window, in which nothing happens; so a
noisy machine disturbs both alike. The table shows what the writes of all windows of a kind took, and of every
window its slowest write: that is the stall that a guest may notice.

Merge speed is that of a merge after the guest has written for some seconds, with the guest writing on and
with the guest stopped.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import attrs
import click
import numpy as np
import trio
from rich.console import Console
from rich.table import Table

from daemonkit.cli import SIZE, run_main
from daemonkit.diskd_api import BACKUP_RUN, BackupDisk, BackupRequest, ImageName
from daemonkit.errors import OperatorError
from daemonkit.ports import Address
from daemonkit.rpc import CallFailed, CallRefused, Client, connect
from daemonkit.units import MiB, format_size
from diskd.core import calls
from holdfast.bench.servers import BenchFailed

BINARIES = Path(sys.executable).parent
STOP_SECONDS_MAX = 60.0
SLOW_BYTES_PER_SECOND = 10_000_000
DEAD_AFTER_BYTES = 8 * MiB
WINDOW_SECONDS = 0.2
MERGE_SECONDS_MAX = 300.0
POLL_SECONDS = 0.02
VM = "bench"
DISKS = [BackupDisk("disk", "disk")]
CALM, BEGIN, STANDING, MERGE, SLOW, DEAD = (
    "control",
    "checkpoint begins",
    "checkpoint stands",
    "merge",
    "backup, slow target",
    "backup, dead target",
)
KINDS = (CALM, BEGIN, STANDING, MERGE, SLOW, DEAD)


@attrs.define
class Bench:
    """What all phases share. ``windows``: (kind, begin, end) in CLOCK_MONOTONIC's nanoseconds."""

    control: Address
    target: Address
    guest: "subprocess.Popen[bytes]"
    windows: list[tuple[str, int, int]] = attrs.Factory(list)
    merges: dict[str, list[float]] = attrs.Factory(dict)

    @asynccontextmanager
    async def window(self, kind: str) -> AsyncIterator[None]:
        began = time.monotonic_ns()
        yield
        self.windows.append((kind, began, time.monotonic_ns()))

    async def calm(self, seconds: float = WINDOW_SECONDS) -> None:
        async with self.window(CALM):
            await trio.sleep(seconds)

    async def begin(self, client: Client) -> str:
        return (await client.call(calls.CHECKPOINT_BEGIN, calls.BeginCheckpoint(VM, DISKS))).checkpoint

    async def merged(self, client: Client) -> None:
        """Return when the image is on its raw file alone."""
        with trio.fail_after(MERGE_SECONDS_MAX):
            while (await client.call(calls.IMAGE_SHOW, ImageName("disk"))).checkpoint is not None:  # noqa: ASYNC110 - another process merges
                await trio.sleep(POLL_SECONDS)


async def begin_and_end(bench: Bench, client: Client, rounds: int) -> None:
    """Hundreds of checkpoints, each small."""
    for number in range(rounds):
        await bench.calm()
        async with bench.window(BEGIN):
            identifier = await bench.begin(client)
        async with bench.window(STANDING):
            await trio.sleep(WINDOW_SECONDS / 2)
        async with bench.window(MERGE):
            await client.call(calls.CHECKPOINT_END, calls.EndCheckpoint(identifier, "discard"))
            await bench.merged(client)
        if (number + 1) % 50 == 0:
            print(f"bench checkpoint: {number + 1} of {rounds} checkpoints", file=sys.stderr)


async def merge(bench: Bench, client: Client, seconds: float, *, guest_runs: bool) -> None:
    """One large merge; its speed counts what the AVHD held when the checkpoint ended."""
    await bench.calm(seconds)
    identifier = await bench.begin(client)
    await trio.sleep(seconds)
    if not guest_runs:
        bench.guest.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    async with bench.window(MERGE if guest_runs else ""):
        await client.call(calls.CHECKPOINT_END, calls.EndCheckpoint(identifier, "discard"))
        shown = await client.call(calls.IMAGE_SHOW, ImageName("disk"))
        await bench.merged(client)
    took = time.monotonic() - began
    if not guest_runs:
        bench.guest.send_signal(signal.SIGCONT)
    rate = (shown.merge_remaining_bytes or 0) / took / MiB
    bench.merges.setdefault("guest writes" if guest_runs else "guest stopped", []).append(rate)


async def backup(bench: Bench, kind: str, limit: int, silent_after: int, seconds: float) -> None:
    """A full backup for so long, through a relay; then whoever asked for it goes away."""
    await bench.calm(seconds)
    async with trio.open_nursery() as nursery:
        relay = await nursery.start(partial(serve_relay, bench.target, limit, silent_after))
        request = BackupRequest(VM, DISKS, "", str(relay), "full")
        async with bench.window(kind):
            with trio.move_on_after(seconds), suppress(CallFailed, CallRefused):
                async with connect(bench.control) as client:
                    await client.call(BACKUP_RUN, request)
        nursery.cancel_scope.cancel()
    async with connect(bench.control) as client:
        await bench.merged(client)


async def serve_relay(
    target: Address, limit: int, silent_after: int, *, task_status: trio.TaskStatus[Address]
) -> None:
    """To the target and back; ``limit`` bytes per second, silent once so many have gone to the target."""

    async def pump(source: trio.SocketStream, sink: trio.SocketStream, *, bounded: bool) -> None:
        passed = 0
        async for part in source:
            passed += len(part)
            if bounded and passed > silent_after:
                await trio.sleep_forever()
            if bounded:
                await trio.sleep(len(part) / limit)
            await sink.send_all(part)
        await sink.send_eof()

    async def accept(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError, OSError, ExceptionGroup):
            async with (
                await trio.open_tcp_stream(target.host, target.port) as other,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(partial(pump, stream, other, bounded=True))
                await pump(other, stream, bounded=False)

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    task_status.started(Address("127.0.0.1", listeners[0].socket.getsockname()[1]))
    await trio.serve_listeners(accept, listeners)


def start(directory: Path, stack: list["subprocess.Popen[bytes]"], *arguments: str) -> dict[str, str]:
    """The ready line of a `diskd` process."""
    with (directory / f"{arguments[0]}.log").open("wb") as log:
        process = subprocess.Popen([str(BINARIES / "diskd"), *arguments], stdout=subprocess.PIPE, stderr=log)
    stack.append(process)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise BenchFailed(f"diskd {arguments[0]} did not start: {Path(log.name).read_text()[-300:]}")
    ready: dict[str, str] = json.loads(line)
    return ready


def stop(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGCONT)
    if process.stdin is not None:
        process.stdin.close()
    else:
        process.terminate()
    process.wait(STOP_SECONDS_MAX)
    if process.stdout is not None:
        process.stdout.close()


async def run_phases(bench: Bench, rounds: int, seconds: float) -> None:
    await trio.sleep(1)  # the first writes open regions and warm up
    async with connect(bench.control) as client:
        await begin_and_end(bench, client, rounds)
        for _ in range(3):
            await merge(bench, client, seconds, guest_runs=True)
            await merge(bench, client, seconds, guest_runs=False)
    for _ in range(3):
        await backup(bench, SLOW, SLOW_BYTES_PER_SECOND, 1 << 60, seconds)
        await backup(bench, DEAD, 1 << 40, DEAD_AFTER_BYTES, seconds)


def measure(size_bytes: int, rounds: int, seconds: float, settings: list[str]) -> dict[str, object]:
    """Everything; see the module. Raises BenchFailed, OperatorError, OSError."""
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="holdfast-checkpoint-") as name:
        directory = Path(name)
        try:
            overrides = [word for setting in settings for word in ("--set", setting)]
            listen = ["--nbd", "127.0.0.1:0", "--control", "127.0.0.1:0", *overrides]
            for part in ("disks", "repository"):
                (directory / part).mkdir()
            ready = start(directory, processes, "run", "--root", str(directory / "disks"), *listen)
            repository = ["--root", str(directory / "repository"), "--listen", "127.0.0.1:0"]
            target = start(directory, processes, "target", *repository)
            content = directory / "content"
            with content.open("wb") as file:
                for _ in range(0, size_bytes, MiB):
                    file.write(os.urandom(MiB))
            diskctl = [str(BINARIES / "diskctl"), "--control", ready["control"]]
            subprocess.run(
                [*diskctl, "image", "import", "disk", str(content)], check=True, stdout=subprocess.DEVNULL
            )
            content.unlink()
            samples = directory / "samples.npy"
            argv = [sys.executable, "-m", "holdfast.bench.checkpoint_guest", f"nbd://{ready['nbd']}/disk"]
            guest = subprocess.Popen([*argv, str(samples)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            processes.append(guest)
            assert guest.stdout is not None
            if not guest.stdout.readline():
                raise BenchFailed("the benchmark's guest did not start")
            bench = Bench(Address.parse(ready["control"]), Address.parse(target["listen"]), guest)
            trio.run(run_phases, bench, rounds, seconds)
            stop(processes.pop())
            return summarise(bench, np.load(samples))
        finally:
            for process in reversed(processes):
                stop(process)


def summarise(bench: Bench, samples: "np.ndarray[tuple[int, int], np.dtype[np.uint64]]") -> dict[str, object]:
    """Microseconds by kind of window, of all writes and of the slowest write of each window."""
    began, took = samples[:, 0].astype(np.int64), samples[:, 1].astype(np.int64)
    ended = began + took
    rows = []
    for kind in KINDS:
        inside, worst = [], []
        for _, low, high in (window for window in bench.windows if window[0] == kind):
            first, last = np.searchsorted(ended, low), np.searchsorted(began, high)
            if last > first:
                inside.append(took[first:last])
                worst.append(int(took[first:last].max()))
        if inside:
            every = np.concatenate(inside)
            row: dict[str, object] = {"window": kind, "windows": len(worst), "writes": len(every)}
            rows.append({**row, **_spread("write", every), **_spread("slowest", np.array(worst))})
    merges = {name: round(float(np.median(rates)), 1) for name, rates in bench.merges.items()}
    return {"rows": rows, "merge_mib_per_second": merges}


def _spread(name: str, values: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> dict[str, float]:
    p50, p99 = np.percentile(values, (50, 99))
    found = {"p50": p50, "p99": p99, "max": values.max()}
    return {f"{name}_{key}_us": round(float(value) / 1e3, 1) for key, value in found.items()}


def render(result: dict[str, object]) -> Table:
    """For people: milliseconds."""
    table = Table(
        title="A guest's 4 KiB writes at depth 1, milliseconds; slowest = the slowest of each window"
    )
    names = ("write p50", "write p99", "write max", "slowest p50", "slowest p99", "slowest max")
    for column in ("window", "windows", "writes", *names):
        table.add_column(column, justify="left" if column == "window" else "right")
    rows = result["rows"]
    assert isinstance(rows, list)
    for row in rows:
        cells = [f"{row[name.replace(' ', '_') + '_us'] / 1e3:.2f}" for name in names]
        table.add_row(row["window"], str(row["windows"]), f"{row['writes']:,}", *cells)
    return table


@click.command()
@click.option("--rounds", default=200, show_default=True, type=click.IntRange(1, 10_000), help="Checkpoints.")
@click.option(
    "--seconds", default=4.0, show_default=True, help="Length of a backup, and of writing before a merge."
)
@click.option(
    "--size", "size_bytes", default="256MiB", show_default=True, type=SIZE, help="Size of the disk."
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A setting of diskd.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
def main(rounds: int, seconds: float, size_bytes: int, settings: tuple[str, ...], as_json: bool) -> None:
    """Measure a guest's write latency while checkpoints begin, stand, are exported and merged."""
    try:
        result = measure(size_bytes, rounds, seconds, list(settings))
    except (BenchFailed, subprocess.SubprocessError) as error:
        raise OperatorError(str(error)) from error
    if as_json:
        print(json.dumps({"disk_bytes": size_bytes, **result}, indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(render(result))
    merges = result["merge_mib_per_second"]
    assert isinstance(merges, dict)
    for name, rate in merges.items():
        console.print(f"Merge, {name}: {rate} MiB/s (median)")
    console.print(f"Disk of {format_size(size_bytes)}; {os.cpu_count()} cores.")


if __name__ == "__main__":
    run_main(main)

"""`make bench`: our NBD server beside its peers, interleaved in one run, as medians and ratios.

The client is `qemu-img bench` for all of them. Every disk is filled with data first, so that nobody gains by
reading holes, and a write cell finds all regions open. Every round visits every server with the same cell
before the next cell, so that a noisy machine disturbs all alike; the first round warms up and is not counted.
Numbers from different runs or machines are not comparable; the ratios within one run are.
"""

import contextlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import attrs
import click
from rich.console import Console
from rich.table import Table

from daemonkit.cli import SIZE, run_main
from daemonkit.errors import OperatorError
from daemonkit.units import KiB, MiB, format_size
from holdfast.bench.servers import BenchFailed, Server, Starter, Transport, available, cpu_seconds

CLIENT_SECONDS_MAX = 120
SAMPLE_SECONDS_MAX = 1.0


@attrs.frozen
class Cell:
    """One workload; `qemu-img bench` knows no random addresses, so a stride scatters them."""

    name: str
    write: bool
    request_bytes: int
    depth: int
    count: int
    step_bytes: int
    # Each sample on a new disk, where the server can make one: every request touches a closed region.
    first_touch: bool = False


# A stride of a prime number of blocks visits the whole disk before it repeats: random enough for the servers.
STRIDE = 1021 * 4 * KiB
CELLS = [
    *(
        Cell(f"4 KiB {'write' if write else 'read'}, depth {depth}", write, 4 * KiB, depth, count, STRIDE)
        for write in (False, True)
        for depth, count in ((1, 2000), (8, 8000), (32, 8000))
    ),
    Cell("1 MiB read, depth 4", False, MiB, 4, 500, MiB),
    Cell("1 MiB write, depth 4", True, MiB, 4, 250, MiB),
    *(
        Cell(f"4 KiB write, first touch, depth {depth}", True, 4 * KiB, depth, 200, MiB, first_touch=True)
        for depth in (1, 8)
    ),
]
# One region a request.
FIRST_TOUCH_BYTES = 256 * MiB
TRANSPORTS: tuple[Transport, ...] = ("TCP", "Unix socket")
PATTERN = "--pattern=165"


@attrs.frozen
class Sample:
    operations_per_second: float
    cpu_microseconds: float


def client(*arguments: str) -> float:
    """Seconds that `qemu-img bench` says it took. Raises BenchFailed."""
    done = subprocess.run(
        ["qemu-img", "bench", "-f", "raw", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=CLIENT_SECONDS_MAX,
    )
    match = re.search(r"Run completed in ([0-9.]+) seconds", done.stdout)
    if done.returncode or match is None:
        raise BenchFailed(f"qemu-img bench {' '.join(arguments)} failed: {done.stderr.strip()[-200:]}")
    return float(match[1])


def fill(server: Server, size_bytes: int) -> None:
    """Write the whole disk."""
    client("-w", PATTERN, "-c", str(size_bytes // MiB), "-d", "4", "-s", str(MiB), server.uri)


def measure(server: Server, cell: Cell, count: int) -> Sample:
    """One run of the client with so many requests. Raises BenchFailed."""
    uri = server.fresh(FIRST_TOUCH_BYTES) if cell.first_touch and server.fresh else server.uri
    arguments = ["-c", str(count), "-d", str(cell.depth), "-s", str(cell.request_bytes)]
    arguments += ["-S", str(cell.step_bytes), *(["-w", PATTERN] if cell.write else [])]
    if cell.write and not cell.first_touch:
        # One write per region opens it where there is tracking; it stays open for longer than a sample takes.
        regions = ["-c", str(server.size_bytes // MiB), "-d", "8", "-s", str(4 * KiB), "-S", str(MiB)]
        client("-w", PATTERN, *regions, uri)
    before = cpu_seconds(server.pid)
    seconds = client(*arguments, uri)
    return Sample(count / max(seconds, 0.001), (cpu_seconds(server.pid) - before) / count * 1e6)


def run_rounds(servers: list[Server], rounds: int, title: str) -> dict[str, dict[str, list[Sample]]]:
    """cell → server → samples of the counted rounds."""
    samples: dict[str, dict[str, list[Sample]]] = {cell.name: {s.name: [] for s in servers} for cell in CELLS}
    rates: dict[tuple[str, str], float] = {}
    for number in range(rounds + 1):
        for cell in CELLS:
            for server in servers:
                # The warm-up tells how many requests a slow server can do in a time worth waiting for.
                count = cell.count // 8
                if number:
                    slow = int(rates[cell.name, server.name] * SAMPLE_SECONDS_MAX)
                    count = max(min(cell.count, slow), count)
                sample = measure(server, cell, count)
                rates[cell.name, server.name] = sample.operations_per_second
                if number:
                    samples[cell.name][server.name].append(sample)
        print(f"bench: {title}: round {number} of {rounds}{'' if number else ' (warm-up)'}", file=sys.stderr)
    return samples


def _median(samples: list[Sample], attribute: str) -> float:
    return float(statistics.median(getattr(sample, attribute) for sample in samples))


def summarise(samples: dict[str, dict[str, list[Sample]]]) -> list[dict[str, object]]:
    """A row per cell: medians, spread (slowest to fastest over the median), our ratio to each peer."""
    rows = []
    for cell, by_server in samples.items():
        ours = _median(by_server["holdfast"], "operations_per_second")
        row: dict[str, object] = {"cell": cell}
        for name, taken in by_server.items():
            rates = [sample.operations_per_second for sample in taken]
            median = statistics.median(rates)
            row[name] = {
                "operations_per_second": round(median),
                "spread": round((max(rates) - min(rates)) / median, 2),
                "cpu_us_per_operation": round(_median(taken, "cpu_microseconds"), 1),
                "holdfast_ratio": round(ours / median, 2),
            }
        rows.append(row)
    return rows


def render(rows: list[dict[str, object]], names: list[str], transport: str) -> Table:
    table = Table(title=f"NBD over {transport}: operations per second (CPU µs each); ratio = holdfast / peer")
    table.add_column("cell")
    for name in names:
        table.add_column(name, justify="right")
        if name != "holdfast":
            table.add_column("ratio", justify="right")
    for row in rows:
        texts = [str(row["cell"])]
        for name in names:
            cell = row[name]
            assert isinstance(cell, dict)
            texts.append(f"{cell['operations_per_second']:,} ({cell['cpu_us_per_operation']})")
            if name != "holdfast":
                texts.append(f"{cell['holdfast_ratio']:.2f}")
        table.add_row(*texts)
    return table


def compare(
    starters: dict[str, Starter], transport: Transport, rounds: int, size: int
) -> list[dict[str, object]]:
    """All servers on one transport, measured in turn. Raises OperatorError."""
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as name, contextlib.ExitStack() as stack:
        servers = []
        try:
            for key, start in starters.items():
                directory = Path(name) / key
                directory.mkdir()
                servers.append(stack.enter_context(start(directory, size, transport)))
                fill(servers[-1], size)
            return summarise(run_rounds(servers, rounds, transport))
        except (BenchFailed, subprocess.SubprocessError) as error:
            raise OperatorError(str(error)) from error


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1, 100), help="Counted rounds.")
@click.option("--size", default="256MiB", show_default=True, type=SIZE, help="Size of each server's disk.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of tables.")
def main(rounds: int, size: int, as_json: bool) -> None:
    """Measure diskd's NBD server, tracking on, beside itself without tracking, nbdkit and qemu-nbd."""
    if shutil.which("qemu-img") is None:
        raise OperatorError("qemu-img is the client of this benchmark: install qemu-utils")
    starters, missing = available()
    for line in missing:
        print(f"bench: left out: {line}", file=sys.stderr)
    tables = {transport: compare(starters, transport, rounds, size) for transport in TRANSPORTS}
    if as_json:
        print(json.dumps({"disk_bytes": size, "rounds": rounds, "tables": tables}, indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else 150)
    for transport, rows in tables.items():
        console.print(render(rows, list(starters), transport))
    console.print(
        f"Disk of {format_size(size)}, medians of {rounds} interleaved rounds, qemu-img bench as client;"
        f" {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}."
    )


if __name__ == "__main__":
    run_main(main)

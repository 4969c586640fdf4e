"""`make bench`: our NBD server beside its peers, interleaved in one run, as medians and ratios.

The client is `qemu-img bench` for all of them. Every round visits every server with the same cell before
the next cell, so that a noisy machine disturbs all alike; the first round warms up and is not counted.
Numbers from different runs or machines are not comparable; the ratios within one run are.
"""

import contextlib
import json
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
from holdfast.bench.servers import BenchFailed, Server, available, cpu_seconds

CLIENT_SECONDS_MAX = 120


@attrs.frozen
class Cell:
    """One workload; `qemu-img bench` knows no random addresses, so a stride scatters them."""

    name: str
    write: bool
    request_bytes: int
    depth: int
    count: int
    step_bytes: int


# A stride of a prime number of blocks visits the whole disk before it repeats: random enough for the servers.
STRIDE = 1021 * 4 * KiB
CELLS = [
    *(
        Cell(f"4 KiB {'write' if write else 'read'}, depth {depth}", write, 4 * KiB, depth, count, STRIDE)
        for write in (False, True)
        for depth, count in ((1, 4000), (8, 16000), (32, 16000))
    ),
    Cell("1 MiB read, depth 4", False, MiB, 4, 1000, MiB),
    Cell("1 MiB write, depth 4", True, MiB, 4, 500, MiB),
]


@attrs.frozen
class Sample:
    operations_per_second: float
    cpu_microseconds: float


def measure(server: Server, cell: Cell) -> Sample:
    """One run of the client. Raises BenchFailed."""
    argv = ["qemu-img", "bench", "-f", "raw", "-c", str(cell.count), "-d", str(cell.depth)]
    argv += ["-s", str(cell.request_bytes), "-S", str(cell.step_bytes), *(["-w"] if cell.write else [])]
    before = cpu_seconds(server.pid)
    done = subprocess.run(
        [*argv, server.uri], capture_output=True, text=True, check=False, timeout=CLIENT_SECONDS_MAX
    )
    match = re.search(r"Run completed in ([0-9.]+) seconds", done.stdout)
    if done.returncode or match is None:
        raise BenchFailed(f"{server.name}: qemu-img bench failed: {done.stderr.strip()[-200:]}")
    used = cpu_seconds(server.pid) - before
    return Sample(cell.count / float(match[1]), used / cell.count * 1e6)


def run_rounds(servers: list[Server], rounds: int) -> dict[str, dict[str, list[Sample]]]:
    """cell → server → samples of the counted rounds."""
    samples: dict[str, dict[str, list[Sample]]] = {cell.name: {s.name: [] for s in servers} for cell in CELLS}
    for number in range(rounds + 1):
        for cell in CELLS:
            for server in servers:
                sample = measure(server, cell)
                if number:
                    samples[cell.name][server.name].append(sample)
        print(f"bench: round {number} of {rounds}{'' if number else ' (warm-up)'}", file=sys.stderr)
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


def render(rows: list[dict[str, object]], names: list[str]) -> Table:
    table = Table(title="NBD over TCP, operations per second (CPU µs per operation); ratio = holdfast / peer")
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


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1, 100), help="Counted rounds.")
@click.option("--size", default="256MiB", show_default=True, type=SIZE, help="Size of each server's disk.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
def main(rounds: int, size: int, as_json: bool) -> None:
    """Measure diskd's NBD server, tracking on, beside nbdkit and qemu-nbd."""
    if shutil.which("qemu-img") is None:
        raise OperatorError("qemu-img is the client of this benchmark: install qemu-utils")
    starters, missing = available()
    for line in missing:
        print(f"bench: left out: {line}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as name, contextlib.ExitStack() as stack:
        try:
            servers = [stack.enter_context(start(Path(name), size)) for start in starters.values()]
            rows = summarise(run_rounds(servers, rounds))
        except (BenchFailed, subprocess.SubprocessError) as error:
            raise OperatorError(str(error)) from error
    if as_json:
        print(json.dumps({"disk_bytes": size, "rounds": rounds, "rows": rows}, indent=2))
        return
    console = Console()
    console.print(render(rows, list(starters)))
    console.print(
        f"Disk of {format_size(size)}, medians of {rounds} interleaved rounds, qemu-img bench as client."
    )


if __name__ == "__main__":
    run_main(main)

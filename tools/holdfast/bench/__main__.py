"""`make bench`: our NBD server beside its peers, interleaved in one run, as medians and ratios.

The client is `qemu-img bench` for all of them. Every disk is filled with data first, so that nobody gains by
reading holes, and a write cell finds all regions open. Every round visits every server with the same cell
before the next cell, so that a noisy machine disturbs all alike; the first round warms up and is not counted.
Every round begins with new servers and new disks, another one first: where its page cache happens to lie in
memory makes a disk up to a third slower for small writes than another, for as long as it is cached.
Numbers from different runs or machines are not comparable; the ratios within one run are.

What is printed is the part of docs/bench.md that holds numbers, as it stands there.
"""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from daemonkit.cli import SIZE, run_main
from daemonkit.errors import OperatorError
from daemonkit.units import format_size
from holdfast.bench import changes, states
from holdfast.bench.report import Row, compared, summarise
from holdfast.bench.servers import BenchFailed, Server, Starter, Transport, available
from holdfast.bench.workload import CELLS, SAMPLE_SECONDS_MAX, TRANSPORTS, Sample, fill, measure

Samples = dict[str, dict[str, list[Sample]]]


def run_rounds(starters: dict[str, Starter], transport: Transport, rounds: int, size: int) -> Samples:
    """cell → server → samples of the counted rounds. Raises BenchFailed."""
    samples: Samples = {cell.name: {name: [] for name in starters} for cell in CELLS}
    rates: dict[tuple[str, str], float] = {}
    names = list(starters)
    for number in range(rounds + 1):
        order = {name: starters[name] for name in names[number % len(names) :] + names[: number % len(names)]}
        with started(order, transport, size) as servers:
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
        warm = "" if number else " (warm-up)"
        print(f"bench: {transport}: round {number} of {rounds}{warm}", file=sys.stderr)
    return samples


@contextlib.contextmanager
def started(starters: dict[str, Starter], transport: Transport, size: int) -> Iterator[list[Server]]:
    """The servers in this order, their disks filled in this order."""
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as name, contextlib.ExitStack() as stack:
        servers = []
        for key, start in starters.items():
            directory = Path(name) / key
            directory.mkdir()
            servers.append(stack.enter_context(start(directory, size, transport)))
            fill(servers[-1], size)
        yield servers


PARTS = ("servers", "states", "changes")


def about(rounds: int, size: int) -> str:
    """The line that says where and how."""
    command = f"python -m holdfast.bench --rounds {rounds} --size {format_size(size)}"
    return (
        f"Seen with `{command}` on {os.cpu_count()} cores, Linux {platform.release()}, Python"
        f" {platform.python_version()}, at a load of {os.getloadavg()[2]:.1f} over the last 15 minutes.\n"
    )


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1, 100), help="Counted rounds.")
@click.option("--size", default="256MiB", show_default=True, type=SIZE, help="Size of each server's disk.")
@click.option("--part", multiple=True, type=click.Choice(PARTS), help="Only this. [default: everything]")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of Markdown tables.")
def main(rounds: int, size: int, part: tuple[str, ...], as_json: bool) -> None:
    """Measure diskd's NBD server, tracking on, beside itself without tracking, nbdkit and qemu-nbd; beside
    its own background work; and what tracking a large image takes."""
    if shutil.which("qemu-img") is None:
        raise OperatorError("qemu-img is the client of this benchmark: install qemu-utils")
    starters, missing = available()
    for line in missing:
        print(f"bench: left out: {line}", file=sys.stderr)
    parts = part or PARTS
    document: Row = {"disk_bytes": size, "rounds": rounds}
    sections = [about(rounds, size)]
    try:
        if "servers" in parts:
            tables = {
                transport: summarise(run_rounds(starters, transport, rounds, size))
                for transport in TRANSPORTS
            }
            document["tables"] = tables
            sections += [compared(title, rows, list(starters)) for title, rows in tables.items()]
        if "states" in parts:
            document["states"] = states.measure(rounds)
            sections.append(states.render(document["states"]))
        if "changes" in parts:
            document["changes"] = changes.measure(rounds)
            sections.append(changes.render(document["changes"]))
    except (BenchFailed, subprocess.SubprocessError) as error:
        raise OperatorError(str(error)) from error
    print(json.dumps(document, indent=2) if as_json else "\n".join(sections).rstrip())


if __name__ == "__main__":
    run_main(main)

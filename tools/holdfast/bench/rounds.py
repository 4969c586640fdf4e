"""Rounds of a comparison: every server does the same cell before the next cell, so that a noisy machine
disturbs all alike.

Every round begins with new servers and new disks, another one first: where its page cache happens to lie in
memory makes a disk up to a third slower for small writes than another, for as long as it is cached.
"""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from holdfast.bench.servers import Server, Starter, Transport
from holdfast.bench.workload import SAMPLE_SECONDS_MAX, Cell, Sample, fill, measure

# cell → server → samples
Samples = dict[str, dict[str, list[Sample]]]


def run_rounds(
    starters: dict[str, Starter], transport: Transport, rounds: int, size: int, cells: list[Cell]
) -> Samples:
    """cell → server → samples of the counted rounds, in their order. Raises BenchFailed."""
    samples: Samples = {cell.name: {name: [] for name in starters} for cell in cells}
    rates: dict[tuple[str, str], float] = {}
    names = list(starters)
    for number in range(rounds + 1):
        order = {name: starters[name] for name in names[number % len(names) :] + names[: number % len(names)]}
        with started(order, transport, size) as servers:
            for cell in cells:
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

"""`make bench`: our NBD server beside its peers, interleaved in one run, as medians and ratios.

The client is `qemu-img bench` for all of them. Every disk is filled with data first, so that nobody gains by
reading holes, and a write cell finds all regions open. Every round visits every server with the same cell
before the next cell (holdfast.bench.rounds); the first round warms up and is not counted.
Numbers from different runs or machines are not comparable; the ratios within one run are.

What is printed is the part of docs/bench.md that holds numbers, as it stands there.
"""

import json
import os
import platform
import shutil
import subprocess
import sys

import click

from daemonkit.cli import SIZE, run_main
from daemonkit.errors import OperatorError
from daemonkit.units import format_size
from holdfast.bench import changes, states, tracking
from holdfast.bench.report import Row, compared, summarise
from holdfast.bench.rounds import run_rounds
from holdfast.bench.servers import BenchFailed, available
from holdfast.bench.workload import CELLS, TRANSPORTS

PARTS = ("servers", "tracking", "states", "changes")


def about(rounds: int, size: int, part: tuple[str, ...]) -> str:
    """The line that says where and how."""
    parts = "".join(f" --part {name}" for name in part)
    command = f"python -m holdfast.bench --rounds {rounds} --size {format_size(size)}{parts}"
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
    sections = [about(rounds, size, part)]
    try:
        if "servers" in parts:
            tables = {
                transport: summarise(run_rounds(starters, transport, rounds, size, CELLS))
                for transport in TRANSPORTS
            }
            document["tables"] = tables
            sections += [compared(title, rows, list(starters)) for title, rows in tables.items()]
        if "tracking" in parts:
            document["tracking"] = tracking.measure(starters)
            sections.append(tracking.render(document["tracking"]))
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

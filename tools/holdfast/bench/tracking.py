"""What tracking costs a small write in open regions: the same server with and without it, in pairs.

The difference looked for is smaller than the noise of one sample. So there are many short rounds, each with
new disks and the other server first, and what counts is the ratio of the two samples of a round: its median,
and between which values half of the rounds lie.
"""

import statistics
from typing import Final

from daemonkit.units import KiB, MiB
from holdfast.bench.report import Row, markdown
from holdfast.bench.rounds import run_rounds
from holdfast.bench.servers import Starter
from holdfast.bench.workload import STRIDE, Cell

ROUNDS: Final = 24
DISK_BYTES: Final = 64 * MiB
CELLS: Final = [
    Cell(f"4 KiB write, depth {depth}", True, 4 * KiB, depth, count, STRIDE)
    for depth, count in ((1, 4000), (8, 16000), (32, 16000))
]


def measure(starters: dict[str, Starter]) -> list[Row]:
    """A row per cell: ratios of the rates (tracked over untracked) and of the CPU per operation."""
    both = {name: starters[name] for name in ("holdfast", "untracked")}
    rows: list[Row] = []
    for cell, samples in run_rounds(both, "Unix socket", ROUNDS, DISK_BYTES, CELLS).items():
        pairs = list(zip(samples["holdfast"], samples["untracked"], strict=True))
        rates = [on.operations_per_second / off.operations_per_second for on, off in pairs]
        costs = [on.cpu_microseconds / off.cpu_microseconds for on, off in pairs]
        rows.append({"cell": cell, "rate_ratio": _spread(rates), "cpu_ratio": _spread(costs)})
    return rows


def _spread(ratios: list[float]) -> Row:
    low, median, high = (round(value, 3) for value in statistics.quantiles(ratios, n=4))
    return {"median": median, "low": low, "high": high}


def render(rows: list[Row]) -> str:
    """Markdown."""
    lines = [[row["cell"], *(_text(row[name]) for name in ("rate_ratio", "cpu_ratio"))] for row in rows]
    title = f"Cost of tracking in open regions ({ROUNDS} pairs, Unix socket)"
    return markdown(title, ["cell", "rate, tracked / untracked", "CPU, tracked / untracked"], lines)


def _text(ratio: Row) -> str:
    return f"**{ratio['median']:.2f}** ({ratio['low']:.2f} to {ratio['high']:.2f})"

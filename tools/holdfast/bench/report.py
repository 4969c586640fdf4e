"""The NBD benchmark's numbers as rows, and as the Markdown of docs/bench.md."""

import statistics
from collections.abc import Iterable
from typing import Any

from holdfast.bench.workload import Sample

Row = dict[str, Any]


def _median(samples: list[Sample], attribute: str) -> float:
    return float(statistics.median(getattr(sample, attribute) for sample in samples))


def summarise(samples: dict[str, dict[str, list[Sample]]]) -> list[Row]:
    """A row per cell: medians, spread (slowest to fastest over the median), our ratio to each peer."""
    rows: list[Row] = []
    for cell, by_server in samples.items():
        ours = _median(by_server["holdfast"], "operations_per_second")
        row: Row = {"cell": cell}
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


def cell_text(cell: Row, *, is_ours: bool) -> str:
    """One cell of the Markdown tables."""
    text = f"{cell['operations_per_second']:,} ({cell['cpu_us_per_operation']} µs, ±{cell['spread']})"
    return text if is_ours else f"{text} **{cell['holdfast_ratio']:.2f}**"


def markdown(title: str, heads: list[str], lines: Iterable[list[str]]) -> str:
    """A section with one table; the first column is text."""
    rows = [f"| {' | '.join(line)} |" for line in (heads, *lines)]
    rows.insert(1, "|---|" + "---:|" * (len(heads) - 1))
    return "\n".join([f"## {title}", "", *rows, ""])


def compared(title: str, rows: list[Row], names: list[str]) -> str:
    """The comparison of all servers on one transport."""
    lines = [[row["cell"], *(cell_text(row[n], is_ours=n == "holdfast") for n in names)] for row in rows]
    return markdown(title, ["cell", *names], lines)

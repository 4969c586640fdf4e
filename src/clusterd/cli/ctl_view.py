"""Status documents and events for people: rich tables, nothing but what was answered."""

import sys
from typing import Any, Final

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from daemonkit.units import SECOND, format_duration

Document = dict[str, Any]
PIPE_WIDTH: Final = 160  # where stdout is no terminal, nothing shall be cut off at 80 columns

_STYLES: Final = {
    "up": "green",
    "online": "green",
    "joining": "cyan",
    "starting": "cyan",
    "stopping": "cyan",
    "migrating": "cyan",
    "paused": "yellow",
    "leaving": "yellow",
    "isolated": "bold yellow",
    "unmonitored": "bold yellow",
    "stalled": "bold yellow",
    "held": "bold magenta",
    "quarantined": "bold magenta",
    "failed": "bold red",
    "down": "red",
    "offline": "dim",
    "unknown": "bold yellow",
    "ok": "green",
}
_LINKS: Final = {"both": "✓", "in": "← only", "out": "→ only", "none": "✗"}


def console() -> Console:
    """Standard output, as wide as it is, or wide enough."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def state_text(state: object) -> Text:
    """A state in its colour."""
    return Text(str(state), style=_STYLES.get(str(state), ""))


def ago(seconds: object) -> str:
    """A duration for people, to two units: ``3m 20s``, ``1.4s``; empty for None."""
    if not isinstance(seconds, int | float):
        return ""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = int(seconds)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "m"), (whole % 60, "s")]
    first = next((index for index, (value, _) in enumerate(parts) if value), 3)
    return " ".join(f"{value}{unit}" for value, unit in parts[first : first + 2] if value)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def nodes_table(document: Document) -> Table:
    """One row per node; what runs out is shown as what remains."""
    table = _table("NODE", "STATE", "SINCE", "PRESENT", "EXITS", "REMAINS", "REASON")
    for name, node in sorted(document["nodes"].items()):
        remains = [
            f"{what} {ago(node.get(key))}"
            for key, what in (
                ("window_remaining_s", "window"),
                ("quarantine_remaining_s", "quarantine"),
            )
            if node.get(key) is not None
        ]
        mark = " *" if name == document.get("leader") else ""
        table.add_row(
            name + mark,
            state_text(node["state"]),
            ago(node.get("since_s")),
            "yes" if node.get("present") else "no",
            str(node.get("ungraceful_exits") or 0),
            ", ".join(remains),
            node.get("reason") or "",
        )
    return table


def vms_table(document: Document) -> Table:
    """One row per VM."""
    table = _table("VM", "STATE", "WANTED", "ON", "EPOCH", "PID", "SINCE", "REMAINS", "LAST I/O", "REASON")
    for name, vm in sorted(document["vms"].items()):
        table.add_row(
            name,
            state_text(vm["state"]),
            str(vm.get("desired") or ""),
            vm.get("owner") or "",
            _number(vm.get("epoch")),
            _number(vm.get("pid")),
            ago(vm.get("since_s")),
            ago(vm.get("window_remaining_s")),
            ago(vm.get("last_io_age_s")),
            vm.get("reason") or "",
        )
    return table


def _number(value: object) -> str:
    return "" if value is None else str(value)


def held_table(held: list[Document]) -> Table:
    """What the cluster would do, but must not, and what would end that."""
    table = _table("HELD", "SUBJECT", "SINCE", "WHY", "ENDS WHEN")
    for hold in held:
        table.add_row(
            hold["id"], str(hold["subject"]), ago(hold.get("since_s")), hold["why"], hold["ends_when"]
        )
    return table


def reachability_table(document: Document) -> Table | None:
    """Who hears whom; None where everybody hears everybody."""
    matrix = document.get("reachability") or {}
    if all(link == "both" for row in matrix.values() for link in row.values()):
        return None
    names = sorted(matrix)
    table = _table("HEARS", *names)
    for name in names:
        row = matrix[name]
        table.add_row(
            name,
            *("·" if other == name else _LINKS.get(row.get(other), "?") for other in names),
        )
    return table


def status_view(document: Document) -> Group:
    """The whole status."""
    head = Text.assemble(
        ("cluster ", "dim"),
        (str(document["cluster"]), "bold"),
        ("   leader ", "dim"),
        document.get("leader") or "none",
        ("   store ", "dim"),
        state_text(document.get("store")),
        ("   answered by ", "dim"),
        str(document["answered_by"]),
    )
    parts: list[Any] = [head, Text(), nodes_table(document), Text()]
    parts.append(vms_table(document) if document["vms"] else Text("no VMs", style="dim"))
    if document.get("held"):
        parts += [Text(), held_table(document["held"])]
    links = reachability_table(document)
    if links is not None:
        parts += [Text(), links]
    return Group(*parts)


def event_line(event: Document) -> Text:
    """One event on one line."""
    fields = "  ".join(
        f"{key}={value}" for key, value in event["fields"].items() if value not in (None, "", [], {})
    )
    clock = str(event["time"]).partition("T")[2].partition("+")[0]
    return Text.assemble(
        (clock, "dim"), "  ", f"{event['node']:<8}", (f"{event['event']:<26}", "bold"), fields
    )


def property_text(name: str, value: object) -> str:
    """A property's value as ``set`` would read it."""
    if isinstance(value, float) and name not in ("quarantine_cap", "mass_failure_brake"):
        return format_duration(round(value * SECOND))
    return str(value)

"""`make demo`: a live timeline, then a table; exits non-zero if anything was not as promised."""

import contextlib
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import click
from rich.console import Console
from rich.table import Table

from daemonkit.cli import run_main
from daemonkit.units import format_size
from holdfast.demo import cables, points
from holdfast.demo.stage import DemoFailed, Row, Stage
from holdfast.demo.story import Story

CHAPTERS: list[Callable[[Story], None]] = [
    cables.begin,
    points.full_backup,
    cables.short_cut,
    cables.long_cut,
    cables.flapping,
    points.differential,
    points.killed_daemon,
    points.restores,
    cables.end,
]


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"


def _size(value: int | None) -> str:
    return "" if value is None else format_size(value)


def table_of(rows: list[Row]) -> Table:
    """What happened, as the README shows it."""
    table = Table(title="What happened", title_justify="left")
    table.add_column("event")
    table.add_column("result")
    for heading in ("VM downtime", "window", "without a window", "changed", "sent"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.what,
            row.result,
            _seconds(row.downtime_s),
            _seconds(row.window_s),
            _seconds(row.without_window_s),
            _size(row.changed_bytes),
            _size(row.sent_bytes),
        )
    return table


NOTE = (
    "VM downtime: the longest time between two acknowledged writes of the guest during the event.\n"
    "Without a window the short cut would have been a failover: that column is the downtime measured in\n"
    f"the long cut. The guest takes {cables.BOOT_SECONDS:g} s to boot; put your VM's time in its place."
)


class _Interrupted(Exception):
    """SIGTERM or SIGINT: what was started ends with us."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _Interrupted


def _end(stage: Stage) -> None:
    with contextlib.suppress(DemoFailed, OSError, subprocess.SubprocessError):
        stage.attempt("lab", "down", "--dir", str(stage.lab_directory))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> int:
    """Run the main job once, on processes of its own: from a pulled cable to a restored backup.

    Takes under two minutes. It prints a timeline and then a table; it exits 0 if all of it was so, 1 if
    anything was not, and leaves no process behind.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    return run()


def run() -> int:
    # Wide enough for the table, also where the output is no terminal.
    console = Console(width=max(116, Console().width))
    directory = Path(tempfile.mkdtemp(prefix="holdfast-demo-"))
    stage = Stage(directory, console)
    story = Story(stage)
    try:
        for chapter in CHAPTERS:
            chapter(story)
    except (DemoFailed, subprocess.SubprocessError, OSError) as error:
        console.print(f"\n[bold red]demo: failed:[/] {error}", highlight=False, soft_wrap=True)
        console.print(f"demo: what it left is in {directory}", highlight=False, soft_wrap=True)
        _end(stage)
        return 1
    except _Interrupted:
        _end(stage)
        shutil.rmtree(directory, ignore_errors=True)
        return 130
    except BaseException:  # a defect of the demo: it shows, but no process stays behind
        _end(stage)
        raise
    shutil.rmtree(directory, ignore_errors=True)
    console.print()
    console.print(table_of(stage.rows))
    console.print(NOTE, highlight=False)
    console.print(f"\ndemo: all of it is so, in {time.monotonic() - stage.started_s:.0f} s")
    return 0


if __name__ == "__main__":
    run_main(command)

"""How long jobs show how far they are: a bar on a terminal, with --json one line of JSON for each report, and
for whoever reads our lines in a file or through a pipe one plain line every ten seconds."""

import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import attrs
import click

from daemonkit.units import format_size

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

LINE_SECONDS: Final = 10.0
_DRAW_SECONDS: Final = 0.1


@attrs.define
class Progress:
    """Give it to ``on_progress``; call ``finish`` before the result is printed.

    What it is given are dicts: ``step``, ``done_bytes`` and ``total_bytes`` (None where that is not known)
    are drawn, whatever else there is is shown as words.
    """

    as_json: bool
    _clock: Callable[[], float] = time.monotonic
    _next: float | None = None
    _bar: "Bar | None" = None

    def __call__(self, value: Any) -> None:
        if self.as_json:
            click.echo(json.dumps({"progress": value}))
        elif isinstance(value, dict):
            now = self._clock()
            on_terminal = sys.stderr.isatty()
            if self._next is None:
                self._next = now if on_terminal else now + LINE_SECONDS
            if now >= self._next:
                self._next = now + (_DRAW_SECONDS if on_terminal else LINE_SECONDS)
                if on_terminal:
                    self._draw(value)
                else:
                    click.echo(line_of(value), err=True)

    def _draw(self, value: dict[str, Any]) -> None:
        if self._bar is None:
            self._bar = _new_bar()
            self._bar.start()
        done, total = value.get("done_bytes"), value.get("total_bytes")
        words = str(value.get("step", "")) if isinstance(done, int) else line_of(value)
        if not self._bar.task_ids:
            self._bar.add_task(words, total=None)
        self._bar.update(self._bar.task_ids[0], description=words, completed=done or 0, total=total)
        self._bar.refresh()

    def finish(self) -> None:
        """Leave the terminal clean."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _new_bar() -> "Bar":
    from rich import progress  # Kept out of --help's way.
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        auto_refresh=False,
        transient=True,
    )


def line_of(value: dict[str, Any]) -> str:
    """One report in words."""
    done, total = value.get("done_bytes"), value.get("total_bytes")
    if not isinstance(done, int):
        return " ".join(str(part) for part in value.values())
    step = f"{value['step']}: " if value.get("step") else ""
    if not isinstance(total, int):
        return f"{step}{format_size(done)}"
    share = 100 * done // total if total else 100
    return f"{step}{format_size(done)} of {format_size(total)} ({share} %)"

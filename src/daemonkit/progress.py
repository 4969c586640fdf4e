"""Long jobs on a terminal: one line that is rewritten; with --json, one line of JSON each; else silence."""

import json
import sys
from typing import Any

import attrs
import click

from daemonkit.units import format_size


@attrs.define
class Progress:
    """Give it to ``on_progress``; call ``finish`` before the result is printed."""

    as_json: bool
    _shown: bool = False

    def __call__(self, value: Any) -> None:
        if self.as_json:
            click.echo(json.dumps({"progress": value}))
        elif sys.stderr.isatty() and isinstance(value, dict):
            click.echo("\r\x1b[K" + _line(value), nl=False, err=True)
            self._shown = True

    def finish(self) -> None:
        """Leave the line clean."""
        if self._shown:
            click.echo("\r\x1b[K", nl=False, err=True)
            self._shown = False


def _line(value: dict[str, Any]) -> str:
    done, total = value.get("done_bytes"), value.get("total_bytes")
    if isinstance(done, int) and isinstance(total, int):
        share = 100 * done // total if total else 100
        return f"{value.get('step', '')} {format_size(done)} of {format_size(total)} ({share} %)"
    return " ".join(str(part) for part in value.values())

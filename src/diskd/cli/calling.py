"""What all verbs of diskctl share: where diskd is, how it is asked, how tables are printed."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import attrs
import click

from daemonkit.cli import call_once, run_async
from daemonkit.errors import UsageError
from daemonkit.methods import Method
from daemonkit.ports import Address

P = TypeVar("P")
R = TypeVar("R")

CONTROL_DEFAULT = "127.0.0.1:10810"
# Copies and merges take as long as they take; the end of the connection ends the wait at once.
SECONDS_UNBOUNDED = 1e9
# A cut waits for writes in flight and durable records, a lease for writes of older epochs: seconds at worst.
SECONDS_DEFAULT = 60.0

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@attrs.frozen
class Diskd:
    """The diskd that this command speaks to; click hands it to the verbs."""

    address: Address
    key: bytes | None

    def call(
        self,
        method: Method[P, R],
        params: P,
        *,
        seconds_max: float = SECONDS_DEFAULT,
        on_progress: Callable[[Any], None] | None = None,
    ) -> R:
        """One call. Raises CallRefused or CallFailed, which run_main prints."""
        return run_async(
            lambda: call_once(
                self.address,
                method,
                params,
                key=self.key,
                seconds_max=seconds_max,
                on_progress=on_progress,
            )
        )


pass_diskd = click.make_pass_decorator(Diskd)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns; nothing but the head where there are no rows."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def outcome_of(*, keep_point: bool, discard: bool) -> Literal["keep", "discard"]:
    """How a checkpoint ends: by default as if it had not been tried. Raises UsageError for both."""
    if keep_point and discard:
        raise UsageError("--keep-point and --discard exclude each other")
    return "keep" if keep_point else "discard"

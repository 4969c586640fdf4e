"""`python -m holdfast.crash KIND --seed N --lives L`: one story, or several, with what happened in each."""

import time

import click

from daemonkit.cli import run_main
from daemonkit.errors import OperatorError
from holdfast.crash import stories
from holdfast.crash.oracle import Violation


@click.command()
@click.argument("kind", type=click.Choice(stories.NAMES))
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--lives", type=int, default=stories.LIVES, show_default=True, help="Until the story ends.")
@click.option("--times", type=int, default=1, show_default=True, help="Seeds from this one on.")
def main(kind: str, seed: int, lives: int, times: int) -> None:
    """Play stories of processes that crash; exit 1 with the first rule that one breaks."""
    for number in range(seed, seed + times):
        begun = time.monotonic()
        try:
            told = stories.run(kind, number, lives=lives)
        except* Violation as group:
            raise OperatorError(f"seed {number}: {_first(group)}") from None
        seen = ", ".join(f"{count} {what}" for what, count in told.items())
        print(f"{kind} {number}: {time.monotonic() - begun:.1f} s: {seen}", flush=True)


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    run_main(main)

"""`python -m holdfast.crash KIND --seed N --lives L`: one story, for replaying what a hunt has found."""

import time
from functools import partial

import click
import trio

from daemonkit.cli import run_main
from daemonkit.errors import OperatorError
from holdfast.crash.oracle import Violation
from holdfast.crash.story import play


@click.command()
@click.argument("kind", type=click.Choice(["kill", "power"]))
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--lives", type=int, default=4, show_default=True)
@click.option("--times", type=int, default=1, show_default=True, help="Seeds from this one on.")
def main(kind: str, seed: int, lives: int, times: int) -> None:
    """Play stories of a crashing diskd; exit 1 with the first rule that one breaks."""
    for number in range(seed, seed + times):
        begun = time.monotonic()
        try:
            told = trio.run(partial(play, number, lives, can_lose_power=kind == "power"))
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

"""`make hunt SECONDS=n`: random histories with fresh seeds, as many as fit, until one breaks a rule.

The histories are those of the tests: the whole cluster under random faults (clusterd.sim.chaos), tracking
crashed anywhere, fork and merge crashed anywhere, and both at once (diskd.sim). A seed fixes a history
completely, the kind of it included, so that `--seed N` replays it. Nothing here waits for anything: all of it
is virtual time.
"""

import secrets
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

import click

from clusterd.sim.chaos import run_chaos
from daemonkit.cli import run_main
from daemonkit.errors import OperatorError
from diskd.sim import fork_story, overlay_story, tracking_story

# Below this a seed is easy to write down, and far more than one hunt gets through.
SEEDS: Final = 10**9
CHAOS_SECONDS: Final = 20
REPORT_SECONDS: Final = 30.0


def _cluster(seed: int) -> None:
    result = run_chaos(seed, seconds=CHAOS_SECONDS)
    if result.failures:
        raise AssertionError("; ".join(result.failures))


def _tracking(seed: int) -> None:
    tracking_story.run_seed(seed)


def _merging(seed: int) -> None:
    overlay_story.run_seed(seed)


def _tracked_merging(seed: int) -> None:
    fork_story.run_seed(seed)


# One history of the cluster takes as long as some dozens of the others.
KINDS: Final[tuple[tuple[str, Callable[[int], None]], ...]] = (
    ("cluster", _cluster),
    *(("tracking", _tracking),) * 6,
    *(("tracked merging", _tracked_merging),) * 3,
    *(("merging", _merging),) * 9,
)


def kind_of(seed: int) -> str:
    """Which kind of history a seed stands for."""
    return KINDS[seed % len(KINDS)][0]


def play(seed: int) -> str | None:
    """One history; what went wrong, or None."""
    try:
        KINDS[seed % len(KINDS)][1](seed)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the hunt is after
        return f"{type(error).__name__}: {error}"
    return None


def hunt(seconds: float, first: int, *, play: Callable[[int], str | None] = play) -> Counter[str]:
    """How many histories of each kind were played. Raises OperatorError at the first that fails."""
    begun = told = time.monotonic()
    played: Counter[str] = Counter()
    seed = first
    while not played or time.monotonic() - begun < seconds:
        problem = play(seed)
        if problem is not None:
            raise OperatorError(
                f"seed {seed} ({kind_of(seed)}): {problem};"
                f" replay it: .venv/bin/python -m holdfast.bench.hunt --seed {seed}"
            )
        played[kind_of(seed)] += 1
        seed = (seed + 1) % SEEDS
        if time.monotonic() - told >= REPORT_SECONDS:
            told = time.monotonic()
            print(f"hunt: {told - begun:.0f} s, {played.total()} histories, nothing found", flush=True)
    return played


@click.command()
@click.option(
    "--seconds", type=click.FloatRange(min=0), default=60.0, envvar="HUNT_SECONDS", show_default=True,
    help="How long to look.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0, SEEDS - 1), help="Replay one history and stop.")
@click.option("--from", "first", type=click.IntRange(0, SEEDS - 1), help="The first seed (default: random).")
def main(seconds: float, seed: int | None, first: int | None) -> None:
    """Play random histories until one breaks a rule, or the time is over (exit 0).

    On a find: exit 1, with the seed and the command that replays it.
    """
    if seed is not None:
        problem = play(seed)
        if problem is not None:
            raise OperatorError(f"seed {seed} ({kind_of(seed)}): {problem}")
        print(f"hunt: seed {seed} ({kind_of(seed)}): nothing found")
        return
    start = secrets.randbelow(SEEDS) if first is None else first
    print(f"hunt: {seconds:g} s, from seed {start}", flush=True)
    played = hunt(seconds, start)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(played.items()))
    print(f"hunt: nothing found in {played.total()} histories ({kinds}), from seed {start}")


if __name__ == "__main__":
    run_main(main)

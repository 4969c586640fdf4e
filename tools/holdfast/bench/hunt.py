"""`make hunt SECONDS=n`: random histories with fresh seeds, as many as fit, and what each kind of them found.

Some are played in virtual time: the whole cluster under random faults (clusterd.sim.chaos), tracking crashed
anywhere, or with older copies of its files put back, fork and merge crashed anywhere, and both at once
(diskd.sim). A seed fixes such a history completely. The others are real processes that are killed, lose
their power, or lose their peers (holdfast.crash): there the seed fixes the plan, and what a kill meets is
the scheduler's.

Each kind has a share of the time. One that has failed is not played again, the others go on. For every kind
there is a line at the end, and for every find the command that plays it again.

`make hunt BREAK=NAME` plays them in a copy of the tree in which one rule is broken on purpose (breaks.py),
until the first find: so that anybody can see that the hunt would find it.
"""

import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import attrs
import click

from clusterd.sim.chaos import run_chaos
from daemonkit.cli import run_main
from daemonkit.errors import OperatorError
from diskd.sim import fork_story, overlay_story, rollback_story, tracking_story
from holdfast.bench import broken_rules
from holdfast.bench.breaks import BREAKS as DISK_BREAKS
from holdfast.bench.breaks import Break
from holdfast.bench.cluster_breaks import CLUSTER_BREAKS
from holdfast.crash import stories

BREAKS: Final = (*CLUSTER_BREAKS, *DISK_BREAKS)

# Below this a seed is easy to write down, and far more than one hunt gets through.
SEEDS: Final = 10**9
CHAOS_SECONDS: Final = 20
REPORT_SECONDS: Final = 30.0

Play = Callable[[int], Counter[str] | None]


@attrs.frozen
class Kind:
    """``play`` raises whatever it finds; what it returns is counted in the kind's line. ``seconds``: what a
    history takes, until one has told: so that many short ones come before the first long one."""

    name: str
    share: float
    play: Play
    seconds: float = 0.0


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


# A minute has room for hundreds of simulated histories and, where the machine is idle, for one or two of each
# kind with real processes.
KINDS: Final = (
    Kind("cluster", 1, _cluster),
    Kind("tracking", 3, _tracking),
    Kind("older-copies", 1, rollback_story.run_seed),
    Kind("tracked-merging", 2, _tracked_merging),
    Kind("merging", 1, _merging),
    # Of these the power losses are due first: they ask most of what the others ask, and more.
    *(
        Kind(name, 4 if name == "power-loss" else 3, partial(stories.run, name), seconds=5.0)
        for name in stories.NAMES
    ),
)


@attrs.define
class Tally:
    """What one kind has come to so far."""

    kind: Kind
    first: int
    played: int = 0
    seconds: float = 0.0
    told: Counter[str] = attrs.Factory(Counter)
    problem: str | None = None

    def play(self, clock: Callable[[], float], broken: str | None) -> None:
        """The next history."""
        begun, seed = clock(), (self.first + self.played) % SEEDS
        self.problem = play(self.kind, seed, self.told, broken)
        self.played += 1
        self.seconds += clock() - begun

    @property
    def due(self) -> float:
        """How much of its share it will have had after one more history: the least is next."""
        typical = self.seconds / self.played if self.played else self.kind.seconds
        return (self.seconds + typical) / self.kind.share

    def line(self) -> str:
        """For the summary."""
        seeds = f"{self.first} to {(self.first + self.played - 1) % SEEDS}" if self.played else "none"
        told = "".join(f", {count} {what}" for what, count in sorted(self.told.items()))
        found = "0 failures" if self.problem is None else f"1 failure: {self.problem}"
        return f"{self.kind.name}: {self.played} histories (seeds {seeds}){told}: {found}"


def play(kind: Kind, seed: int, told: Counter[str], broken: str | None = None) -> str | None:
    """One history; what went wrong and how to see it again, or None. ``broken``: the break this tree has."""
    try:
        told.update(kind.play(seed) or {})
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the hunt is after
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        replay = f".venv/bin/python -m holdfast.bench.hunt --kind {kind.name} --seed {seed}"
        replay += f" --break {broken}" if broken is not None else ""
        return f"seed {seed}: {type(error).__name__}: {error}; replay it: {replay}"
    return None


def hunt(
    seconds: float,
    first: int,
    kinds: tuple[Kind, ...] = KINDS,
    *,
    clock: Callable[[], float] = time.monotonic,
    broken: str | None = None,
) -> list[Tally]:
    """Play until the time is over, or every kind has failed (with a break: one): always the one most behind
    its share."""
    begun = told = clock()
    tallies = [Tally(kind, first) for kind in kinds]
    while clock() - begun < seconds or not any(tally.played for tally in tallies):
        left = [tally for tally in tallies if tally.problem is None]
        if not left:
            break
        tally = min(left, key=lambda tally: tally.due)
        tally.play(clock, broken)
        if tally.problem is not None:
            print(f"hunt: {tally.line()}", flush=True)
            if broken is not None:
                print(f"hunt: {broken} was found after {clock() - begun:.0f} s", flush=True)
                break
        if clock() - told >= REPORT_SECONDS:
            told = clock()
            histories = sum(tally.played for tally in tallies)
            print(f"hunt: {told - begun:.0f} s, {histories} histories", flush=True)
    return tallies


def hunt_broken(break_: Break, arguments: list[str]) -> int:
    """The same hunt in a copy of the tree with this break; its exit code. Raises OperatorError."""
    print(f"hunt: broken on purpose: {break_.name} ({break_.rule}): {break_.what}", flush=True)
    with tempfile.TemporaryDirectory(prefix=broken_rules.PREFIX) as name:
        tree = Path(name)
        broken_rules.copy_tree(tree)
        if (reason := broken_rules.apply(break_, tree)) is not None:
            raise OperatorError(f"{break_.name} is {reason}")
        path = f"{tree / 'src'}:{tree / 'tools'}"
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "HUNT_BREAK": ""}
        argv = [sys.executable, "-m", "holdfast.bench.hunt", *arguments, "--broken", break_.name]
        return subprocess.run(argv, cwd=tree, env=environment, check=False).returncode


@click.command()
@click.option(
    "--seconds", type=click.FloatRange(min=0), default=60.0, envvar="HUNT_SECONDS", show_default=True,
    help="How long to look.",
)  # fmt: skip
@click.option("--kind", "names", multiple=True, type=click.Choice([kind.name for kind in KINDS]),
              help="Only this kind; repeatable.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, SEEDS - 1), help="Replay one history of one --kind.")
@click.option("--from", "first", type=click.IntRange(0, SEEDS - 1), help="The first seed (default: random).")
@click.option("--break", "break_name", type=click.Choice([break_.name for break_ in BREAKS]), metavar="NAME",
              envvar="HUNT_BREAK", help="In a copy of the tree with this rule broken (holdfast.bench.breaks),"
              " until the first find.")  # fmt: skip
@click.option("--broken", type=str, hidden=True)
def main(
    seconds: float,
    names: tuple[str, ...],
    seed: int | None,
    first: int | None,
    break_name: str | None,
    broken: str | None,
) -> None:
    """Play random histories until the time is over. A line per kind; exit 1 where one has broken a rule."""
    kinds = tuple(kind for kind in KINDS if not names or kind.name in names)
    if break_name is not None:
        (break_,) = (one for one in BREAKS if one.name == break_name)
        arguments = ["--seconds", str(seconds), *(part for name in names for part in ("--kind", name))]
        for option, number in (("--seed", seed), ("--from", first)):
            arguments += [option, str(number)] if number is not None else []
        raise SystemExit(hunt_broken(break_, arguments))
    if seed is not None:
        replay(kinds, seed, broken)
        return
    start = secrets.randbelow(SEEDS) if first is None else first
    print(f"hunt: {seconds:g} s, from seed {start}", flush=True)
    tallies = hunt(seconds, start, kinds, broken=broken)
    for tally in tallies:
        print(f"hunt: {tally.line()}")
    failed = [tally.kind.name for tally in tallies if tally.problem is not None]
    if failed:
        raise OperatorError(f"rules were broken: {', '.join(failed)}")
    print(f"hunt: nothing found in {sum(tally.played for tally in tallies)} histories")


def replay(kinds: tuple[Kind, ...], seed: int, broken: str | None) -> None:
    """One history of one kind. Raises OperatorError with what it found."""
    if len(kinds) != 1:
        raise OperatorError("a seed is one of one kind: name it with --kind")
    problem = play(kinds[0], seed, Counter(), broken)
    if problem is not None:
        raise OperatorError(f"{kinds[0].name}: {problem}")
    print(f"hunt: {kinds[0].name}: seed {seed}: nothing found")


if __name__ == "__main__":
    run_main(main)

"""`make hunt`: fresh histories of every kind, a line for each, and the command that replays a find."""

import subprocess
import sys
from collections import Counter
from itertools import count

import pytest

from holdfast.bench import hunt
from holdfast.bench.hunt import Kind


def fake_clock():
    """A second for every look at it."""
    ticks = count()
    return lambda: float(next(ticks))


def harmless(seed: int) -> Counter[str]:
    return Counter({"crashes": 2})


def test_what_is_hunted() -> None:
    assert [kind.name for kind in hunt.KINDS] == [
        "cluster",
        "tracking",
        "older-copies",
        "tracked-merging",
        "merging",
        "killed",
        "power-loss",
        "backups",
        "leases",
    ]


def test_time_goes_by_shares() -> None:
    kinds = (Kind("one", 1, harmless), Kind("three", 3, harmless))
    one, three = hunt.hunt(400, 7, kinds, clock=fake_clock())
    assert one.played > 10
    assert 2.5 < three.played / one.played < 3.5


def test_a_find_ends_its_kind_and_names_its_seed(capsys: pytest.CaptureFixture[str]) -> None:
    played: list[int] = []

    def fails(seed: int) -> None:
        played.append(seed)
        if seed == 2:
            raise ExceptionGroup("in a nursery", [AssertionError("a change was missed")])

    bad, good = hunt.hunt(
        100, hunt.SEEDS - 2, (Kind("bad", 1, fails), Kind("good", 1, harmless)), clock=fake_clock()
    )
    assert played == [hunt.SEEDS - 2, hunt.SEEDS - 1, 0, 1, 2]
    assert good.played > bad.played
    assert good.line() == (
        f"good: {good.played} histories (seeds {hunt.SEEDS - 2} to {good.played - 3}),"
        f" {2 * good.played} crashes: 0 failures"
    )
    assert bad.line().endswith(
        "1 failure: seed 2: AssertionError: a change was missed;"
        " replay it: .venv/bin/python -m holdfast.bench.hunt --kind bad --seed 2"
    )
    assert "a change was missed" in capsys.readouterr().out, "told at once"


@pytest.mark.slow
def test_the_command_replays_a_seed_and_hunts() -> None:
    command = [sys.executable, "-m", "holdfast.bench.hunt", "--kind", "merging"]
    done = subprocess.run([*command, "--seed", "10"], capture_output=True, text=True, check=True)
    assert done.stdout == "hunt: merging: seed 10: nothing found\n"
    done = subprocess.run(
        [*command, "--seconds", "0", "--from", "1"], capture_output=True, text=True, check=True
    )
    assert "hunt: merging: 1 histories (seeds 1 to 1): 0 failures\n" in done.stdout

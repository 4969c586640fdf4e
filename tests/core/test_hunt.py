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


def test_short_histories_come_before_the_first_long_one() -> None:
    order: list[str] = []

    def told(name: str):
        return lambda seed: order.append(name)

    kinds = (Kind("short", 1, told("short")), Kind("long", 3, told("long"), seconds=60))
    hunt.hunt(150, 7, kinds, clock=fake_clock())
    assert order[:10] == ["short"] * 10
    assert "long" in order


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


def test_with_a_rule_broken_one_find_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(seed: int) -> None:
        raise AssertionError("a change was missed")

    kinds = (Kind("good", 1, harmless), Kind("bad", 1, fails))
    tallies = hunt.hunt(100, 4, kinds, clock=fake_clock(), broken="marks-turned-off")
    assert [tally.played for tally in tallies] == [1, 1]
    told = capsys.readouterr().out
    assert "--kind bad --seed 4 --break marks-turned-off" in told
    assert "found after" in told


@pytest.mark.slow
@pytest.mark.parametrize("name", ["marks-turned-off", "region-closed-too-early", "closed-on-disk-first"])
def test_a_rule_of_tracking_broken_on_purpose_is_found(name: str) -> None:
    """README's promise, on simulated hardware; the whole hunt has its other kinds in addition."""
    command = [sys.executable, "-m", "holdfast.bench.hunt", "--kind", "tracking", "--break", name]
    done = subprocess.run([*command, "--from", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "changed and are not reported" in done.stdout
    seed = done.stdout.split("--seed ")[1].split()[0]
    assert f"--seed {seed} --break {name}" in done.stdout
    again = subprocess.run([*command, "--seed", seed], capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "changed and are not reported" in again.stderr


@pytest.mark.slow
def test_the_command_replays_a_seed_and_hunts() -> None:
    command = [sys.executable, "-m", "holdfast.bench.hunt", "--kind", "merging"]
    done = subprocess.run([*command, "--seed", "10"], capture_output=True, text=True, check=True)
    assert done.stdout == "hunt: merging: seed 10: nothing found\n"
    done = subprocess.run(
        [*command, "--seconds", "0", "--from", "1"], capture_output=True, text=True, check=True
    )
    assert "hunt: merging: 1 histories (seeds 1 to 1): 0 failures\n" in done.stdout

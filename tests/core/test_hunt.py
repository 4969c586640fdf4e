"""`make hunt`: fresh histories until one fails, and the seed that replays it."""

import subprocess
import sys
from collections import Counter

import pytest

from daemonkit.errors import OperatorError
from holdfast.bench import hunt


def test_every_kind_of_history_is_played() -> None:
    assert {hunt.kind_of(seed) for seed in range(len(hunt.KINDS))} == {
        "cluster",
        "tracking",
        "merging",
        "tracked merging",
    }


def test_it_ends_with_the_first_find_and_names_its_seed() -> None:
    played: list[int] = []

    def play(seed: int) -> str | None:
        played.append(seed)
        return "a change was missed" if seed == 2 else None

    with pytest.raises(OperatorError, match=r"seed 2 .*a change was missed.*--seed 2$"):
        hunt.hunt(1000, hunt.SEEDS - 2, play=play)
    assert played == [hunt.SEEDS - 2, hunt.SEEDS - 1, 0, 1, 2]


def test_it_counts_what_it_played() -> None:
    assert hunt.hunt(0, 1, play=lambda _: None) == Counter({hunt.kind_of(1): 1})


@pytest.mark.slow
def test_the_command_replays_a_seed_and_hunts() -> None:
    command = [sys.executable, "-m", "holdfast.bench.hunt"]
    done = subprocess.run([*command, "--seed", "10"], capture_output=True, text=True, check=True)
    assert done.stdout == "hunt: seed 10 (merging): nothing found\n"
    done = subprocess.run(
        [*command, "--seconds", "0", "--from", "1"], capture_output=True, text=True, check=True
    )
    assert "nothing found in 1 histories" in done.stdout

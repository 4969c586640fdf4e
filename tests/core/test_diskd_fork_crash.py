"""T2 and T3 while a checkpoint stands and is merged: tracking and overlay crash together, anywhere."""

import pytest

from diskd.sim.fork_story import play, run_seed
from diskd.sim.tracking_story import KINDS


def test_without_a_crash_nothing_is_missed() -> None:
    assert play(1, None, "power") > 30


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_crash_at_every_step(kind: str) -> None:
    for crash_at in range(play(4, None, kind)):
        play(4, crash_at, kind)


@pytest.mark.slow
def test_crashes_in_many_histories() -> None:
    for seed in range(60):
        run_seed(seed)

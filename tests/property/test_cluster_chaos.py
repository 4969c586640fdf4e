"""Random faults in the simulator: the invariants hold throughout, and everything comes to rest (L1).

``make hunt`` tries many more seeds; one that fails there is added to ``OLD_SEEDS``.
"""

import pytest

from clusterd.sim.chaos import run_chaos

SEEDS = range(1000, 1060)
PER_HOST_SEEDS = range(2000, 2020)
GROUP = 20
OLD_SEEDS = (1, 5, 7)  # none has failed yet; these are the longest of the first ones


@pytest.mark.slow
@pytest.mark.parametrize("first", SEEDS[::GROUP])
def test_chaos(first: int) -> None:
    for seed in range(first, first + GROUP):
        result = run_chaos(seed, seconds=20)
        assert result.failures == [], (seed, result.failures, result.trace[-30:])


@pytest.mark.slow
def test_chaos_with_a_diskd_on_every_host() -> None:
    for seed in PER_HOST_SEEDS:
        result = run_chaos(seed, seconds=20, per_host=True)
        assert result.failures == [], (seed, result.failures, result.trace[-30:])


@pytest.mark.parametrize("seed", OLD_SEEDS)
def test_seeds_that_failed_before(seed: int) -> None:
    assert run_chaos(seed).failures == []


def test_equal_seeds_give_equal_traces() -> None:
    assert run_chaos(3, seconds=15).trace == run_chaos(3, seconds=15).trace

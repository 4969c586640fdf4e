"""Real daemons under load, killed again and again, with and without power: what `make hunt` does for longer.

The seeds are fixed and so are the plans; what exactly a kill meets differs from run to run.
"""

import pytest

from holdfast.crash import stories

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", range(1, 4))
def test_kill_9_under_load_loses_nothing_and_stays_exact(seed):
    told = stories.run("killed", seed, lives=6)
    assert told["lives"] == 6


@pytest.mark.parametrize("seed", range(1, 3))
def test_a_power_loss_under_load_loses_nothing_that_was_flushed_and_no_change(seed):
    told = stories.run("power-loss", seed, lives=5)
    assert told["lives"] == 5
    assert told["power losses"] > 0


@pytest.mark.parametrize("seed", [1])
def test_racing_for_a_lease_never_brings_an_older_epoch_back(seed):
    told = stories.run("leases", seed, lives=5)
    assert told["acquired"] > told["lives"] == 5

"""Rounds of backups under load, disturbed at random: what `make hunt` does for longer."""

import pytest
from programs import need

from holdfast.crash import stories

pytestmark = [pytest.mark.slow, pytest.mark.interop]


@pytest.mark.parametrize("seed", range(1, 3))
def test_every_committed_point_is_what_the_disk_was(seed):
    for program in ("qemu-img", "qemu-io"):
        need(program)
    told = stories.run("backups", seed, lives=6)
    assert told["rounds"] == 6
    assert told["committed"] > 0

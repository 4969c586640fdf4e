"""Fork, writes, flush, invalidation and merge, crashed at every step, against a naive oracle (B1, B2, B6)."""

from random import Random

import pytest

from diskd.core import avhd, merge, overlay
from diskd.core.avhd import AvhdMap
from diskd.core.steps import Sync, Truncate
from diskd.sim.disk import SimDisk
from diskd.sim.overlay_story import BLOCK, HEAD, SIZE, iter_steps, play, run_seed


@pytest.mark.parametrize("seed", range(40))
def test_without_a_crash_everything_arrives(seed):
    play(seed, None, "daemon")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["power", "daemon", "mixed"])
@pytest.mark.parametrize("seed", range(6))
def test_a_crash_at_every_step_loses_nothing_promised(seed, kind):
    steps = play(seed, None, kind)
    for crash_at in range(steps):
        play(seed, crash_at, kind)


def test_clearing_an_entry_vouches_for_nothing_else():
    """A block zeroed durably and then written again, unsynced, shares its sector with one being cleared."""
    disk = SimDisk(Random(1))
    disk.run(iter_steps([Truncate("disk.raw", SIZE), Sync("disk.raw")]))
    disk.run(avhd.create(HEAD))
    states = AvhdMap.empty(HEAD)
    running = merge.Merge(states, 1)

    def write(block: int, byte: bytes, merging: merge.Merge | None = None) -> None:
        pieces = overlay.plan_write(states, merging, block * BLOCK, BLOCK)
        assert pieces is not None
        disk.run(overlay.write_avhd(states, pieces, block * BLOCK, byte * BLOCK))
        overlay.commit(states, pieces)

    def flush() -> None:
        disk.run(avhd.flush(states.take_dirty(), parent=True))

    write(3, b"1")
    write(0, b"2")
    flush()
    states.set_range(3, 1, avhd.ZERO)
    flush()
    write(3, b"3", running)
    assert [run[0] for run in running.start_batch()] == [0]
    disk.run(running.copy([(0, 1, avhd.DATA)]))
    disk.run(running.clear(running.submit_clear()))
    durable = AvhdMap.over(HEAD, bytearray(disk.run(avhd.load_cells(HEAD))))
    assert durable.runs(0, 4) == [(0, 3, avhd.PARENT), (3, 1, avhd.ZERO)]


@pytest.mark.slow
def test_many_runs_crashed_somewhere():
    for seed in range(1200):
        run_seed(seed)

"""A full or failing file system under a merge and a watch: what is owed comes back, and nobody else ends."""

import contextlib
import errno
from pathlib import Path

import trio
from structlog.testing import capture_logs

from diskd.core.avhd import DATA, PARENT, AvhdMap, Head
from diskd.core.merge import PUNCH_BYTES_MAX, Merge, punch
from diskd.core.mrt import STAMP_NS, has_outlived_stamp
from diskd.core.space import Reserve
from diskd.core.steps import Punch
from diskd.shell import low_disk
from diskd.shell.merging import Merging
from diskd.shell.overlay_settings import OverlaySettings

MiB = 1 << 20


class FullDisk:
    """merging.Merged on a file system with room for one batch (two scripts), until something is punched."""

    def __init__(self, directory: Path) -> None:
        self.map = AvhdMap.empty(Head("cp-0", "uuid", MiB, 4096, "00" * 8, ""))
        self.map.set_range(0, self.map.head.blocks, DATA)
        self.settings = OverlaySettings(64 << 10, None)
        self.files, self.parent, self.directory = self, self, directory
        self.map_turn, self.changed = trio.Lock(), trio.Event()
        self.busy: dict[int, list[int]] = {}
        self.calls = self.slow = 0
        self.room = 2
        self.refused = 0
        self.punched: list[Punch] = []

    def notify(self) -> None:
        """Nobody waits."""

    def noted(self, script):
        return script

    def by_thread(self):
        return contextlib.nullcontext()

    async def reads_ended(self) -> None:
        await trio.lowlevel.checkpoint()

    async def run_final(self, _script) -> None:
        await trio.lowlevel.checkpoint()
        if self.room == 0:
            self.refused += 1
            raise OSError(errno.ENOSPC, "full")
        self.room -= 1

    async def run(self, script) -> None:
        """Of the AVHD's files: what gives space back."""
        await trio.lowlevel.checkpoint()
        steps = list(script)
        assert all(isinstance(step, Punch) for step in steps)
        self.punched += steps
        self.room = 1 << 20


async def test_a_merge_that_finds_no_space_gives_back_what_it_owes(tmp_path):
    layer = FullDisk(tmp_path)
    with trio.fail_after(20), capture_logs() as said:
        await Merging(layer, Merge(layer.map, 16)).run()
    assert layer.map.entries == 0
    assert layer.refused == 1
    assert [(line["event"], line["reason"]) for line in said] == [("merge.put_off", "full")]


async def test_only_what_was_merged_is_punched(tmp_path):
    layer = FullDisk(tmp_path)
    kept = [block for block in range(layer.map.head.blocks) if block % 8 == 3]
    for block in kept:
        layer.map.set_range(block, 1, PARENT)
    with trio.fail_after(20):
        await Merging(layer, Merge(layer.map, 16)).run()
    punched = {
        block
        for step in layer.punched
        for block in range(step.offset // 4096, (step.offset + step.length) // 4096)
    }
    assert punched and punched.isdisjoint(kept)


async def test_a_checkpoint_that_cannot_be_given_up_is_tried_again(tmp_path):
    tried: list[str] = []

    async def give_up(reason: str) -> None:
        tried.append(reason)
        await trio.lowlevel.checkpoint()
        if len(tried) == 1:
            raise OSError(errno.EIO, "the flag cannot be written")

    with trio.fail_after(20):
        await low_disk.watch([tmp_path], Reserve(size_bytes=1 << 60), stands=lambda: True, give_up=give_up)
    assert len(tried) == 2


def test_a_large_punch_goes_in_parts():
    steps = list(punch([(MiB, 2 * PUNCH_BYTES_MAX + 4096), (64 * MiB, 4096)]))
    assert max(step.length for step in steps) == PUNCH_BYTES_MAX
    assert sum(step.length for step in steps) == 2 * PUNCH_BYTES_MAX + 2 * 4096
    position = MiB
    for step in steps[:-1]:
        assert step.offset == position
        position += step.length


def test_only_a_script_longer_than_a_stamp_holds_needs_another_one():
    assert not has_outlived_stamp(5, 5 + STAMP_NS)
    assert has_outlived_stamp(5, 6 + STAMP_NS)

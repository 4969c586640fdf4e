"""Random histories of one VM at a target that loses its power at any step: backups, syntheses and prunes on
whatever the crashes before have left. After each, every point that is not pruned is what the disks were."""

import random
from pathlib import Path

import pytest
import trio
from diskd_frozen import MemoryLibrary
from diskd_repository_scene import CONFIG, DISKS, Crash, LossyFiles, poll
from diskd_target import stream_of

from diskd.core.catalog import offered
from diskd.core.copy_plan import choose_base
from diskd.core.retention import Keep
from diskd.shell.export import source_disks
from diskd.shell.repository import open_repository

pytestmark = pytest.mark.slow
KiB = 1 << 10
BLOCK = 4 * KiB
SIZES = {"system": 200 * KiB, "journal": 24 * KiB}
# More steps than any of these takes on such disks, so that some end without a crash.
STEPS_MAX = 40


class History:
    """``truth``: what each point that must be there holds."""

    def __init__(self, root: Path, seed: int):
        self.root, self.random = root, random.Random(seed)
        self.library = MemoryLibrary(**SIZES)
        self.truth = {}
        self.crashes = 0

    def write(self):
        for disk in self.library.images.values():
            for _ in range(self.random.randrange(4)):
                block = self.random.randrange(len(disk.data) // BLOCK)
                count = self.random.randrange(1, 1 + min(9, len(disk.data) // BLOCK - block))
                if self.random.random() < 0.3:
                    disk.trim(block * BLOCK, count * BLOCK)
                else:
                    disk.write(block * BLOCK, self.random.randbytes(count * BLOCK))

    def crashing(self, act):
        """Whether ``act`` ended, with a repository that may lose its power on the way; it does afterwards."""
        files = LossyFiles(self.random.choice([None, *[self.random.randrange(STEPS_MAX)] * 3]))
        try:
            with open_repository(self.root, files) as repository:
                act(repository)
            ended = True
        except Crash:
            ended = False
            self.crashes += 1
        files.lose()
        return ended

    def backup(self):
        self.write()
        frozen = trio.run(self._begin)
        content = {name: bytes(disk.data) for name, disk in self.library.images.items()}

        def receive(repository):
            points = offered(repository.load("web").points)
            mode = "full" if self.random.random() < 0.2 or not points else "auto"
            base = choose_base(mode, None, at_target=points, at_source=source_disks(frozen.disks))
            _, events, opening = stream_of(frozen, base)
            incoming = repository.receive(events[0], opening)
            for event in events[1:-1]:
                incoming.frame(event)
            incoming.commit(
                events[-1],
                source_digest=events[-1].digest.hex(),
                committed_at=repository.commit_time("web"),
                poll=poll,
            )
            incoming.publish()

        ended = self.crashing(receive)
        is_there = (self.root / "web" / frozen.point).is_dir()
        assert is_there or not ended, "acknowledged, and gone"
        if is_there:
            self.truth[frozen.point] = content
        trio.run(frozen.end, "keep" if is_there else "discard")

    async def _begin(self):
        return await self.library.begin_checkpoint("web", DISKS, CONFIG)

    def synthesize(self):
        if self.truth:
            point = self.random.choice(sorted(self.truth))
            ended = self.crashing(lambda repository: repository.synthesize("web", point, poll))
            with open_repository(self.root) as repository:
                assert repository.load("web").points[point].base is None or not ended

    def prune(self):
        if self.truth:
            keep = self.random.randrange(1, 4)
            stays = set(list(self.truth)[-keep:])
            ended = self.crashing(
                lambda repository: repository.prune("web", Keep(last=keep), poll, dry_run=False)
            )
            there = {path.name for path in (self.root / "web").glob("rp-*")}
            assert stays <= there
            assert there == stays or not ended
            self.truth = {point: content for point, content in self.truth.items() if point in there}

    def check(self):
        with open_repository(self.root) as repository:
            assert set(repository.load("web").points) == set(self.truth)
            for point, content in self.truth.items():
                assert repository.verify("web", point, poll).problems == []
                with repository.open("web", point) as opened:
                    assert {n: v.read(0, SIZES[n]) for n, v in opened.views.items()} == content
        if (self.root / "web").is_dir():
            assert sorted(path.name for path in (self.root / "web").iterdir()) == sorted(self.truth)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_the_crashes_leave_every_point_is_what_the_disks_were(tmp_path, seed):
    history = History(tmp_path, seed)
    for _ in range(14):
        history.random.choice([history.backup, history.backup, history.synthesize, history.prune])()
        history.check()
    assert history.crashes

"""A synthetic full on real btrfs and xfs: it shares, it is right, and it outlives what it was made from."""

import os
import random
import shutil

import pytest
import trio
from diskd_frozen import MemoryLibrary
from diskd_repository_scene import DISKS, Crash, LossyFiles, Scene, poll
from diskd_target import receive_all, stream_of
from loop_mounts import loop_mount

from diskd.core.retention import Keep
from diskd.shell.repository import open_repository
from diskd.shell.repository_files import RepositoryFiles
from diskd.shell.sharing import Sharing

pytestmark = pytest.mark.slow
KiB, MiB = 1 << 10, 1 << 20


@pytest.fixture(scope="module")
def scene():
    return Scene()


def used(where):
    os.sync()
    found = os.statvfs(where)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def chain_of_three(root):
    """A full of 24 MiB, then 1 MiB changed in large and small pieces, then some zeroed: what is there now."""
    library = MemoryLibrary(system=32 * MiB, journal=64 * KiB)
    disk = library.images["system"]
    points = []

    async def take():
        frozen = await library.begin_checkpoint("web", DISKS, "")
        stream = stream_of(frozen, points[-1] if points else None)
        with open_repository(root) as repository:
            receive_all(repository, stream)
        points.append(frozen.point)
        await frozen.end("keep")

    disk.write(4 * MiB, os.urandom(24 * MiB))
    trio.run(take)
    disk.write(10 * MiB + 4096, os.urandom(1 * MiB))
    for number in range(20):
        disk.write(16 * MiB + number * 128 * KiB, os.urandom(4096))
    trio.run(take)
    disk.trim(20 * MiB, 1 * MiB)
    disk.write(5 * MiB + 512, b"a sector of its own")
    trio.run(take)
    return points, bytes(disk.data)


@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
def test_a_synthetic_full_shares_what_the_chain_holds(kind):
    with loop_mount(kind) as mount:
        root = mount / "repository"
        root.mkdir()
        points, content = chain_of_three(root)
        before = used(mount)
        with open_repository(root) as repository:
            report = repository.synthesize("web", points[-1], poll)
            assert report.shared_bytes > 20 * MiB
            assert used(mount) - before < 6 * MiB < 20 * MiB < report.file_bytes
            assert repository.verify("web", points[-1], poll).problems == []
            # What it was made from goes, and a part of it is overwritten: the new full does not notice.
            done = repository.prune("web", Keep(last=1), poll, dry_run=False)
            assert done.removed == [points[1], points[0]]
            (root / "noise").write_bytes(os.urandom(8 * MiB))
            assert repository.verify("web", points[-1], poll).problems == []
            with repository.open("web", points[-1]) as opened:
                assert opened.views["system"].read(0, len(content)) == content


def test_where_nothing_can_be_shared_it_is_copied(tmp_path):
    class Unable(RepositoryFiles):
        tried = 0

        def clone(self, source, offset, descriptor, to, length):
            Unable.tried += 1
            return False

    points, content = chain_of_three(tmp_path)
    with open_repository(tmp_path, Unable()) as repository:
        report = repository.synthesize("web", points[-1], poll)
        assert report.shared_bytes == 0
        assert 0 < Unable.tried < 10
        with repository.open("web", points[-1]) as opened:
            assert opened.views["system"].read(0, len(content)) == content


class CopyingFiles(RepositoryFiles):
    """Shares as a file system with blocks of 8 KiB does."""

    block = 8 * KiB

    def clone(self, source, offset, descriptor, to, length):
        assert offset % self.block == to % self.block == length % self.block == 0
        assert os.pwrite(descriptor, os.pread(source, length, offset), to) == length
        return True


def test_what_is_shared_and_what_is_left_make_the_whole_wherever_it_lies(tmp_path):
    """Also places that fit no border of the file system's blocks, in the chain's files or in the new one."""
    points, content = chain_of_three(tmp_path)
    chosen = random.Random("shared")
    with open_repository(tmp_path) as repository, repository.open("web", points[-1]) as opened:
        sharing = Sharing(CopyingFiles(), opened, CopyingFiles.block)
        for number in range(60):
            grains = [chosen.choice([512, 64 * KiB, 64 * KiB]) for _ in range(2)]
            offset, host = (chosen.randrange(24 * MiB // grain) * grain for grain in grains)
            length = min(chosen.randrange(1, 8 * MiB // 512) * 512, len(content) - offset)
            path = tmp_path / f"new{number}"
            with path.open("w+b", buffering=0) as new:
                for start, end in sharing.into(new.fileno(), "system")(offset, host, length):
                    os.pwrite(new.fileno(), content[offset + start : offset + end], host + start)
                os.ftruncate(new.fileno(), host + length)
                assert os.pread(new.fileno(), length, host) == content[offset : offset + length]
            path.unlink()
    assert sharing.bytes > 20 * MiB


def test_a_crash_at_every_step_of_a_shared_synthesis_changes_no_content(scene):
    outcomes, shared = set(), 0
    with loop_mount("btrfs") as mount:
        for at in range(1000):
            root = mount / str(at)
            root.mkdir()
            scene.fill(root)
            files = LossyFiles(at)
            try:
                with open_repository(root, files) as repository:
                    shared += repository.synthesize("web", scene.names[1], poll).shared_bytes
                finished = True
            except Crash:
                finished = False
            files.lose()
            scene.check(root, 3)
            with open_repository(root) as repository:
                outcomes.add(repository.load("web").points[scene.names[1]].base)
            shutil.rmtree(root)
            if finished:
                break
    assert outcomes == {scene.names[0], None}
    assert shared > 0

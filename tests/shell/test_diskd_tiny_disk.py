"""A target on a file system that is really full, with many amounts of space left: what was being made fails
clearly, everything older stays, nothing is left over, and with space again it succeeds."""

import errno
import os
import shutil

import pytest
import trio
from diskd_frozen import MemoryLibrary
from diskd_repository_scene import CONFIG, DISKS, Scene, poll
from diskd_target import RaisesLeaf, receive_all, start_target
from loop_mounts import loop_mount

from daemonkit.diskd_api import BackupRequest
from diskd.core.retention import Keep
from diskd.errors import Refused
from diskd.shell.backup import run_backup
from diskd.shell.incoming import Uncertain
from diskd.shell.repository import open_repository

KiB, MiB = 1 << 10, 1 << 20
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scene():
    return Scene()


@pytest.fixture(scope="module", params=["ext4"])
def disk(request):
    with loop_mount(request.param, size=12 * MiB) as mount:
        yield mount


def leave(mount, free):
    """Fill it up to about ``free`` bytes; the ballast's path."""
    ballast = mount / "ballast"
    with ballast.open("wb", buffering=0) as file:
        # Written and synced, so that no allocation is still to come.
        found = os.statvfs(mount)
        file.write(bytes(max(0, found.f_bavail * found.f_frsize - free)))
        os.fsync(file.fileno())
    return ballast


def is_clear(error):
    """Said as what it is: no space; never as damage."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOSPC
    return isinstance(error, Uncertain)


SIZES = [0, 8, 24, 64, 110, 160, 220, 300, 420, 600, 1000, 1500]


def test_a_backup_on_a_disk_with_too_little_space(disk, scene):
    outcomes, refusals = [], []
    for free in SIZES:
        root = disk / "repository"
        root.mkdir()
        scene.fill(root, 1)
        ballast = leave(disk, free * KiB)
        with open_repository(root) as repository:
            for number in (1, 2):
                try:
                    receive_all(repository, scene.streams[number])
                except (OSError, Uncertain) as error:
                    refusals.append((free, error))
                    break
            there = len(repository.load("web").points)
        outcomes.append(there)
        scene.check(root, there)
        ballast.unlink()
        with open_repository(root) as repository:
            for number in range(there, 3):
                receive_all(repository, scene.streams[number])
        scene.check(root, 3)
        shutil.rmtree(root)
    assert all(is_clear(error) for _, error in refusals), refusals
    assert outcomes[0] == 1
    assert outcomes[-1] == 3
    assert outcomes == sorted(outcomes)


@pytest.mark.parametrize("verb", ["synthesize", "prune"])
def test_a_synthesis_or_a_prune_on_a_disk_with_too_little_space(disk, scene, verb):
    done, refusals = [], []
    for free in SIZES:
        root = disk / "repository"
        root.mkdir()
        scene.fill(root)
        ballast = leave(disk, free * KiB)
        try:
            with open_repository(root) as repository:
                if verb == "synthesize":
                    repository.synthesize("web", scene.names[2], poll)
                else:
                    repository.prune("web", Keep(last=1), poll, dry_run=False)
            done.append(True)
        except OSError as error:
            refusals.append(error)
            done.append(False)
        ballast.unlink()
        if verb == "synthesize" or not done[-1]:
            scene.check(root, 3)
        with open_repository(root) as repository:
            assert repository.prune("web", Keep(last=1), poll, dry_run=False).kept == [scene.names[2]]
            assert repository.verify("web", scene.names[2], poll).problems == []
        shutil.rmtree(root)
    assert {error.errno for error in refusals} == {errno.ENOSPC}
    assert (done[0], done[-1]) == (False, True)
    assert done == sorted(done)


async def test_the_source_is_told_and_its_changes_stay_tracked(disk, nursery):
    library = MemoryLibrary(system=600 * KiB, journal=64 * KiB)
    library.images["system"].write(0, os.urandom(300 * KiB))
    root = disk / "repository"
    root.mkdir()
    address, stop = await start_target(nursery, root)

    async def back_up(mode="auto"):
        request = BackupRequest("web", DISKS, CONFIG, str(address), mode, None)
        with trio.fail_after(60):
            return await run_backup(library, request, report=nothing, key=None)

    first = await back_up("full")
    library.images["system"].write(0, os.urandom(200 * KiB))
    for free in (0, 20, 60, 120):
        ballast = leave(disk, free * KiB)
        with RaisesLeaf(Refused, "No space left on device"):
            await back_up()
        ballast.unlink()
        assert [path.name for path in (root / "web").iterdir()] == [first.point]
    second = await back_up()
    assert (second.base, second.disks[0].changed_bytes) == (first.point, 200 * KiB)
    await stop()
    shutil.rmtree(root)


async def nothing(_value):
    await trio.lowlevel.checkpoint()

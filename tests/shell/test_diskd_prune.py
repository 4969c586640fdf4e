"""Pruning on real files: a crash after every step, a flipped bit in what is to stay, and the reasons."""

import errno
import os
import shutil

import pytest
import trio
from diskd_frozen import MemoryLibrary
from diskd_partial_scene import send, take_whole
from diskd_repository_scene import CONFIG, DISKS, Crash, LossyFiles, Scene, poll
from diskd_target import receive_all, stream_of

from diskd.core.retention import Keep
from diskd.errors import Damaged, Refused
from diskd.shell.repository import open_repository
from diskd.shell.repository_files import RepositoryFiles

pytestmark = pytest.mark.slow
LAST = Keep(last=1)


@pytest.fixture(scope="module")
def scene():
    return Scene()


def test_a_crash_at_every_step_of_a_prune_breaks_no_chain(tmp_path, scene):
    """Points go from the newest to the oldest, so whatever is left is whole; a second run ends it."""
    left = set()
    for at in range(1000):
        root = tmp_path / str(at)
        root.mkdir()
        scene.fill(root)
        files = LossyFiles(at)
        try:
            with open_repository(root, files) as repository:
                repository.prune("web", LAST, poll, dry_run=False)
            finished = True
        except Crash:
            finished = False
        files.lose()
        with open_repository(root) as repository:
            there = sorted(repository.load("web").points)
            left.add(tuple(there))
            assert scene.names[2] in there
            for name in there:
                assert repository.verify("web", name, poll).problems == []
                with repository.open("web", name) as opened:
                    for disk, content in scene.contents[scene.names.index(name)].items():
                        assert opened.views[disk].read(0, len(content)) == content
            assert repository.prune("web", LAST, poll, dry_run=True).kept == [scene.names[2]]
            assert sorted(repository.load("web").points) == there
            repository.prune("web", LAST, poll, dry_run=False)
        assert [p.name for p in (root / "web").iterdir()] == [scene.names[2]]
        shutil.rmtree(root)
        if finished:
            break
    one, two, three = scene.names
    assert left == {(one, two, three), (one, three), (three,)}


class FlippingFiles(RepositoryFiles):
    """The disk changes one bit of the new full after it was verified, before anything older goes."""

    def __init__(self, name):
        self.name = name

    def exchange(self, one, other):
        super().exchange(one, other)
        flip(other / self.name, -1)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["system.qcow2", "journal.qcow2", "export.index", "vm.toml"])
def test_a_flipped_bit_in_the_new_full_stops_the_prune(tmp_path, scene, name):
    scene.fill(tmp_path)
    with open_repository(tmp_path, FlippingFiles(name)) as repository:
        with pytest.raises(Damaged, match=f"{name}.*nothing was removed"):
            repository.prune("web", LAST, poll, dry_run=False)
        assert sorted(repository.load("web").points) == sorted(scene.names)


@pytest.mark.parametrize("name", ["system.qcow2", "export.index", "vm.toml"])
def test_a_flipped_bit_in_what_stays_stops_the_prune(tmp_path, scene, name):
    """Nothing is synthesized here: the two newest are a full and a differential of their own."""
    scene.fill(tmp_path)
    with open_repository(tmp_path) as repository:
        repository.synthesize("web", scene.names[1], poll)
        for kept in scene.names[1:]:
            path = tmp_path / "web" / kept / name
            good = path.read_bytes()
            flip(path, len(good) // 2)
            with pytest.raises(Damaged, match=f"{kept}/{name}"):
                repository.prune("web", Keep(last=2), poll, dry_run=False)
            path.write_bytes(good)
        assert repository.prune("web", Keep(last=2), poll, dry_run=False).removed == [scene.names[0]]


@pytest.mark.parametrize("number", [0, 1])
def test_a_flipped_bit_in_a_base_stops_the_prune(tmp_path, scene, number):
    """The newest point cannot be made a full any more: what is left of its chain must not go."""
    scene.fill(tmp_path)
    with open_repository(tmp_path) as repository:
        with repository.open("web", scene.names[number]) as opened:
            [place] = [m.host for m in opened.views["system"].layers[0].reader.map(0, 4096) if m.host][
                :1
            ] or [m.host for m in opened.views["system"].layers[0].reader.map(100 << 10, 4096) if m.host][:1]
        flip(tmp_path / "web" / scene.names[number] / "system.qcow2", place)
        before = sorted(os.listdir(tmp_path / "web"))
        with pytest.raises(Damaged, match=r"system\.qcow2.*nothing was removed.*target verify web"):
            repository.prune("web", LAST, poll, dry_run=False)
        assert sorted(os.listdir(tmp_path / "web")) == before


@pytest.mark.parametrize("number", [1, 2])
def test_what_a_point_without_a_good_manifest_builds_on_stays(tmp_path, scene, number):
    """Somebody may have a copy of the manifest: then the point is whole again."""
    scene.fill(tmp_path)
    path = tmp_path / "web" / scene.names[number] / "manifest.json"
    good = path.read_bytes()
    flip(path, 100)
    with open_repository(tmp_path) as repository:
        report = repository.prune("web", LAST, poll, dry_run=False)
        assert report.removed == []
        assert scene.names[number] in report.damaged
        said = {verdict.point: verdict.reasons for verdict in report.verdicts}
        assert said[scene.names[0]][-1:] == [f"needed by {scene.names[number]}, which cannot be restored now"]
        path.write_bytes(good)
        for name in scene.names:
            assert repository.verify("web", name, poll).problems == []


def test_the_report_says_why(tmp_path, scene):
    scene.fill(tmp_path)
    with open_repository(tmp_path) as repository:
        report = repository.prune("web", Keep(monthly=1), poll, dry_run=True)
    assert [(v.point, v.keep) for v in report.verdicts] == list(
        zip(scene.names, [False, False, True], strict=True)
    )
    assert report.verdicts[2].reasons == ["newest of the month 2026-01"]
    assert report.synthesized == [scene.names[2]]


def test_what_an_unfinished_backup_builds_on_outlives_a_prune(tmp_path):
    """Its source may go on with it (backup --resume): then its base is there, and good."""
    library = MemoryLibrary(system=600 << 10, journal=64 << 10)
    disk = library.images["system"]
    streams = []

    async def take(base):
        frozen = await library.begin_checkpoint("web", DISKS, CONFIG)
        streams.append(stream_of(frozen, base and streams[base - 1][1][0].point))
        await frozen.end("keep")

    for base in (None, 1, None, 2):
        disk.write(len(streams) * 64 << 10, os.urandom(300 << 10))
        trio.run(take, base)
    full, middle, other, unfinished = (stream[1][0].point for stream in streams)
    with open_repository(tmp_path) as repository:
        for stream in streams[:3]:
            receive_all(repository, stream)
        _, events, opening = streams[3]
        incoming = repository.receive(events[0], opening)
        send(incoming, events[:2])
        incoming.suspend()
        report = repository.prune("web", LAST, poll, dry_run=False)
        assert (report.kept, report.synthesized, report.removed) == ([middle, other], [middle], [full])
        assert report.verdicts[1].reasons == [f"the unfinished backup {unfinished} builds on it"]
        assert take_whole(repository.receive(events[0], opening, resume=True), streams[3]) == 1
        assert repository.verify("web", unfinished, poll).problems == []
        with repository.open("web", unfinished) as opened:
            assert opened.views["system"].read(0, len(disk.data)) == bytes(disk.data)


class Chains:
    """A repository in which each point builds on what one likes. ``take``: a backup's stream."""

    def __init__(self):
        self.library = MemoryLibrary(system=600 << 10, journal=64 << 10)

    def take(self, base=None):
        async def take():
            frozen = await self.library.begin_checkpoint("web", DISKS, CONFIG)
            stream = stream_of(frozen, base and base[1][0].point)
            await frozen.end("keep")
            return stream

        self.library.images["system"].write(os.urandom(1)[0] << 10, os.urandom(100 << 10))
        return trio.run(take)


def named(stream):
    return stream[1][0].point


def test_what_a_kept_point_builds_on_is_read_again_too(tmp_path):
    """Its base is kept for another reason only: because a damaged point needs it."""
    chains = Chains()
    oldest, base = chains.take(), chains.take()
    broken, newest = chains.take(base), chains.take(base)
    with open_repository(tmp_path) as repository:
        for stream in (oldest, base, broken, newest):
            receive_all(repository, stream)
        shutil.rmtree(tmp_path / "web" / named(broken))
        needing = chains.take(broken)
        (tmp_path / "web" / named(needing)).mkdir()
        index = tmp_path / "web" / named(needing) / "export.index"
        index.write_bytes(needing[2])
        assert repository.prune("web", LAST, poll, dry_run=True).synthesized == [named(newest)]
        index.write_bytes(chains.take(base)[2])
        report = repository.prune("web", LAST, poll, dry_run=True)
        assert (report.synthesized, report.removed) == ([], [named(oldest)])
        flip(tmp_path / "web" / named(base) / "vm.toml", 0)
        with pytest.raises(Damaged, match=f"{named(base)}/vm.toml.*nothing was removed"):
            repository.prune("web", LAST, poll, dry_run=False)


def test_a_base_that_was_built_on_meanwhile_is_not_removed(tmp_path):
    """Whatever the plan said: the look at the chains comes last."""
    chains = Chains()
    base = chains.take()
    newest, late = chains.take(base), [chains.take(base)]
    with open_repository(tmp_path) as repository:
        for stream in (base, newest):
            receive_all(repository, stream)

        def back_up():
            if late and repository.load("web").points[named(newest)].base is None:
                receive_all(repository, late.pop())

        with pytest.raises(Refused, match=f"{named(base)} is needed by"):
            repository.prune("web", LAST, back_up, dry_run=False)
        for point in repository.load("web").points:
            assert repository.verify("web", point, poll).problems == []
        assert len(repository.load("web").points) == 3


def test_a_synthetic_full_keeps_its_place_in_the_history(tmp_path, scene):
    """Retention goes by the time of the commit, the source by the digest that it computed."""
    scene.fill(tmp_path)
    with open_repository(tmp_path) as repository:
        before = repository.load("web").points[scene.names[1]]
        repository.synthesize("web", scene.names[1], poll)
        after = repository.load("web").points[scene.names[1]]
    assert (after.committed_at, after.source_digest) == (before.committed_at, before.source_digest)
    assert (before.kind, before.synthetic, after.kind, after.synthetic) == (
        "differential",
        False,
        "full",
        True,
    )
    assert after.export_digest != before.export_digest


class NoRoom(RepositoryFiles):
    def write(self, descriptor, offset, data):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_no_room_for_a_synthetic_full_is_told_with_what_to_do(tmp_path, scene):
    scene.fill(tmp_path)
    with open_repository(tmp_path, NoRoom()) as repository:
        says = f"No space left on device: web/{scene.names[2]} cannot.*nothing was removed.*keep more"
        with pytest.raises(OSError, match=says):
            repository.prune("web", LAST, poll, dry_run=False)
        with pytest.raises(OSError, match="No space left"):
            repository.synthesize("web", scene.names[2], poll)
    scene.check(tmp_path, 3)

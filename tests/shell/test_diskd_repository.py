"""The repository: a crash after every step, a flipped bit anywhere, a full disk; and what list says then."""

import contextlib
import errno
import random
import shutil

import pytest
from diskd_repository_scene import Crash, CrashingFiles, LossyFiles, Scene, poll
from diskd_target import receive_all

from daemonkit.durable import LockHeldError
from daemonkit.errors import OperatorError
from diskd.core.catalog import MANIFEST, Manifest
from diskd.core.stream import (
    DiskHeader,
    ExportHeader,
    Frame,
    FrameHeader,
    FrameKind,
    StreamEncoder,
    StreamError,
)
from diskd.errors import Damaged, Refused
from diskd.shell.incoming import Uncertain
from diskd.shell.repository import full_of, open_repository
from diskd.shell.repository_files import RepositoryFiles

KiB, MiB = 1 << 10, 1 << 20
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scene():
    return Scene()


@pytest.mark.parametrize(("kind", "before"), [(CrashingFiles, 2), (LossyFiles, 0), (LossyFiles, 2)])
def test_a_crash_at_every_step_of_a_backup_leaves_all_of_it_or_nothing(tmp_path, scene, before, kind):
    outcomes = set()
    at = 0
    while True:
        root = tmp_path / str(at)
        root.mkdir()
        scene.fill(root, before)
        files = kind(at)
        try:
            with open_repository(root, files) as repository:
                receive_all(repository, scene.streams[before])
            finished = True
        except Crash:
            finished = False
        if kind is LossyFiles:
            files.lose()
        there = (root / "web" / scene.names[before]).is_dir()
        outcomes.add(there)
        scene.check(root, before + there)
        # And what was not taken is taken by the next attempt.
        if not there:
            with open_repository(root) as repository:
                receive_all(repository, scene.streams[before])
            scene.check(root, before + 1)
        shutil.rmtree(root)
        if finished:
            break
        at += 1
    assert outcomes == {False, True}
    assert at > 20


def test_a_crash_at_every_step_of_a_synthesis_changes_no_content(tmp_path, scene):
    outcomes = set()
    at = 0
    while True:
        root = tmp_path / str(at)
        root.mkdir()
        scene.fill(root)
        files = LossyFiles(at)
        try:
            with open_repository(root, files) as repository:
                repository.synthesize("web", scene.names[1], poll)
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
        at += 1
    assert outcomes == {scene.names[0], None}


def test_a_full_disk_at_any_step_fails_that_backup_only(tmp_path, scene):
    failed = 0
    for at in range(1, 200):
        root = tmp_path / str(at)
        root.mkdir()
        scene.fill(root, 1)
        files = CrashingFiles(at, OSError(errno.ENOSPC, "No space left on device"))
        with open_repository(root, files) as repository, contextlib.suppress(OSError, Uncertain):
            receive_all(repository, scene.streams[1])
        if files.steps < at:
            break
        failed += 1
        # Only the very last sync, behind the rename, can fail with the point in its place.
        there = (root / "web" / scene.names[1]).is_dir()
        assert not there or files.failed == "sync_directory"
        scene.check(root, 1 + there)
        shutil.rmtree(root)
    assert failed > 10


@pytest.mark.parametrize(
    "file", ["manifest.json", "vm.toml", "export.index", "system.qcow2", "journal.qcow2"]
)
@pytest.mark.parametrize("number", [0, 2])
def test_one_flipped_bit_anywhere_is_found_and_named(tmp_path, scene, file, number):
    scene.fill(tmp_path)
    path = tmp_path / "web" / scene.names[number] / file
    good = path.read_bytes()
    chosen = random.Random(f"{file}{number}")
    places = {0, len(good) - 1, len(good) // 2} | {chosen.randrange(len(good)) for _ in range(12)}
    with open_repository(tmp_path) as repository:
        for place in sorted(places):
            bad = bytearray(good)
            bad[place] ^= 1 << chosen.randrange(8)
            path.write_bytes(bad)
            found = repository.verify("web", scene.names[number], poll)
            assert found.problems, (file, place)
            assert file in found.problems[0]
            for name in scene.names[:number]:
                assert repository.verify("web", name, poll).problems == []
        path.write_bytes(good)
        assert repository.verify("web", scene.names[number], poll).problems == []


def test_a_missing_file_or_base_is_found_and_named(tmp_path, scene):
    scene.fill(tmp_path)
    (tmp_path / "web" / scene.names[2] / "journal.qcow2").unlink()
    with open_repository(tmp_path) as repository:
        assert "journal.qcow2" in repository.verify("web", scene.names[2], poll).problems[0]
        shutil.rmtree(tmp_path / "web" / scene.names[0])
        assert scene.names[0] in repository.verify("web", scene.names[1], poll).problems[0]
        listed = {p.point: p.damaged for p in repository.listing("web")}
        assert scene.names[0] in listed[scene.names[1]]
        with pytest.raises(Damaged, match=scene.names[0]), repository.open("web", scene.names[2]):
            pass


def test_damaged_data_is_never_handed_out(tmp_path, scene):
    """B4: a read of the view, of a restore, of a synthesis and of a differential's filling all verify."""
    scene.fill(tmp_path)
    path = tmp_path / "web" / scene.names[0] / "system.qcow2"
    data = bytearray(path.read_bytes())
    place = data.index(bytes(range(256)) * 4)
    data[place] ^= 1
    path.write_bytes(data)
    with open_repository(tmp_path) as repository:
        with repository.open("web", scene.names[1]) as opened, pytest.raises(Damaged, match=r"system\.qcow2"):
            opened.views["system"].read(0, 600 * KiB)
        with pytest.raises(Damaged, match=r"system\.qcow2"):
            repository.synthesize("web", scene.names[2], poll)
        assert sorted(p.name for p in (tmp_path / "web").iterdir()) == sorted(scene.names)


def test_a_committed_point_is_known_again(tmp_path, scene):
    scene.fill(tmp_path, 1)
    with open_repository(tmp_path) as repository:
        _, events, opening = scene.streams[0]
        again = repository.receive(events[0], opening)
        assert isinstance(again, Manifest)
        assert again.source_digest == events[-1].digest.hex()
        repository.synthesize("web", scene.names[0], poll)


class CountingFiles(RepositoryFiles):
    """Notes how much a process asks to be written, per file, before it closes it."""

    def __init__(self):
        self.largest = 0

    def write(self, descriptor, offset, data):
        self.largest = max(self.largest, len(data))
        super().write(descriptor, offset, data)


def test_frames_without_data_do_not_pile_up_in_memory(tmp_path):
    """56 bytes each, and 2^32 of them are allowed: they go to a file as they come."""
    files = CountingFiles()
    disk = DiskHeader("system", "system", 1 << 40, 4096, 65536, 0, True, 0)
    header = ExportHeader("web", "rp-" + "1" * 16, None, "full", "crash", "", [disk])
    encoder = StreamEncoder(header)
    with open_repository(tmp_path, files) as repository:
        incoming = repository.receive(header, encoder.opening)
        for number in range(30000):
            packed = encoder.frame(FrameKind.HOLE, 0, number * 4096, 512)
            incoming.frame(
                Frame(FrameHeader(FrameKind.HOLE, 0, number, number * 4096, 512, packed[-32:]), b"")
            )
        index = tmp_path / "web" / ".incoming-rp-1111111111111111" / "index.0"
        assert index.stat().st_size >= 1 * MiB
        manifest = incoming.commit(
            encoder.summary(), source_digest="", committed_at="2026-01-01T00:00:00+00:00", poll=poll
        )
        incoming.publish()
        assert manifest.index.size > 30000 * 56
        # A terabyte of nothing is sent, restored and synthesized in no steps at all.
        with repository.open("web", header.point) as opened:
            assert list(full_of(opened)[1]) == []
    assert files.largest < 5 * MiB


def test_an_unknown_base_and_a_wrong_digest_are_refused(tmp_path, scene):
    with open_repository(tmp_path) as repository:
        _, events, opening = scene.streams[1]
        with pytest.raises(Refused, match="--full"):
            repository.receive(events[0], opening)
        _, events, opening = scene.streams[0]
        incoming = repository.receive(events[0], opening)
        import attrs

        bad = attrs.evolve(events[1], data=b"x" + events[1].data[1:])
        with pytest.raises(StreamError, match="digest"):
            incoming.frame(bad)
        incoming.discard()
        assert list((tmp_path / "web").iterdir()) == []


def test_the_root_is_locked_and_must_exist(tmp_path):
    with open_repository(tmp_path), pytest.raises(LockHeldError), open_repository(tmp_path):
        pass
    with pytest.raises(OperatorError, match="no such directory"), open_repository(tmp_path / "nowhere"):
        pass


@pytest.mark.parametrize("name", ["..", "a/b", "", "A", ".incoming-x"])
def test_names_never_leave_the_root(tmp_path, name):
    with open_repository(tmp_path) as repository, pytest.raises(Refused, match="name"):
        repository.load(name)


class FailingSync(RepositoryFiles):
    """Syncing a VM's directory fails ``failures`` times, from the exchange on where ``waits``."""

    def __init__(self, failures, *, waits):
        self.failures, self.waits, self.did = failures, waits, []

    def exchange(self, one, other):
        super().exchange(one, other)
        self.waits = False

    def sync_directory(self, path):
        if path.name == "web" and not self.waits and self.failures:
            self.failures -= 1
            raise OSError(errno.EIO, "Input/output error")
        super().sync_directory(path)
        self.did.append(("sync", path.name))

    def remove_tree(self, path):
        super().remove_tree(path)
        self.did.append(("remove", path.name))


@pytest.mark.parametrize("power_lost", [False, True])
def test_an_exchange_that_may_not_last_takes_nothing(tmp_path, scene, power_lost):
    """The old files stay: a power loss may bring them back under the point's name."""
    scene.fill(tmp_path)
    temporary = f".synthetic-{scene.names[1]}"
    with open_repository(tmp_path, FailingSync(1, waits=True)) as repository:
        with pytest.raises(OSError, match="Input/output"):
            repository.synthesize("web", scene.names[1], poll)
        assert repository.load("web").points[scene.names[1]].base is None
        assert (tmp_path / "web" / temporary / MANIFEST).exists()
    if power_lost:
        RepositoryFiles().exchange(tmp_path / "web" / temporary, tmp_path / "web" / scene.names[1])
    with pytest.raises(OSError, match="Input/output"), open_repository(tmp_path, FailingSync(1, waits=False)):
        pass
    assert (tmp_path / "web" / temporary / MANIFEST).exists()
    files = FailingSync(0, waits=False)
    with open_repository(tmp_path, files):
        assert files.did == [("sync", "web"), ("sync", "web"), ("remove", temporary)]
    scene.check(tmp_path, 3)

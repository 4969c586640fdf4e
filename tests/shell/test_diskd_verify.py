"""`target verify`: a point is good only if all that it builds on is; backups and prunes go on meanwhile."""

import shutil
from functools import partial

import attrs
import pytest
import trio
from diskd_frozen import MemoryLibrary
from diskd_repository_scene import CONFIG, DISKS, Scene, poll
from diskd_target import RaisesLeaf, receive_all, start_target, stream_of
from diskd_target_peers import call

from daemonkit.rpc import CallRefused, connect
from diskd.core import target_calls as calls
from diskd.core.retention import Keep
from diskd.core.stream import StreamAborted, StreamEncoder
from diskd.errors import Damaged
from diskd.shell.repository import Gone, open_repository
from diskd.shell.repository_files import RepositoryFiles
from diskd.shell.restore import restore_point
from diskd.shell.work import Work, begin

KiB = 1 << 10
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scene():
    return Scene()


def flip(path, place=-1):
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def spoil(root, scene, number):
    """A flipped bit in the data of a disk; the file's name."""
    path = root / "web" / scene.names[number] / "system.qcow2"
    flip(path, path.read_bytes().index(bytes(range(256)) * 4))
    return f"web/{scene.names[number]}/system.qcow2"


@pytest.mark.parametrize("asked", [2, None])
async def test_a_point_on_a_damaged_base_is_not_good(tmp_path, scene, nursery, asked):
    """Whether everything is verified or only the newest point: a restore of it would fail."""
    scene.fill(tmp_path)
    spoiled = spoil(tmp_path, scene, 0)
    address, _ = await start_target(nursery, tmp_path)
    wanted = calls.PointFilter("web", None if asked is None else scene.names[asked])
    report = await call(address, calls.VERIFY, wanted)
    assert [found.point for found in report.points] == scene.names
    first, second, third = (found.problems for found in report.points)
    assert all(problem.startswith(f"{spoiled}: ") for problem in first)
    assert second == [f"web/{scene.names[1]}: it builds on {scene.names[0]}, which is damaged"]
    assert third == [f"web/{scene.names[2]}: it builds on {scene.names[1]}, which is damaged"]


async def test_a_point_is_verified_with_what_it_builds_on_and_no_more(tmp_path, scene, nursery):
    scene.fill(tmp_path)
    flip(tmp_path / "web" / scene.names[2] / "system.qcow2")
    address, _ = await start_target(nursery, tmp_path)
    report = await call(address, calls.VERIFY, calls.PointFilter("web", scene.names[1]))
    assert [(found.point, found.problems) for found in report.points] == [
        (scene.names[0], []),
        (scene.names[1], []),
    ]


@pytest.mark.parametrize("file", ["manifest.json", None])
async def test_a_point_whose_base_cannot_even_be_read_is_told_as_such(tmp_path, scene, nursery, file):
    scene.fill(tmp_path)
    directory = tmp_path / "web" / scene.names[0]
    if file is None:
        directory.rename(tmp_path / "elsewhere")
    else:
        (directory / file).write_bytes(b"")
    address, _ = await start_target(nursery, tmp_path)
    report = await call(address, calls.VERIFY, calls.PointFilter("web", scene.names[2]))
    [found] = report.points
    assert found.point == scene.names[2]
    assert f"its base {scene.names[0]} is missing or damaged" in found.problems[0]


def another_full(number):
    """Of another VM in memory, under the name of the same."""
    library = MemoryLibrary(system=64 * KiB, journal=64 * KiB)
    library._ids = iter(range(number, number + 1))

    async def take():
        return stream_of(await library.begin_checkpoint("web", DISKS, CONFIG))

    return trio.run(take)


def test_a_damaged_point_is_read_once_however_many_backups_come_meanwhile(tmp_path, scene):
    """Only another file under its name is a reason to look again; else a busy VM's verify would never end."""
    scene.fill(tmp_path)
    spoiled = spoil(tmp_path, scene, 0)
    newcomers = [another_full(number) for number in range(1000, 1003)]
    with open_repository(tmp_path) as repository:
        polls = 0

        def count():
            nonlocal polls
            polls += 1

        repository.verify("web", scene.names[0], count)
        once, polls = polls, 0

        def back_up():
            count()
            if polls % once == 1 and newcomers:
                receive_all(repository, newcomers.pop())

        assert spoiled in repository.verify("web", scene.names[0], back_up).problems[0]
        assert polls == once


def test_a_point_that_becomes_a_full_meanwhile_is_looked_at_again(tmp_path, scene):
    scene.fill(tmp_path)
    with open_repository(tmp_path) as repository:
        pending = [scene.names[2]]

        def synthesize():
            if pending:
                repository.synthesize("web", pending.pop(), poll)

        found = repository.verify("web", scene.names[2], synthesize)
        assert not pending
        assert found.problems == []


def test_a_point_that_is_pruned_meanwhile_is_gone_and_not_damaged(tmp_path, scene):
    scene.fill(tmp_path)
    with open_repository(tmp_path) as repository:
        pending = [Keep(last=1)]

        def prune():
            if pending:
                repository.prune("web", pending.pop(), poll, dry_run=False)

        with pytest.raises(Gone):
            repository.verify("web", scene.names[0], prune)
        with pytest.raises(Gone):
            repository.verify("web", scene.names[1], poll)
        assert repository.verify("web", scene.names[2], poll).problems == []


async def test_what_fails_for_damage_says_what_to_do(tmp_path, scene, nursery):
    scene.fill(tmp_path)
    spoiled = spoil(tmp_path, scene, 0)
    address, _ = await start_target(nursery, tmp_path)
    newest = calls.PointName("web", scene.names[2])
    with RaisesLeaf(StreamAborted, f"{spoiled}: ") as restore:
        await restore_point(
            address, newest, tmp_path / "out", disk_format="raw", key=None, on_progress=lambda _: None
        )
    with RaisesLeaf(CallRefused, f"{spoiled}: ") as synthesis:
        await call(address, calls.SYNTHESIZE, newest)
    assert "restore another point (diskctl target verify web tells which are good)" in restore.said
    assert "take a full backup (diskctl backup --full)" in synthesis.said


async def test_long_work_tells_how_far_it_is(tmp_path, scene, nursery):
    scene.fill(tmp_path)
    address, _ = await start_target(nursery, tmp_path)
    newest = calls.PointName("web", scene.names[2])
    for method, params, step in (
        (calls.VERIFY, calls.PointFilter(None, None), "verify"),
        (calls.SYNTHESIZE, newest, "synthesize"),
        (calls.PRUNE, calls.PruneRequest("web", Keep(last=1), False), "prune"),
    ):
        told = []
        async with connect(address) as client:
            await client.call(method, params, on_progress=told.append)
        assert told[0]["step"] == step
        for value in told:
            assert list(value) == ["step", "vm", "point", "done_bytes", "total_bytes"]


def test_each_step_counts_to_its_total(tmp_path, scene):
    """What a verify, a synthesis and a prune are at, whenever they look whether they are to end."""
    scene.fill(tmp_path)
    seen = []

    def look():
        seen.append(tuple(work.report().values()))

    work = Work(look, "web")
    with open_repository(tmp_path) as repository:
        stored = repository.data_bytes([("web", name) for name in scene.names])
        begin(work, "verify", None, stored)
        for name in scene.names:
            repository.verify("web", name, work)
        assert work.report()["done_bytes"] == stored > 0
        repository.prune("web", Keep(last=1), work, dry_run=False)
    steps = {(step, point): (done, total) for step, _, point, done, total in seen}
    assert list(steps)[-5:] == [
        ("synthesize", scene.names[2]),
        ("verify", scene.names[2]),
        ("check", scene.names[2]),
        ("remove", scene.names[1]),
        ("remove", scene.names[0]),
    ]
    assert all(0 <= done <= total for done, total in steps.values() if total is not None)
    done, total = steps["check", scene.names[2]]
    assert done == total > 0


class WrongFiles(RepositoryFiles):
    """The disk stores something else than it is given."""

    def __init__(self, spoil):
        self.spoil = spoil

    def write(self, descriptor, offset, data):
        super().write(descriptor, offset, self.spoil(bytearray(data)))


def beside_the_frame(data):
    """In the filling of a cluster, one byte before what the export sent."""
    if (place := data.find(b"2" * 4096)) > 0:
        data[place - 1] ^= 1
    return data


def in_a_frame(data):
    if (place := data.find(b"2" * 4096)) > 0:
        data[place] ^= 1
    return data


def in_a_refcount(data):
    """Nobody reads it as part of the disk; qemu-img check would complain."""
    if (place := data.find(b"\0\1" * 4)) > 0 or data.startswith(b"\0\1" * 4):
        data[place + 1] = 2
    return data


def in_the_backing_name(data):
    """We go by the manifest, but qemu-img would read another chain."""
    if data.startswith(b"QFI") and (place := data.find(b"../rp-")) > 0:
        data[place + 8] ^= 1
    return data


def in_a_zero_mark(data):
    """A cluster that reads as zeroes shows its base again."""
    for place in range(0, len(data) - 8, 8):
        if not data.startswith(b"QFI") and data[place : place + 8] == (1).to_bytes(8, "big"):
            data[place + 7] = 0
            break
    return data


@pytest.mark.parametrize(
    ("spoil", "cluster", "problem"),
    [
        (beside_the_frame, 64 * KiB, "differ from the base"),
        (in_a_frame, 64 * KiB, "are not what the source sent"),
        (in_the_backing_name, 64 * KiB, "names another base"),
        (in_a_refcount, 64 * KiB, "a refcount is wrong"),
        (in_a_zero_mark, 4 * KiB, "should be zeroes"),
    ],
)
def test_what_the_disk_stored_wrong_is_not_committed(tmp_path, scene, spoil, cluster, problem):
    """Before the commit there is no digest of the target itself to compare with: content counts (B4)."""
    scene.fill(tmp_path, 1)
    _, (header, *frames, _), _ = scene.streams[1]
    header = attrs.evolve(header, disks=[attrs.evolve(d, cluster_bytes=cluster) for d in header.disks])
    for good in (False, True):
        encoder = StreamEncoder(header)
        with open_repository(tmp_path, None if good else WrongFiles(spoil)) as repository:
            incoming = repository.receive(header, encoder.opening)
            for frame in frames:
                head, data = frame.header, frame.data or None
                encoder.frame(head.kind, head.disk, head.offset, head.length, data)
                incoming.frame(frame)
            commit = partial(
                incoming.commit, encoder.summary(), source_digest="", committed_at="2026-01-02", poll=poll
            )
            if good:
                commit()
                incoming.publish()
                assert repository.verify("web", header.point, poll).problems == []
            else:
                with pytest.raises(Damaged, match=f"did not verify: .*{problem}"):
                    commit()
                incoming.discard()


def test_an_index_is_that_of_its_own_point(tmp_path):
    """Two fulls of one content differ in nothing but what the index says that they are."""
    library = MemoryLibrary(system=64 * KiB, journal=64 * KiB)

    async def take():
        frozen = await library.begin_checkpoint("web", DISKS, CONFIG)
        await frozen.end("keep")
        return stream_of(frozen)

    streams = [trio.run(take) for _ in range(2)]
    one, other = (stream[1][0].point for stream in streams)
    with open_repository(tmp_path) as repository:
        for stream in streams:
            receive_all(repository, stream)
        shutil.copy(tmp_path / "web" / one / "export.index", tmp_path / "web" / other / "export.index")
        with pytest.raises(Damaged, match=f"{other}/export.index: is not the index of this point"):
            repository.open("web", other).__enter__()

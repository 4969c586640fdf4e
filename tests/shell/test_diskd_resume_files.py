"""An interrupted export goes on: whatever the moment, the point is the uninterrupted one, byte for byte."""

import attrs
import pytest
import trio
from diskd_partial_scene import (
    PowerLossFiles,
    commit,
    content_of,
    receive_base,
    scattered,
    send,
    shuffled,
    take_whole,
)
from diskd_repository_scene import Crash

from diskd.core.partial import HEAD_BYTES
from diskd.core.stream import Frame, StreamEncoder
from diskd.errors import Damaged, Refused
from diskd.shell.incoming import PROGRESS, Incoming
from diskd.shell.repository import UNFINISHED_SECONDS_MAX, open_repository
from diskd.shell.target import Target

PORTION = 9


@pytest.fixture(scope="module")
def grouped():
    """One disk after the other."""
    return scattered()


@pytest.fixture(scope="module", params=["one-after-the-other", "interleaved"])
def streams(grouped, request):
    if request.param == "interleaved":
        return [shuffled(stream, number) for number, stream in enumerate(grouped)]
    return grouped


@pytest.fixture(scope="module")
def whole(grouped, tmp_path_factory):
    """The differential's directory as an uninterrupted backup leaves it that sends disk by disk."""
    root = tmp_path_factory.mktemp("whole")
    receive_base(root, grouped)
    with open_repository(root) as repository:
        take_whole(repository.receive(grouped[1][1][0], grouped[1][2]), grouped[1], keep=False)
    return content_of(root / "web" / grouped[1][1][0].point)


def frames_of(stream):
    return [event for event in stream[1] if isinstance(event, Frame)]


def resume(root, stream, files=None):
    with open_repository(root, files) as repository:
        incoming = repository.receive(stream[1][0], stream[2], resume=True)
        known = take_whole(incoming, stream)
        assert repository.verify("web", stream[1][0].point, lambda: None).problems == []
    return known


def point_of(root, stream):
    return content_of(root / "web" / stream[1][0].point)


def test_cut_at_every_frame(streams, whole, tmp_path):
    stream = streams[1]
    count = len(frames_of(stream))
    assert count > 60
    receive_base(tmp_path, streams)
    for cut in range(1, count + 1, 6):
        with open_repository(tmp_path) as repository:
            incoming = repository.receive(stream[1][0], stream[2])
            send(incoming, stream[1][: 1 + cut], portion=PORTION, keep=False)
            incoming.suspend()
        assert resume(tmp_path, stream) == cut
        assert point_of(tmp_path, stream) == whole
        with open_repository(tmp_path) as repository:
            repository._files.remove_tree(tmp_path / "web" / stream[1][0].point)


def test_a_power_loss_at_every_step_takes_nothing_that_was_acknowledged(streams, whole, tmp_path):
    stream = streams[1]
    at = 0
    while True:
        root = tmp_path / str(at)
        root.mkdir()
        receive_base(root, streams)
        files, acknowledged, crashed = PowerLossFiles(at), 0, False
        incoming = None
        try:
            with open_repository(root, files) as repository:
                incoming = repository.receive(stream[1][0], stream[2])
                take_whole(incoming, stream, portion=PORTION)
        except Crash:
            crashed = True
            acknowledged = incoming.durable if incoming is not None else 0
            if incoming is not None:
                incoming._stack.close()
        if not crashed:
            break
        files.lose()
        with open_repository(root) as repository:
            found = repository.receive(stream[1][0], stream[2], resume=True)
            if isinstance(found, Incoming):
                assert take_whole(found, stream) >= acknowledged, f"step {at}"
        assert point_of(root, stream) == whole, f"step {at}"
        at += 5
    assert at > 60
    assert point_of(root, stream) == whole


def interrupted(root, streams, *, cut=30):
    receive_base(root, streams)
    stream = streams[1]
    with open_repository(root) as repository:
        incoming = repository.receive(stream[1][0], stream[2])
        send(incoming, stream[1][: 1 + cut], portion=PORTION)
        incoming.suspend()
    return root / "web" / f".incoming-{stream[1][0].point}"


def sent_into_the_second_disk(repository, stream, end):
    """A durable record of the first disk, then frames up to ``end`` of which nothing is recorded."""
    frames = frames_of(stream)
    first = sum(frame.header.disk == 0 for frame in frames)
    assert PORTION < first < len(frames) - 2
    incoming = repository.receive(stream[1][0], stream[2])
    send(incoming, stream[1][: 1 + PORTION], portion=PORTION)
    send(incoming, stream[1][: 1 + (end or first + 2)], first=PORTION, keep=False)
    assert (incoming._path / "journal.qcow2").exists()
    return incoming


def test_a_kill_after_the_next_disk_began_is_gone_on_from(grouped, whole, tmp_path):
    """The files of a disk that the record knows nothing of are there, and made anew."""
    receive_base(tmp_path, grouped)
    with open_repository(tmp_path) as repository:
        sent_into_the_second_disk(repository, grouped[1], None)._stack.close()
    assert resume(tmp_path, grouped[1]) == PORTION
    assert point_of(tmp_path, grouped[1]) == whole


def test_a_record_names_all_disks_that_have_begun_and_keeps_those_that_rest(grouped, whole, tmp_path):
    """The first disk begins, then the second is sent alone, then the link is cut."""
    receive_base(tmp_path, grouped)
    stream = grouped[1]
    frames = frames_of(stream)
    first, second = (tuple(f for f in frames if f.header.disk == disk) for disk in (0, 1))
    with open_repository(tmp_path) as repository:
        incoming = repository.receive(stream[1][0], stream[2])
        send(incoming, first[:PORTION], portion=PORTION)
        send(incoming, second, portion=2)
        incoming.suspend()
    assert resume(tmp_path, stream) == PORTION + len(second)
    assert point_of(tmp_path, stream) == whole


def test_a_commit_that_is_cancelled_is_gone_on_from(grouped, whole, tmp_path):
    class Cancelled(BaseException):
        pass

    def poll():
        raise Cancelled

    receive_base(tmp_path, grouped)
    stream = grouped[1]
    with open_repository(tmp_path) as repository:
        incoming = sent_into_the_second_disk(repository, stream, len(frames_of(stream)))
        with pytest.raises(Cancelled):
            incoming.commit(
                stream[1][-1],
                source_digest=stream[1][-1].digest.hex(),
                committed_at="2026-01-01T00:00:00+00:00",
                poll=poll,
            )
        incoming.suspend()
    assert resume(tmp_path, stream) == PORTION
    assert point_of(tmp_path, stream) == whole


def test_an_unfinished_point_is_no_point(streams, tmp_path):
    interrupted(tmp_path, streams)
    with open_repository(tmp_path) as repository:
        assert [listed.point for listed in repository.listing("web")] == [streams[0][1][0].point]
        assert repository.unfinished_points("web") == {streams[1][1][0].point: streams[0][1][0].point}


def test_another_plan_is_refused_and_begins_anew_only_when_asked(streams, whole, tmp_path):
    interrupted(tmp_path, streams)
    header = attrs.evolve(streams[1][1][0], consistency="application")
    other = StreamEncoder(header)
    with open_repository(tmp_path) as repository:
        with pytest.raises(Refused, match="another plan; back up again without --resume"):
            repository.receive(header, other.opening, resume=True)
        assert repository.receive(streams[1][1][0], streams[1][2], resume=True).taken == 30
    with open_repository(tmp_path) as repository:
        assert repository.receive(header, other.opening).taken == 0


def test_leftovers_go_with_the_next_backup_with_a_settlement_or_with_time(streams, tmp_path):
    left = interrupted(tmp_path, streams)
    with open_repository(tmp_path) as repository:
        kept = (left / PROGRESS).stat().st_mtime
        assert repository.clean_up(kept + UNFINISHED_SECONDS_MAX - 1) == []
        assert repository.clean_up(kept + UNFINISHED_SECONDS_MAX + 1) == [f"web/{left.name}"]
    left = interrupted(tmp_path / "again", streams) if not (tmp_path / "again").mkdir() else None
    with open_repository(tmp_path / "again") as repository:
        repository.forget("web", streams[1][1][0].point)
        assert not left.exists()
    left = interrupted(tmp_path / "third", streams) if not (tmp_path / "third").mkdir() else None
    with open_repository(tmp_path / "third") as repository:
        header = attrs.evolve(streams[1][1][0], point="rp-" + "f" * 16)
        repository.receive(header, StreamEncoder(header).opening).discard()
        assert not left.exists()


async def test_a_target_sweeps_what_nobody_comes_back_for(streams, tmp_path):
    left = await trio.to_thread.run_sync(interrupted, tmp_path, streams)
    kept = (left / PROGRESS).stat().st_mtime
    with open_repository(tmp_path) as repository:
        target = Target(repository)
        await target.sweep_once(kept + UNFINISHED_SECONDS_MAX - 1)
        assert left.exists()
        async with target._turn("web", "somebody's"):
            await target.sweep_once(kept + UNFINISHED_SECONDS_MAX + 1)
            assert left.exists()
        await target.sweep_once(kept + UNFINISHED_SECONDS_MAX + 1)
        assert not left.exists()
        assert [listed.point for listed in repository.listing("web")] == [streams[0][1][0].point]


async def test_a_sweep_that_cannot_read_is_not_the_end(streams, tmp_path):
    """The next one may; meanwhile the target serves."""
    root, away = tmp_path / "root", tmp_path / "away"
    root.mkdir()
    left = await trio.to_thread.run_sync(interrupted, root, streams)
    late = (left / PROGRESS).stat().st_mtime + UNFINISHED_SECONDS_MAX + 1
    with open_repository(root) as repository:
        target = Target(repository)
        root.rename(away)
        await target.sweep_once(late)
        away.rename(root)
        assert left.exists()
        await target.sweep_once(late)
        assert not left.exists()


@pytest.mark.parametrize("name", ["export.index", "index.0", PROGRESS, "system.qcow2"])
def test_damage_is_found_and_begins_anew(name, streams, whole, tmp_path):
    left = interrupted(tmp_path, streams)
    if name == "system.qcow2":
        # Found by the verification before the commit: nothing is shown.
        with (left / name).open("r+b") as file:
            file.seek(16 * 1024)
            file.write(b"\xff" * 8192)
        with open_repository(tmp_path) as repository:
            incoming = repository.receive(streams[1][1][0], streams[1][2], resume=True)
            send(incoming, streams[1][1], first=incoming.taken)
            with pytest.raises(Damaged):
                commit(incoming, streams[1][1])
            incoming.discard()
            assert repository.unfinished_points("web") == {}
        return
    (left / name).write_bytes((left / name).read_bytes()[:-57])
    if name == PROGRESS:
        (left / name).write_bytes(bytes(1000))
    assert resume(tmp_path, streams[1]) == 0
    assert point_of(tmp_path, streams[1]) == whole


def test_a_torn_record_leaves_the_one_before(streams, whole, tmp_path):
    left = interrupted(tmp_path, streams)
    data = bytearray((left / PROGRESS).read_bytes())
    # 30 frames in portions of 9 are four records; suspending adds none. The fourth lies in slot 0.
    data[HEAD_BYTES + 100 : HEAD_BYTES + 200] = bytes(100)
    (left / PROGRESS).write_bytes(data)
    assert resume(tmp_path, streams[1]) == 27
    assert point_of(tmp_path, streams[1]) == whole

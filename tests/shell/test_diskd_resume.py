"""A backup goes on by itself after a cut link or a stopped target; nothing durable is sent twice."""

from functools import partial

import attrs
import pytest
import trio
from diskd_cutting_proxy import CuttingProxy
from diskd_frozen import MemoryLibrary
from diskd_target import RaisesLeaf, start_deaf_proxy, start_target, stream_of

from daemonkit.diskd_api import BackupDisk, BackupRequest
from daemonkit.frames import FrameReader
from daemonkit.ports import Address
from daemonkit.rpc import Registry, connect, serve
from daemonkit.units import SECOND
from diskd.core import target_calls as calls
from diskd.core.patience import PAUSE_NS_MAX, PAUSE_NS_MIN, Patience
from diskd.core.stream import (
    FRAME,
    Ack,
    Committed,
    ExportHeader,
    Frame,
    FrameKind,
    Have,
    Ready,
    RefusedReply,
    StreamEncoder,
    Working,
    decode_reply,
)
from diskd.errors import Refused
from diskd.shell.backup import run_backup
from diskd.shell.export import TargetLost, prepare_blocking
from diskd.shell.producing import Producers
from diskd.shell.receiving import send_reply
from diskd.shell.repository import open_repository
from diskd.shell.target import RECEIVING_MAX, Target

MiB = 1 << 20
DISKS = [BackupDisk("system", "system"), BackupDisk("journal", "journal")]


@pytest.fixture
def library():
    library = MemoryLibrary(system=24 * MiB, journal=2 * MiB)
    library.images["system"].write(0, bytes(range(256)) * 4096 * 20)
    library.images["journal"].write(MiB, b"j" * MiB)
    return library


async def backup(library, address, *, retry_for=60, report=None, mode="auto"):
    async def silent(_progress):
        await trio.lowlevel.checkpoint()

    disks = [] if mode == "resume" else DISKS
    request = BackupRequest("web", disks, "", str(address), mode, retry_for_ns=retry_for * SECOND)
    with trio.fail_after(60):
        return await run_backup(library, request, report=report or silent, key=None)


def check(root, library, point):
    with open_repository(root) as repository:
        assert repository.verify("web", point, lambda: None).problems == []
        with repository.open("web", point) as opened:
            for name, disk in library.images.items():
                assert opened.views[name].read(0, len(disk.data)) == bytes(disk.data)


async def test_a_link_that_is_cut_again_and_again_lets_the_backup_through(tmp_path, library, nursery):
    address, stop = await start_target(nursery, tmp_path)
    proxy = CuttingProxy(address, [6 * MiB, 5 * MiB, 7 * MiB])
    steps = []

    async def report(progress):
        await trio.lowlevel.checkpoint()
        steps.append(progress["step"])

    done = await backup(library, await proxy.serve(nursery), report=report)
    assert proxy.shares == []
    assert steps.count("interrupted") == 3
    # What was on its way at a cut is all that goes twice: not more than the window of each.
    assert sum(proxy.carried) < 21 * MiB + 3 * 17 * MiB
    assert library.ended == [(done.point, "keep")]
    assert [disk.sent_bytes for disk in done.disks] == [20 * MiB, MiB]
    await stop()
    check(tmp_path, library, done.point)


async def test_a_target_that_is_stopped_and_started_again_is_gone_on_with(tmp_path, library, nursery):
    address, stop = await start_target(nursery, tmp_path)
    proxy = CuttingProxy(address, [8 * MiB])
    stopped = []

    async def report(progress):
        await trio.lowlevel.checkpoint()
        if progress["step"] == "interrupted" and not stopped:
            stopped.append(True)
            await stop()
            left = [path.name for path in (tmp_path / "web").iterdir()]
            assert [name.startswith(".incoming-rp-") for name in left] == [True]
            proxy.target, stopped[0] = await start_target(nursery, tmp_path)

    done = await backup(library, await proxy.serve(nursery), report=report)
    assert stopped
    await stopped[0]()
    check(tmp_path, library, done.point)


async def test_a_target_that_stays_away_ends_the_backup_in_time(tmp_path, library, nursery):
    address, stop = await start_target(nursery, tmp_path)
    proxy = CuttingProxy(address, [8 * MiB])

    async def report(progress):
        await trio.lowlevel.checkpoint()
        if progress["step"] == "interrupted":
            await stop()

    front = await proxy.serve(nursery)
    with RaisesLeaf(Exception):  # The last attempt's own reason: refused, or closed without a greeting.
        await backup(library, front, retry_for=1, report=report)
    assert [outcome for _, outcome in library.ended] == ["suspend"]
    # With neither a target nor patience it goes on standing; with a target it goes on.
    with RaisesLeaf(Exception):
        await backup(library, front, retry_for=1, mode="resume")
    proxy.target, stop = await start_target(nursery, tmp_path)
    before = sum(proxy.carried)
    done = await backup(library, front, mode="resume")
    assert sum(proxy.carried) - before < 20 * MiB
    assert library.ended[-1] == (done.point, "keep")
    assert [disk.sent_bytes for disk in done.disks] == [20 * MiB, MiB]
    await stop()
    check(tmp_path, library, done.point)


async def test_a_killed_client_leaves_what_can_be_gone_on_with(tmp_path, library, nursery):
    address, stop = await start_target(nursery, tmp_path)
    proxy = CuttingProxy(address, [])
    front = await proxy.serve(nursery)
    with trio.CancelScope() as client:

        async def report(progress):
            await trio.lowlevel.checkpoint()
            if progress["step"] == "send" and sum(proxy.carried) > 9 * MiB:
                client.cancel()

        proxy.pause_at = 10 * MiB
        await backup(library, front, report=report)
    assert client.cancelled_caught
    assert [outcome for _, outcome in library.ended] == ["suspend"]
    proxy.pause_at = None
    before = sum(proxy.carried)
    done = await backup(library, front, mode="resume")
    assert sum(proxy.carried) - before < 20 * MiB
    await stop()
    check(tmp_path, library, done.point)


async def test_a_backup_that_was_committed_unheard_is_found_so(tmp_path, library, nursery):
    address, stop = await start_target(nursery, tmp_path)
    proxy, swallow = await start_deaf_proxy(nursery, address)
    swallow.append(True)

    async def report(progress):
        await trio.lowlevel.checkpoint()
        if progress["step"] == "interrupted":
            await stop()

    with RaisesLeaf(Exception):
        await backup(library, proxy, retry_for=1, report=report)
    assert library.ended[-1][1] == "suspend"
    address, stop = await start_target(nursery, tmp_path)
    done = await backup(library, address, mode="resume")
    assert library.ended[-1] == (done.point, "keep")
    await stop()
    check(tmp_path, library, done.point)


async def test_another_target_does_not_go_on_with_it(tmp_path, library, nursery):
    for name in "ab":
        (tmp_path / name).mkdir()
    address, _ = await start_target(nursery, tmp_path / "a")
    other, _ = await start_target(nursery, tmp_path / "b")
    frozen = await library.begin_checkpoint("web", DISKS, "", target="f" * 32)
    await frozen.suspend()
    for target in (address, other):
        with RaisesLeaf(Refused, "another target"):
            await backup(library, target, mode="resume")
        assert library.ended[-1] == (frozen.point, "suspend")


async def start_refusing_target(nursery, reply):
    """It knows the repository of the real one, and gives every export the same answer."""
    registry = Registry()

    async def offered(_request, _call):
        return calls.OfferedPoints("r" * 32, 0, [], {})

    async def listed(_request, _call):
        return calls.ListReport([])

    async def refuse(_options, _peer, stream):
        await send_reply(stream, reply)
        while await stream.receive_some(65536):
            pass

    registry.add(calls.POINTS_OFFERED, offered)
    registry.add(calls.LIST, listed)
    registry.add_stream(calls.EXPORT, refuse)
    return await nursery.start(partial(serve, registry, Address("127.0.0.1", 0)))


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (RefusedReply("all slots are taken", busy=True), "suspend"),
        (RefusedReply("sent by another plan"), "pending"),
        (Committed("rp-" + "0" * 15 + "1", "0" * 64), "discard"),
    ],
    ids=["busy", "refused", "something-else"],
)
@pytest.mark.parametrize("retry_for", [0, 60])
async def test_a_resume_that_is_refused_at_once_discards_nothing(library, nursery, reply, outcome, retry_for):
    """The process that sent it may have got as far as the trailer: this one cannot know."""
    address = await start_refusing_target(nursery, reply)
    frozen = await library.begin_checkpoint("web", DISKS, "", target="r" * 32)
    await frozen.suspend()
    with RaisesLeaf(Exception):
        await backup(library, address, mode="resume", retry_for=retry_for)
    assert library.ended[1:] == [(frozen.point, outcome)]


async def test_a_busy_target_is_tried_again_once_the_backup_has_begun(tmp_path, library, nursery):
    """Whoever took the slot meanwhile gives it back."""
    root = tmp_path / "repository"
    root.mkdir()
    with open_repository(root) as repository:
        target, registry = Target(repository), Registry()
        target.register(registry)
        address = await nursery.start(partial(serve, registry, Address("127.0.0.1", 0)))
        proxy, reasons = CuttingProxy(address, [8 * MiB]), []

        async def report(progress):
            await trio.lowlevel.checkpoint()
            if progress["step"] == "interrupted":
                reasons.append(progress["reason"])
                if len(reasons) == 1:
                    while target._receiving:  # noqa: ASYNC110 - what is waited for tells nobody
                        await trio.sleep(0.01)
                    for _ in range(RECEIVING_MAX):
                        target._slots.acquire_nowait()
                elif len(reasons) == 2:
                    for _ in range(RECEIVING_MAX):
                        target._slots.release()

        done = await backup(library, await proxy.serve(nursery), report=report)
        assert len(reasons) == 2
        assert "busy" in reasons[1]
        assert library.ended == [(done.point, "keep")]
        nursery.cancel_scope.cancel()


async def test_without_patience_a_cut_link_is_the_end(tmp_path, library, nursery):
    address, _ = await start_target(nursery, tmp_path)
    proxy = CuttingProxy(address, [8 * MiB])
    with RaisesLeaf(TargetLost):
        await backup(library, await proxy.serve(nursery), retry_for=0)
    # The next backup cuts anew, and leaves nothing of the first.
    done = await backup(library, address)
    assert [path.name for path in (tmp_path / "web").iterdir()] == [done.point]


async def test_a_disk_that_fails_is_not_tried_again(tmp_path, library, nursery):
    address, _ = await start_target(nursery, tmp_path)

    def break_disk(frozen):
        frozen.disks["system"].fail_reads_at = 9 * MiB

    library.before_send = break_disk
    with RaisesLeaf(OSError, "no longer valid"):
        await backup(library, address)


class Peer:
    """A source by hand."""

    def __init__(self, stream):
        self.stream, self.reader = stream, FrameReader()

    async def reply(self):
        while True:
            while (payload := self.reader.next_frame()) is None:
                data = await self.stream.receive_some(65536)
                assert data, "closed"
                self.reader.feed(data)
            if not isinstance(found := decode_reply(payload), Working):
                return found


async def exported(library):
    frozen = await library.begin_checkpoint("web", DISKS, "")
    await frozen.end("keep")
    return stream_of(frozen)


async def test_a_second_connection_for_the_same_point_takes_over(tmp_path, library, nursery):
    """The first one's link may be dead without anybody having noticed."""
    address, stop = await start_target(nursery, tmp_path)
    data, events, opening = await exported(library)
    frames = [event for event in events if isinstance(event, Frame)]
    half = len(opening) + sum(FRAME.size + len(frame.data) for frame in frames[:9])
    with trio.fail_after(30):
        async with connect(address) as first, connect(address) as second:
            one = Peer(await first.open_stream(calls.EXPORT, calls.ExportOptions()))
            await one.stream.send_all(data[:half])
            assert isinstance(await one.reply(), Ready)
            while not isinstance(ack := await one.reply(), Ack) or ack.taken < 9:
                pass
            two = Peer(await second.open_stream(calls.EXPORT, calls.ExportOptions(resume=True)))
            await two.stream.send_all(opening)
            have = await two.reply()
            assert have == Have(b"".join(frame.header.pack() for frame in frames[:9]))
            assert isinstance(await two.reply(), Ready)
            assert isinstance(await one.reply(), RefusedReply)
            await two.stream.send_all(data[half:])
            while isinstance(last := await two.reply(), Ack):
                assert last.taken >= 9
            assert isinstance(last, Committed)
    header = events[0]
    assert isinstance(header, ExportHeader)
    await stop()
    check(tmp_path, library, header.point)


async def test_a_source_looks_at_what_it_goes_on_behind(library):
    _, events, _ = await exported(library)
    good = [event.header for event in events if isinstance(event, Frame)]
    frozen = library.frozen[0]

    def skip(headers):
        prepared = prepare_blocking(frozen, None)
        Producers(prepared, StreamEncoder(prepared.header)).skip(b"".join(one.pack() for one in headers))

    skip(good)
    skip(good[:7])
    for bad in (
        attrs.evolve(good[3], offset=good[3].offset + 512, length=good[3].length - 512),
        attrs.evolve(good[3], kind=FrameKind.ZERO, digest=bytes(32)),
        attrs.evolve(good[3], length=good[3].length - 512),
        attrs.evolve(good[3], number=4),
        attrs.evolve(good[3], disk=1),
    ):
        with pytest.raises(Refused, match="sent by another plan"):
            skip([*good[:3], bad])
    with pytest.raises(Refused, match="sent by another plan"):
        skip([*good, attrs.evolve(good[-1], number=good[-1].number + 1, offset=good[-1].end)])
    prepared = prepare_blocking(frozen, None)
    with pytest.raises(Refused, match="sent by another plan"):
        Producers(prepared, StreamEncoder(prepared.header)).skip(good[0].pack() + b"x")


async def test_settling_an_interrupted_point_ends_it_for_good(tmp_path, library, nursery):
    address, _ = await start_target(nursery, tmp_path)
    data, events, _ = await exported(library)
    with trio.fail_after(30):
        async with connect(address) as client:
            peer = Peer(await client.open_stream(calls.EXPORT, calls.ExportOptions()))
            await peer.stream.send_all(data[: 10 * MiB])
            while not isinstance(await peer.reply(), Ack):
                pass
        async with connect(address) as client:
            while not (offered := await client.call(calls.POINTS_OFFERED, calls.VmName("web"))).unfinished:
                pass
            assert offered.unfinished == {events[0].point: None}
            assert offered.points == []
            report = await client.call(calls.SETTLE, calls.PointName("web", events[0].point))
            assert not report.committed
            offered = await client.call(calls.POINTS_OFFERED, calls.VmName("web"))
            assert offered.unfinished == {}


def test_patience_counts_from_the_loss_and_begins_anew_with_every_gain():
    patience = Patience(60 * SECOND)
    assert patience.lost(0, 0) == PAUSE_NS_MIN
    assert patience.lost(10 * SECOND, 0) == 2 * PAUSE_NS_MIN
    assert patience.lost(59 * SECOND, 0) == SECOND
    assert patience.lost(60 * SECOND, 0) is None
    assert patience.lost(61 * SECOND, 1) == PAUSE_NS_MIN
    for _ in range(10):
        assert (patience.lost(62 * SECOND, 1) or 0) <= PAUSE_NS_MAX
    assert patience.lost(121 * SECOND, 1) is None
    assert Patience(0).lost(0, 0) is None

"""The target under bad peers, full disks and kills; and what a source sees of it."""

import contextlib
import errno
import random
import signal
import struct

import nbd_client
import pytest
import trio
from diskd_target import RaisesLeaf, start_target
from diskd_target_peers import MiB, backup, call, exported, open_export, two_disks
from diskd_target_process import target_process

from daemonkit.errors import OperatorError
from daemonkit.ports import Address
from daemonkit.rpc import CallRefused, connect
from diskd.core import target_calls as calls
from diskd.core.retention import Keep
from diskd.core.stream import (
    Ack,
    Committed,
    Ready,
    RefusedReply,
    StreamError,
)
from diskd.errors import NoSuchExport, Refused
from diskd.shell.export import ExportSession, TargetLost, prepare_blocking
from diskd.shell.point_export import PointCatalog
from diskd.shell.repository import open_repository
from diskd.shell.repository_files import RepositoryFiles
from diskd.shell.restore import restore_point


@pytest.fixture
def library():
    return two_disks()


async def test_nonsense_is_refused_and_disturbs_nobody(tmp_path, library, nursery):
    address, _ = await start_target(nursery, tmp_path)
    _, (data, _, opening) = await exported(library)
    chosen = random.Random(1)
    for bad in (
        b"GET / HTTP/1.1\r\n\r\n" * 10,
        chosen.randbytes(5000),
        opening + chosen.randbytes(5000),
        data[: len(opening) + 56 + 100] + b"x" * 1000 + data[len(opening) + 1156 :],
        data + b"more",
    ):
        async with connect(address) as client:
            peer = await open_export(client)
            with contextlib.suppress(trio.BrokenResourceError):
                await peer.stream.send_all(bad)
            reply = await peer.last_reply()
            assert isinstance(reply, RefusedReply), reply
    assert (await backup(library, address)).kind == "full"


async def test_a_source_that_vanishes_at_any_byte_leaves_nothing(tmp_path, library, nursery):
    address, _ = await start_target(nursery, tmp_path)
    _, (data, _, opening) = await exported(library)
    for end in (3, len(opening) - 1, len(opening), len(opening) + 30, 3 * MiB, len(data) - 1):
        async with connect(address) as client:
            peer = await open_export(client)
            await peer.stream.send_all(data[:end])
        # The next contact about that point answers only once the stream is gone for good.
        answer = await call(address, calls.SETTLE, calls.PointName("web", "rp-" + "0" * 15 + "1"))
        assert not answer.committed
        if (tmp_path / "web").exists():
            assert [p.name for p in (tmp_path / "web").iterdir() if not p.name.startswith(".")] == []
    assert (await backup(library, address, mode="full")).kind == "full"
    assert all(not p.name.startswith(".") for p in (tmp_path / "web").iterdir())


async def test_settling_ends_a_stream_that_hangs(tmp_path, library, nursery):
    """B3: after the answer "no" the point never appears, although its source still holds the connection."""
    address, _ = await start_target(nursery, tmp_path)
    frozen, (data, _, _) = await exported(library)
    async with connect(address) as client:
        peer = await open_export(client)
        await peer.stream.send_all(data[: 2 * MiB])
        assert isinstance(await peer.reply(), Ready)
        assert isinstance(await peer.reply(), Ack)
        answer = await call(address, calls.SETTLE, calls.PointName("web", frozen.point))
        assert not answer.committed
        with contextlib.suppress(trio.BrokenResourceError):
            await peer.stream.send_all(data[2 * MiB :])
        assert isinstance(await peer.last_reply(), RefusedReply)
    listed = await call(address, calls.LIST, calls.VmName(None))
    assert listed.points == []
    assert list((tmp_path / "web").iterdir()) == []


async def test_a_newer_backup_of_the_vm_ends_the_one_that_hangs(tmp_path, library, nursery):
    address, _ = await start_target(nursery, tmp_path)
    _, (data, _, _) = await exported(library)
    async with connect(address) as client:
        peer = await open_export(client)
        await peer.stream.send_all(data[: 2 * MiB])
        assert isinstance(await peer.reply(), Ready)
        done = await backup(library, address, mode="full")
        reply = await peer.last_reply()
        assert isinstance(reply, RefusedReply)
        assert "newer backup" in reply.reason
    assert sorted(p.name for p in (tmp_path / "web").iterdir()) == [done.point]


async def test_a_synthesis_waits_for_nobody_and_ends_no_backup(tmp_path, library, nursery):
    address, _ = await start_target(nursery, tmp_path)
    first = await backup(library, address)
    library.images["system"].write(0, b"2" * 4096)
    second = await backup(library, address)
    frozen, (data, _, opening) = await exported(library)
    async with connect(address) as client:
        peer = await open_export(client)
        await peer.stream.send_all(opening)
        assert isinstance(await peer.reply(), Ready)
        with RaisesLeaf(CallRefused, "is being written"):
            await call(address, calls.SYNTHESIZE, calls.PointName("web", second.point))
        await peer.stream.send_all(data[len(opening) :])
        assert isinstance(await peer.last_reply(), Committed)
    done = await call(address, calls.SYNTHESIZE, calls.PointName("web", second.point))
    assert done.was == first.point
    with RaisesLeaf(CallRefused, "no good point"):
        await call(address, calls.SYNTHESIZE, calls.PointName("web", "rp-" + "e" * 16))
    listed = await call(address, calls.LIST, calls.VmName("web"))
    assert [p.point for p in listed.points] == [first.point, second.point, frozen.point]


async def test_pruning_keeps_the_newest_and_refuses_what_is_in_use(tmp_path, library, nursery):
    address, _ = await start_target(nursery, tmp_path)
    points = []
    for number in range(4):
        library.images["system"].write(number * 8192, b"%d" % number * 4096)
        points.append((await backup(library, address)).point)

    async def prune(dry_run=False):
        return await call(address, calls.PRUNE, calls.PruneRequest("web", Keep(last=2), dry_run))

    planned = await prune(dry_run=True)
    assert (planned.synthesized, planned.removed) == ([points[2]], [points[1], points[0]])
    async with connect(address) as client:
        stream = await client.open_stream(calls.RESTORE, calls.PointName("web", points[0]))
        await stream.receive_some(1)
        with RaisesLeaf(CallRefused, "is being restored"):
            await prune()
        await stream.aclose()
    frozen, (data, _, opening) = await exported(library)
    async with connect(address) as client:
        peer = await open_export(client)
        await peer.stream.send_all(opening)
        assert isinstance(await peer.reply(), Ready)
        with RaisesLeaf(CallRefused, "is being written"):
            await prune()
        await peer.stream.send_all(data[len(opening) :])
        assert isinstance(await peer.last_reply(), Committed)
    done = await prune()
    assert (done.kept, done.removed) == ([points[3], frozen.point], [points[2], points[1], points[0]])
    listed = await call(address, calls.LIST, calls.VmName("web"))
    assert [(p.point, p.base) for p in listed.points] == [(points[3], None), (frozen.point, None)]
    assert (await backup(library, address)).base == frozen.point
    verified = await call(address, calls.VERIFY, calls.PointFilter("web", None))
    assert [p.problems for p in verified.points] == [[], [], []]
    with RaisesLeaf(CallRefused, "at least one"):
        await call(address, calls.PRUNE, calls.PruneRequest("web", Keep(), True))


async def nbd_read(uri, offset, length):
    """One read on a connection of its own."""
    where, name = uri.removeprefix("nbd://").split("/")
    address = Address.parse(where)
    with trio.fail_after(30):
        async with await trio.open_tcp_stream(address.host, address.port) as stream:

            async def exactly(count):
                data = b""
                while len(data) < count:
                    data += await stream.receive_some(count - len(data))
                return data

            await exactly(nbd_client.GREETING_BYTES)
            await stream.send_all(nbd_client.FIXED_NO_ZEROES + nbd_client.go(name))
            while True:
                _, _, kind, size = struct.unpack(">QIII", await exactly(20))
                await exactly(size)
                if kind == nbd_client.ACK:
                    break
            await stream.send_all(nbd_client.request(nbd_client.READ, offset, length))
            assert struct.unpack(">IIQ", await exactly(16))[1] == 0
            return await exactly(length)


async def test_a_point_is_served_over_nbd_while_its_caller_stays(tmp_path, library, nursery):
    address, _ = await start_target(nursery, tmp_path)
    await backup(library, address)
    library.images["system"].trim(4 * MiB, MiB)
    library.images["system"].write(2 * MiB, b"v2" * 10000)
    done = await backup(library, address)
    served, show = trio.open_memory_channel(1)

    async def stay(task_status=trio.TASK_STATUS_IGNORED):
        with trio.CancelScope() as scope:
            task_status.started(scope)
            async with connect(address) as client:
                request = calls.ServeRequest("web", done.point, "127.0.0.1:0")
                await client.call(calls.SERVE, request, on_progress=served.send_nowait)

    scope = await nursery.start(stay)
    with trio.fail_after(30):
        exports = (await show.receive())["exports"]
    assert list(exports) == ["system", "journal"]
    system = library.images["system"]
    for offset, length in ((0, 3 * MiB), (4 * MiB - 512, 2 * MiB), (len(system.data) - 512, 512)):
        assert await nbd_read(exports["system"], offset, length) == system.data[offset : offset + length]
    with RaisesLeaf(CallRefused, "restored, served or audited"):
        await call(address, calls.PRUNE, calls.PruneRequest("web", Keep(last=1), False))
    scope.cancel()
    with RaisesLeaf(CallRefused, "no point"):
        await call(address, calls.SERVE, calls.ServeRequest("web", "rp-" + "e" * 16, "127.0.0.1:0"))


async def test_a_point_is_a_read_only_device_that_never_reads_what_is_damaged(tmp_path, library, nursery):
    address, stop = await start_target(nursery, tmp_path)
    done = await backup(library, address)
    await stop()
    path = tmp_path / "web" / done.point / "system.qcow2"
    data = bytearray(path.read_bytes())
    data[9 * MiB] ^= 4
    path.write_bytes(data)
    with open_repository(tmp_path) as repository, repository.open("web", done.point) as opened:
        device = (await PointCatalog(opened).info("system")).device
        assert await device.read(0, MiB) == library.images["system"].data[:MiB]
        with pytest.raises(OSError, match=r"system\.qcow2"):
            await device.read(8 * MiB, 2 * MiB)
        runs = await device.allocation(19 * MiB, 3 * MiB)
        assert [(run.offset, run.length, run.kind) for run in runs] == [
            (19 * MiB, MiB, "data"),
            (20 * MiB, 2 * MiB, "hole"),
        ]
        for change in (device.write(0, b"x" * 512), device.trim(0, 512), device.write_zeroes(0, 512)):
            with pytest.raises(PermissionError):
                await change
        with pytest.raises(NoSuchExport):
            await PointCatalog(opened).info("nothing")


async def test_a_point_that_is_there_is_committed_again(tmp_path, library, nursery):
    address, _ = await start_target(nursery, tmp_path)
    frozen, (data, events, opening) = await exported(library)
    for expected in (Ready, Committed):
        async with connect(address) as client:
            peer = await open_export(client)
            await peer.stream.send_all(opening)
            reply = await peer.reply()
            assert isinstance(reply, expected)
            if expected is Ready:
                await peer.stream.send_all(data[len(opening) :])
                reply = await peer.last_reply()
            assert reply == Committed(frozen.point, events[-1].digest.hex())


class FullDisk(RepositoryFiles):
    """Takes so many bytes, then no more until it is emptied."""

    def __init__(self):
        self.room = 1 << 40

    def write(self, descriptor, offset, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(descriptor, offset, data)


async def test_a_full_disk_fails_that_backup_only(tmp_path, library, nursery):
    files = FullDisk()
    address, _ = await start_target(nursery, tmp_path, files=files)
    first = await backup(library, address)
    second = await backup(library, address)
    library.images["system"].write(0, b"new" * MiB)
    files.room = 1 * MiB
    with RaisesLeaf(Refused, "No space left on device") as refusal:
        await backup(library, address)
    assert "make room at the target (diskctl target prune)" in refusal.said
    with RaisesLeaf(CallRefused, "make room at the target (diskctl target prune)"):
        await call(address, calls.SYNTHESIZE, calls.PointName("web", second.point))
    assert library.ended[-1][1] == "discard"
    files.room = 1 << 40
    done = await backup(library, address)
    assert (second.base, done.base) == (first.point, second.point)
    verified = await call(address, calls.VERIFY, calls.PointFilter(None, None))
    assert [p.problems for p in verified.points] == [[], [], []]


async def test_a_full_disk_is_named_whatever_else_is_under_way(tmp_path, library, nursery):
    """Many small frames are under way when the disk is full. (test_diskd_receiving.py has the two moments of
    the receiver at which the reason could be lost.)"""
    files = FullDisk()
    address, _ = await start_target(nursery, tmp_path, files=files)
    for block in range(0, 6000, 2):
        library.images["system"].write(block * 4096, b"s" * 4096)
    await backup(library, address)
    for block in range(0, 6000, 2):
        library.images["system"].write(block * 4096, b"t" * 4096)
    files.room = 400 * 4096
    with RaisesLeaf(Refused, "No space left on device"):
        await backup(library, address)


async def until(condition):
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - another process changes it
            await trio.sleep(0.001)


@pytest.mark.slow
async def test_a_kill_at_any_moment_leaves_a_whole_point_or_none(tmp_path, library):
    """B5 with a real process and SIGKILL: some kills come before the commit, some behind it."""
    chosen = random.Random(7)
    root = tmp_path / "repository"
    async with target_process(root) as target:
        whole = (await backup(library, target.address)).disks[0].sent_bytes
        for attempt in range(8):
            library.images["system"].write(chosen.randrange(0, 4 * MiB, 4096), chosen.randbytes(3 * MiB))
            part = chosen.random() * (1.4 if attempt % 2 else 0.9)
            async with trio.open_nursery() as nursery:

                async def kill_in_the_middle(part=part):
                    incoming = []

                    def began():
                        incoming[:] = (root / "web").glob(".incoming-*/system.qcow2")
                        return bool(incoming)

                    def far_enough():
                        try:
                            size = incoming[0].stat().st_size
                        except FileNotFoundError:
                            return True  # Committed (or refused) already.
                        return part <= 1 and size >= part * whole / 10

                    await until(began)
                    await until(far_enough)
                    target.process.send_signal(signal.SIGKILL)
                    await target.process.wait()

                nursery.start_soon(kill_in_the_middle)
                try:
                    await backup(library, target.address, mode=chosen.choice(["auto", "full"]))
                except* OperatorError:
                    pass  # the target was killed under it; any other error is a defect
                nursery.cancel_scope.cancel()
            if target.process.poll() is None:
                await target.end(signal.SIGKILL)
            await target.start()
            assert list((root / "web").glob(".*")) == []
            verified = await call(target.address, calls.VERIFY, calls.PointFilter(None, None))
            assert [p.problems for p in verified.points if p.problems] == []
        # Whatever happened, the source knows which points are good, and goes on from them.
        last = await backup(library, target.address)
        await restore_point(
            target.address,
            calls.PointName("web", last.point),
            tmp_path / "out",
            disk_format="raw",
            key=None,
            on_progress=lambda _: None,
        )
        assert (tmp_path / "out" / "system.raw").read_bytes() == library.images["system"].data
        assert await target.end(signal.SIGTERM) == 0


class ForgetfulNames(RepositoryFiles):
    """The sync behind the rename fails, once."""

    def __init__(self):
        self.published, self.failed = False, False

    def publish(self, temporary, final):
        super().publish(temporary, final)
        self.published = True

    def sync_directory(self, path):
        super().sync_directory(path)
        if self.published and not self.failed:
            self.failed = True
            raise OSError(errno.EIO, "Input/output error")


async def test_a_commit_that_may_not_last_is_pending_at_its_source(tmp_path, library, nursery):
    """The point has its name already, so "refused" would be wrong; the next contact tells."""
    address, _ = await start_target(nursery, tmp_path, files=ForgetfulNames())
    with RaisesLeaf(TargetLost):
        await backup(library, address)
    point, outcome = library.ended[-1]
    assert outcome == "pending"
    done = await backup(library, address)
    assert (done.base, library.settled) == (point, [(point, True)])


async def test_a_damaged_base_is_refused_with_the_remedy(tmp_path, library, nursery):
    address, _ = await start_target(nursery, tmp_path)
    first = await backup(library, address)
    index = tmp_path / "web" / first.point / "export.index"
    index.write_bytes(index.read_bytes()[:-1])
    with RaisesLeaf(Refused, "index is damaged: it is not complete; take a full backup: use --full"):
        await backup(library, address)
    assert (await backup(library, address, mode="full")).kind == "full"


async def test_a_point_that_the_target_has_must_be_the_same_one(tmp_path, library, nursery):
    address, _ = await start_target(nursery, tmp_path)
    done = await backup(library, address)
    frozen, _ = await exported(library)

    async def send_as(point):
        frozen.point = point
        async with connect(address) as client:
            stream = await client.open_stream(calls.EXPORT, calls.Nothing())
            return await ExportSession(prepare_blocking(frozen, None)).run(stream)

    assert (await send_as(done.point)).point == done.point
    frozen.disks["system"]._data = b"x" * len(frozen.disks["system"]._data)
    with RaisesLeaf(StreamError, "something else"):
        await send_as(done.point)


async def test_the_repository_outlives_its_target(tmp_path, library, nursery):
    address, stop = await start_target(nursery, tmp_path)
    done = await backup(library, address)
    await stop()
    with open_repository(tmp_path) as repository:
        assert [p.point for p in repository.listing(None)] == [done.point]

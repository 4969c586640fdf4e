"""Several disks of a VM are read and sent at once, compressed or not; what the target keeps is the same."""

import os
import random
import threading

import pytest
import trio
from diskd_cutting_proxy import CuttingProxy
from diskd_frozen import MemoryLibrary
from diskd_partial_scene import content_of, shuffled
from diskd_repository_scene import Scene
from diskd_target import RaisesLeaf, receive_all, start_target, stream_of
from diskd_target_peers import open_export

from daemonkit.diskd_api import COMPRESS_LEVEL_MAX, BackupDisk, BackupRequest
from daemonkit.rpc import connect
from daemonkit.units import SECOND
from diskd.core import target_calls as calls
from diskd.core.stream import STORED, FrameKind, Ready, RefusedReply
from diskd.errors import Refused
from diskd.shell.backup import run_backup
from diskd.shell.producing import DISKS_AT_ONCE, Savings, disks_at_once
from diskd.shell.repository import open_repository
from diskd.shell.restore import apply_file, restore_point

pytestmark = pytest.mark.slow
MiB = 1 << 20
# More than are read at once.
NAMES = [f"disk{number}" for number in range(DISKS_AT_ONCE + 2)]


def half_random(chance, size):
    """Every MiB of it becomes about half as long."""
    parts = [chance.randbytes(MiB // 2) + b"holdfast" * (MiB // 16) for _ in range(size // MiB)]
    return b"".join(parts)


@pytest.fixture
def library():
    chance = random.Random(3)
    library = MemoryLibrary(**dict.fromkeys(NAMES, 8 * MiB))
    for number, disk in enumerate(library.images.values()):
        disk.write(4096, half_random(chance, (5 + number % 3) * MiB)[:-8192])
    return library


async def backup(library, address, *, retry_for=60, report=None, mode="auto", level=0):
    async def silent(_progress):
        await trio.lowlevel.checkpoint()

    disks = [] if mode == "resume" else [BackupDisk(name, name) for name in NAMES]
    request = BackupRequest(
        "web", disks, "", str(address), mode, retry_for_ns=retry_for * SECOND, compress_level=level
    )
    with trio.fail_after(60):
        return await run_backup(library, request, report=report or silent, key=None)


def check(root, library, point):
    with open_repository(root) as repository:
        assert repository.verify("web", point, lambda: None).problems == []
        with repository.open("web", point) as opened:
            for name, disk in library.images.items():
                assert opened.views[name].read(0, len(disk.data)) == bytes(disk.data)


class Readers:
    """Counts who reads; the first readers go on only when as many as there may be are there."""

    def __init__(self, frozen):
        self.now = self.most = 0
        self._lock = threading.Lock()
        self._meeting = threading.Barrier(DISKS_AT_ONCE)
        first = list(frozen.disks.values())[:DISKS_AT_ONCE]
        for disk in frozen.disks.values():
            self._watch(disk, waits=disk in first)

    def _watch(self, disk, *, waits):
        real, met = disk.read_into_blocking, []

        def read(offset, buffer):
            with self._lock:
                self.now += 1
                self.most = max(self.most, self.now)
            if waits and not met:
                met.append(self._meeting.wait(30))
            real(offset, buffer)
            with self._lock:
                self.now -= 1

        disk.read_into_blocking = read


async def test_disks_are_read_at_once_but_not_all_of_them(tmp_path, library, nursery):
    address, stop = await start_target(nursery, tmp_path)
    readers = []
    library.before_send = lambda frozen: readers.append(Readers(frozen))
    done = await backup(library, address)
    assert readers[0].most == DISKS_AT_ONCE
    await stop()
    check(tmp_path, library, done.point)


@pytest.mark.parametrize("level", [1, 9])
async def test_a_compressed_backup_is_shorter_and_otherwise_the_same(tmp_path, library, nursery, level):
    address, stop = await start_target(nursery, tmp_path)
    plain = await backup(library, address, mode="full")
    small = await backup(library, address, mode="full", level=level)
    assert [disk.digest for disk in small.disks] == [disk.digest for disk in plain.disks]
    for one, two, content in zip(plain.disks, small.disks, library.images.values(), strict=True):
        assert one.sent_bytes == 4096 * len(content.allocated)
        assert one.sent_bytes // 4 < two.sent_bytes < one.sent_bytes * 3 // 4
        assert one.changed_bytes == two.changed_bytes
    files = {}
    for point in (plain.point, small.point):
        paths = sorted((tmp_path / "web" / point).glob("*.qcow2"))
        files[point] = {path.name: path.read_bytes() for path in paths}
    assert files[plain.point] == files[small.point]
    await stop()
    check(tmp_path, library, small.point)


@pytest.mark.parametrize("level", [0, 3])
async def test_cut_links_let_several_disks_through(tmp_path, library, nursery, level):
    address, stop = await start_target(nursery, tmp_path)
    proxy = CuttingProxy(address, [7 * MiB, 3 * MiB, 5 * MiB])
    total = sum(4096 * len(disk.allocated) for disk in library.images.values())
    steps = []

    async def report(progress):
        await trio.lowlevel.checkpoint()
        steps.append(progress)

    done = await backup(library, await proxy.serve(nursery), report=report, level=level)
    assert proxy.shares == []
    assert [step["step"] for step in steps].count("interrupted") == 3
    sent = sum(disk.sent_bytes for disk in done.disks)
    assert sent == total if level == 0 else total // 4 < sent < total
    # Progress is told in what the guest sees, however it goes over the wire.
    assert {step["total_bytes"] for step in steps if step["step"] == "send"} == {total}
    await stop()
    check(tmp_path, library, done.point)


async def test_what_was_sent_compressed_is_gone_on_with_in_the_plain_and_back(tmp_path, library, nursery):
    address, stop = await start_target(nursery, tmp_path)
    proxy = CuttingProxy(address, [6 * MiB])
    front = await proxy.serve(nursery)

    async def report(progress):
        await trio.lowlevel.checkpoint()
        if progress["step"] == "interrupted":
            await stop()

    with RaisesLeaf(Exception):
        await backup(library, front, retry_for=1, report=report, level=3)
    for level in (0, 5):
        address, stop = await start_target(nursery, tmp_path)
        proxy.target, proxy.shares = address, [9 * MiB] if level == 0 else []
        if level == 0:
            with RaisesLeaf(Exception):
                await backup(library, front, retry_for=1, report=report, mode="resume")
    done = await backup(library, front, mode="resume", level=5)
    assert sum(proxy.carried) < sum(len(disk.data) for disk in library.images.values())
    await stop()
    check(tmp_path, library, done.point)


async def test_one_disk_that_fails_ends_the_backup(tmp_path, library, nursery):
    address, _ = await start_target(nursery, tmp_path)

    def break_disk(frozen):
        frozen.disks[NAMES[1]].fail_reads_at = 2 * MiB

    library.before_send = break_disk
    with RaisesLeaf(OSError, "no longer valid"):
        await backup(library, address)
    assert [outcome for _, outcome in library.ended] == ["discard"]


@pytest.mark.parametrize("level", [-1, COMPRESS_LEVEL_MAX + 1])
async def test_a_level_that_there_is_not_is_refused_before_anything_is_frozen(library, level):
    with RaisesLeaf(Refused, f"levels 1 to {COMPRESS_LEVEL_MAX}"):
        await backup(library, "127.0.0.1:1", level=level)
    assert library.ended == []


def zstd_frame(packed, stored):
    return bytes([FrameKind.ZSTD]) + packed[1:] + STORED.pack(len(stored)) + stored


async def test_compressed_nonsense_is_refused_and_disturbs_nobody(tmp_path, library, nursery):
    address, stop = await start_target(nursery, tmp_path)
    frozen = await library.begin_checkpoint("web", [BackupDisk(name, name) for name in NAMES], "")
    await frozen.end("keep")
    _, events, opening = stream_of(frozen)
    first = events[1].header.pack()
    for bad in (
        zstd_frame(first, b"no zstd frame"),
        zstd_frame(first, bytes(4096)),
        zstd_frame(first, b"\x28\xb5\x2f\xfd" + random.Random(1).randbytes(1000)),
        bytes([FrameKind.ZSTD]) + first[1:] + STORED.pack(2**32 - 1),
    ):
        async with connect(address) as client:
            peer = await open_export(client)
            await peer.stream.send_all(opening + bad)
            assert isinstance(await peer.reply(), Ready)
            assert isinstance(await peer.last_reply(), RefusedReply)
    done = await backup(library, address, level=3, mode="full")
    await stop()
    check(tmp_path, library, done.point)


async def test_a_compressed_backup_is_restored_like_any_other(tmp_path, library, nursery):
    (tmp_path / "root").mkdir()
    address, _ = await start_target(nursery, tmp_path / "root")
    await backup(library, address, level=1)
    library.images[NAMES[0]].write(MiB, b"v2" * 50000)
    library.images[NAMES[0]].trim(2 * MiB, 4096)
    second = await backup(library, address, level=1)
    assert second.disks[0].sent_bytes < 20000
    await restore_point(
        address,
        calls.PointName("web", second.point),
        tmp_path / "out",
        disk_format="raw",
        key=None,
        on_progress=lambda _done: None,
    )
    for name, disk in library.images.items():
        assert (tmp_path / "out" / f"{name}.raw").read_bytes() == disk.data


def test_a_compressed_file_is_applied(tmp_path):
    library = MemoryLibrary(system=3 * MiB)
    disk = library.images["system"]
    disk.write(0, half_random(random.Random(5), 2 * MiB))

    async def export(base):
        frozen = await library.begin_checkpoint("web", [BackupDisk("system", "system")], "")
        await frozen.end("keep")
        return frozen.point, stream_of(frozen, base, compress_level=3)[0]

    point, full = trio.run(export, None)
    assert len(full) < len(disk.data) // 2
    disk.write(8192, b"two" * 5000)
    _, difference = trio.run(export, point)
    assert len(difference) < 5000
    (tmp_path / "full").write_bytes(full)
    (tmp_path / "difference").write_bytes(difference)
    apply_file(tmp_path / "full", tmp_path / "disk.raw")
    apply_file(tmp_path / "difference", tmp_path / "disk.raw", trust_base=True)
    assert (tmp_path / "disk.raw").read_bytes() == disk.data


def test_points_are_equal_whatever_the_order_of_the_disks_frames(tmp_path):
    """Byte for byte: files, index, digests."""
    scene, again = Scene(), Scene()
    assert scene.names == again.names
    mixed = [shuffled(stream, number) for number, stream in enumerate(again.streams)]
    for name, streams in (("one", scene.streams), ("two", mixed)):
        (tmp_path / name).mkdir()
        with open_repository(tmp_path / name) as repository:
            for stream in streams:
                receive_all(repository, stream)
    for point in scene.names:
        one, two = (content_of(tmp_path / name / "web" / point) for name in ("one", "two"))
        del one["manifest.json"], two["manifest.json"]
        assert one == two
    again.check(tmp_path / "two", 3)


def test_compressing_leaves_half_of_the_processors_to_the_guests():
    cores = len(os.sched_getaffinity(0))
    assert [disks_at_once(disks, 0) for disks in (0, 1, 3, 64)] == [0, 1, 3, DISKS_AT_ONCE]
    assert disks_at_once(64, 3) == min(DISKS_AT_ONCE, max(1, cores // 2))
    assert disks_at_once(1, 3) == 1
    assert disks_at_once(0, 3) == 0


def test_what_compression_saved_is_counted_once_however_often_it_is_sent():
    savings = Savings()
    for frames, saved in ((4, 100), (8, 0), (12, 50)):
        savings.note(frames, saved)
    assert savings.saved_bytes == 150
    savings.go_back(12)
    assert savings.saved_bytes == 150
    savings.go_back(11)  # a part of the last buffer has arrived: it counts as if it were not shorter
    assert savings.saved_bytes == 100
    savings.note(12, 50)
    assert savings.saved_bytes == 150
    savings.go_back(0)
    assert savings.saved_bytes == 0

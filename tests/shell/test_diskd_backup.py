"""Backups of a VM in memory to a real target over real TCP."""

import json

import pytest
import trio
from diskd_frozen import MemoryLibrary
from diskd_target import RaisesLeaf, start_deaf_proxy, start_target

from daemonkit.diskd_api import BackupDisk, BackupRequest
from daemonkit.ports import Address
from daemonkit.rpc import CallFailed, connect
from diskd.core import target_calls as calls
from diskd.errors import NoSuchPoint, Refused
from diskd.shell.backup import run_backup
from diskd.shell.export import ExportSession, TargetLost, prepare_blocking
from diskd.shell.repository import open_repository

MiB = 1 << 20
CONFIG = 'name = "web"\n'


@pytest.fixture
def library():
    library = MemoryLibrary(system=5 * MiB, journal=1 * MiB)
    library.images["system"].write(0, b"boot" * 1024)
    library.images["system"].write(2 * MiB, bytes(range(256)) * 8192)
    library.images["journal"].write(4096, b"j" * 4096)
    return library


async def silent(_progress):
    await trio.lowlevel.checkpoint()


def request(address, *, mode="auto", since=None, images=("system", "journal"), names=None, vm="web"):
    disks = [BackupDisk(name, image) for name, image in zip(names or images, images, strict=True)]
    return BackupRequest(vm, disks, CONFIG, str(address), mode, since)


async def backup(library, address, **options):
    with trio.fail_after(30):
        return await run_backup(library, request(address, **options), report=silent, key=None)


async def call(address, method, params):
    with trio.fail_after(30):
        async with connect(address) as client:
            return await client.call(method, params)


async def read_point(root, vm, point, disk):
    def read():
        with open_repository(root) as repository, repository.open(vm, point) as opened:
            view = opened.views[disk]
            return view.read(0, opened.manifest.disk(disk).virtual_size)

    return await trio.to_thread.run_sync(read)


async def test_full_then_differential_then_every_point_reads_back(tmp_path, library, nursery):
    address, stop = await start_target(nursery, tmp_path)
    contents = {}
    first = await backup(library, address)
    contents[first.point] = bytes(library.images["system"].data)
    assert (first.kind, first.base) == ("full", None)
    assert first.disks[0].sent_bytes == 4096 + 2 * MiB
    library.images["system"].write(3 * MiB, b"new" * 4096)
    library.images["system"].trim(2 * MiB, 8192)
    second = await backup(library, address)
    contents[second.point] = bytes(library.images["system"].data)
    assert (second.kind, second.base) == ("differential", first.point)
    assert second.disks[0].changed_bytes == 3 * 4096 + 8192
    assert second.disks[0].sent_bytes == 3 * 4096
    assert second.disks[1].changed_bytes == 0
    third = await backup(library, address, mode="full")
    contents[third.point] = bytes(library.images["system"].data)
    assert third.base is None
    listed = await call(address, calls.LIST, calls.VmName(None))
    assert [(p.point, p.base, p.damaged) for p in listed.points] == [
        (first.point, None, None),
        (second.point, first.point, None),
        (third.point, None, None),
    ]
    verified = await call(address, calls.VERIFY, calls.PointFilter(None, None))
    assert [p.problems for p in verified.points] == [[], [], []]
    await stop()
    for point, content in contents.items():
        assert await read_point(tmp_path, "web", point, "system") == content
    assert library.ended == [(first.point, "keep"), (second.point, "keep"), (third.point, "keep")]
    manifest = json.loads((tmp_path / "web" / second.point / "manifest.json").read_text())
    assert manifest["base"] == first.point
    assert (tmp_path / "web" / second.point / "vm.toml").read_text() == CONFIG


async def test_since_names_an_older_base(tmp_path, library, nursery):
    address, _ = await start_target(nursery, tmp_path)
    first = await backup(library, address)
    library.images["system"].write(0, b"x" * 4096)
    await backup(library, address)
    library.images["system"].write(8192, b"y" * 4096)
    third = await backup(library, address, mode="since", since=first.point)
    assert third.base == first.point
    assert third.disks[0].changed_bytes == 8192


async def test_synthesize_makes_a_full_and_keeps_what_builds_on_it(tmp_path, library, nursery):
    address, stop = await start_target(nursery, tmp_path)
    first = await backup(library, address)
    library.images["system"].write(MiB, b"2" * 8192)
    second = await backup(library, address)
    at_second = bytes(library.images["system"].data)
    library.images["system"].trim(MiB, 4096)
    third = await backup(library, address)
    at_third = bytes(library.images["system"].data)
    report = await call(address, calls.SYNTHESIZE, calls.PointName("web", second.point))
    assert report.was == first.point
    again = await call(address, calls.SYNTHESIZE, calls.PointName("web", second.point))
    assert again.was is None
    verified = await call(address, calls.VERIFY, calls.PointFilter("web", None))
    assert [p.problems for p in verified.points] == [[], [], []]
    fourth = await backup(library, address)
    assert fourth.base == third.point
    await stop()
    assert await read_point(tmp_path, "web", second.point, "system") == at_second
    assert await read_point(tmp_path, "web", third.point, "system") == at_third
    leftovers = [path.name for path in (tmp_path / "web").iterdir() if path.name.startswith(".")]
    assert leftovers == []


async def test_an_unknown_base_is_refused_with_the_remedy(tmp_path, library, nursery):
    (tmp_path / "one").mkdir()
    address, stop = await start_target(nursery, tmp_path / "one")
    first = await backup(library, address)
    await stop()
    (tmp_path / "two").mkdir()
    other, _ = await start_target(nursery, tmp_path / "two")
    with RaisesLeaf(NoSuchPoint, "--full"):
        await backup(library, other, mode="since", since=first.point)
    library.points.clear()
    fresh = await backup(library, other)
    assert fresh.kind == "full"
    library.points.clear()
    with RaisesLeaf(NoSuchPoint, "--full"):
        await backup(library, other)
    assert [outcome for _, outcome in library.ended] == ["keep", "discard", "keep", "discard"]


async def test_a_read_error_fails_the_backup_and_leaves_nothing(tmp_path, library, nursery):
    address, _ = await start_target(nursery, tmp_path)

    def break_disk(frozen):
        frozen.disks["system"].fail_reads_at = 3 * MiB

    library.before_send = break_disk
    with RaisesLeaf(OSError, "no longer valid"):
        await backup(library, address)
    library.before_send = None
    assert library.ended[-1][1] == "discard"
    done = await backup(library, address)
    assert done.kind == "full"
    assert sorted(path.name for path in (tmp_path / "web").iterdir()) == [done.point]


async def test_an_unreachable_target_costs_no_checkpoint(library):
    with RaisesLeaf(CallFailed):
        await backup(library, Address("127.0.0.1", 1))
    assert library.frozen == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mode": "resume"}, "no interrupted backup"),
        ({"mode": "since", "since": "monday"}, "reference point"),
        ({"vm": "../web"}, "VM's name"),
        ({"images": ()}, "1 to"),
        ({"images": ("system", "system")}, "one name"),
        ({"images": ("nowhere",)}, "no image"),
    ],
)
async def test_bad_requests_are_refused(tmp_path, library, nursery, change, reason):
    address, _ = await start_target(nursery, tmp_path)
    with RaisesLeaf(Refused, reason):
        await backup(library, address, **change)


async def test_a_lost_acknowledgement_is_pending_and_settled(tmp_path, library, nursery):
    """B3: the target commits, its answer is swallowed; the next backup settles it and builds on it."""
    address, _ = await start_target(nursery, tmp_path)
    proxy, swallow = await start_deaf_proxy(nursery, address)
    swallow.append(True)
    with RaisesLeaf(TargetLost):
        await backup(library, proxy)
    assert library.ended[-1][1] == "pending"
    lost = library.ended[-1][0]
    library.images["system"].write(0, b"after" * 100)
    swallow.clear()
    done = await backup(library, proxy)
    assert library.settled == [(lost, True)]
    assert done.base == lost
    assert library.pending == {}


async def test_a_lost_acknowledgement_waits_for_its_own_target(tmp_path, library, nursery):
    """B3: another target knows nothing of the point, so its "no" must not settle it."""
    for name in "ab":
        (tmp_path / name).mkdir()
    first, _ = await start_target(nursery, tmp_path / "a")
    other, _ = await start_target(nursery, tmp_path / "b")
    proxy, swallow = await start_deaf_proxy(nursery, first)
    swallow.append(True)
    with RaisesLeaf(TargetLost):
        await backup(library, proxy)
    lost = library.ended[-1][0]
    library.images["system"].write(0, b"one" * 100)
    elsewhere = await backup(library, other)
    assert (elsewhere.kind, library.settled) == ("full", [])
    library.images["system"].write(8192, b"two" * 100)
    done = await backup(library, first)
    assert (done.base, library.settled) == (lost, [(lost, True)])
    assert done.disks[0].changed_bytes == 2 * 4096
    again = await backup(library, other)
    assert (again.base, again.disks[0].changed_bytes) == (elsewhere.point, 4096)


async def test_disks_that_exchanged_their_names_are_no_base_for_each_other(tmp_path, nursery):
    """Both images have the point, both names are at the target: and yet the chain would be wrong."""
    library = MemoryLibrary(one=1 * MiB, two=1 * MiB)
    library.images["one"].write(0, b"1" * 8192)
    library.images["two"].write(0, b"2" * 8192)
    address, _ = await start_target(nursery, tmp_path)
    first = await backup(library, address, images=("one", "two"), names=("root", "data"))
    with RaisesLeaf(NoSuchPoint, "take a full backup: use --full"):
        await backup(library, address, images=("two", "one"), names=("root", "data"))
    # A source that does not look is refused by the target.
    frozen = await library.begin_checkpoint("web", [BackupDisk("root", "two"), BackupDisk("data", "one")], "")
    with RaisesLeaf(Refused, "disk root was the image one in"):
        async with connect(address) as client:
            stream = await client.open_stream(calls.EXPORT, calls.Nothing())
            await ExportSession(prepare_blocking(frozen, first.point)).run(stream)
    await frozen.end("discard")
    full = await backup(library, address, images=("two", "one"), names=("root", "data"), mode="full")
    assert full.kind == "full"

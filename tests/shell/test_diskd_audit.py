"""An audit of a VM in memory against a real target: what it proves, and what it finds."""

import pytest
import trio
from diskd_frozen import MemoryLibrary
from diskd_target import RaisesLeaf, start_target

from daemonkit.diskd_api import BackupDisk, BackupRequest
from daemonkit.rpc import CallFailed, CallRefused, connect
from diskd.core import target_calls as calls
from diskd.core.retention import Keep
from diskd.errors import NoSuchPoint, Refused
from diskd.shell.audit import run_audit
from diskd.shell.backup import run_backup

KiB, MiB = 1 << 10, 1 << 20
DISKS = [BackupDisk("root", "system"), BackupDisk("journal", "journal")]


@pytest.fixture
def library():
    library = MemoryLibrary(system=5 * MiB + 512, journal=256 * KiB)
    library.images["system"].write(0, bytes(range(256)) * 4096)
    library.images["system"].write(3 * MiB, b"x" * (5 * MiB + 512 - 3 * MiB))
    library.images["journal"].write(8192, b"journal" * 1000)
    return library


async def nothing(_value):
    await trio.lowlevel.checkpoint()


async def backup(library, address, mode="auto"):
    request = BackupRequest("web", DISKS, "", str(address), mode, None)
    return (await run_backup(library, request, report=nothing, key=None)).point


async def audit(library, address, *, disks=(), point=None, report=nothing):
    request = calls.AuditRequest("web", list(disks), str(address), point)
    return await run_audit(library, request, report=report, key=None)


def places(report):
    return {disk.name: disk.places for disk in report.disks}


async def test_what_is_as_it_was_backed_up_passes(tmp_path, library, nursery):
    address, _ = await start_target(nursery, tmp_path)
    point = await backup(library, address)
    library.images["system"].write(1 * MiB, b"y" * 10000)
    library.images["system"].trim(64 * KiB, 64 * KiB)
    reports = []

    async def note(value):
        await trio.lowlevel.checkpoint()
        reports.append(value)

    report = await audit(library, address, report=note)
    assert (report.point, places(report)) == (point, {"root": [], "journal": []})
    root, journal = sorted(report.disks, key=lambda disk: -disk.size_bytes)
    assert (root.changed_bytes, root.compared_bytes) == (12 * KiB + 64 * KiB, 5 * MiB + 512 - 76 * KiB)
    assert (journal.changed_bytes, journal.compared_bytes, journal.exact) == (0, 256 * KiB, True)
    assert [value["step"] for value in reports][:2] == ["checkpoint", "compare"]
    # As if it had not been tried: the point is gone, the changes are tracked, and the next backup is right.
    assert library.ended[-1][1] == "discard"
    assert not library.busy
    second = await backup(library, address)
    assert (await audit(library, address)).point == second
    assert (await audit(library, address, point=point)).point == point


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda disk: _set(disk, 5000, b"?"), [[4096, 4096]]),
        (lambda disk: _set(disk, 5 * MiB + 511, b"?"), [[5 * MiB, 512]]),
        (lambda disk: _set(disk, 4 * MiB - 1, b"??"), [[4 * MiB - 4096, 8192]]),
        (lambda disk: _set(disk, 0, bytes(8192)), [[0, 8192]]),
        (lambda disk: _set(disk, 2 * MiB + 4096, b"data in a hole"), [[2 * MiB + 4096, 4096]]),
        (lambda disk: _lose(disk, 3 * MiB, 12288), [[3 * MiB, 12288]]),
    ],
)
async def test_a_change_that_nobody_marked_is_found_with_its_place(
    tmp_path, library, nursery, write, expected
):
    address, _ = await start_target(nursery, tmp_path)
    await backup(library, address)
    library.images["system"].write(1 * MiB, b"marked" * 1000)
    write(library.images["system"])
    report = await audit(library, address)
    assert places(report) == {"root": expected, "journal": []}
    assert sum(disk.differing_bytes for disk in report.disks) == sum(length for _, length in expected)


def _set(disk, offset, data):
    """Behind the tracking's back."""
    disk.data[offset : offset + len(data)] = data
    disk.allocated.update(range(offset // 4096, (offset + len(data) - 1) // 4096 + 1))


def _lose(disk, offset, length):
    disk.data[offset : offset + length] = bytes(length)
    disk.allocated.difference_update(range(offset // 4096, (offset + length) // 4096))


async def test_zeroes_may_be_stored_in_any_way(tmp_path, library, nursery):
    address, _ = await start_target(nursery, tmp_path)
    _set(library.images["system"], 2 * MiB, bytes(64 * KiB))
    await backup(library, address)
    library.images["system"].allocated.difference_update(range(512, 528))
    assert places(await audit(library, address)) == {"root": [], "journal": []}


async def test_damage_at_the_target_is_told_as_such(tmp_path, library, nursery):
    address, _ = await start_target(nursery, tmp_path)
    point = await backup(library, address)
    path = tmp_path / "web" / point / "root.qcow2"
    data = bytearray(path.read_bytes())
    place = data.find(b"x" * 1000)
    data[place] ^= 1
    path.write_bytes(data)
    with RaisesLeaf(Refused, "root.qcow2") as refusal:
        await audit(library, address)
    assert "take a full backup" in refusal.said
    assert not library.busy


async def test_what_cannot_be_audited_is_refused(tmp_path, library, nursery):
    address, stop = await start_target(nursery, tmp_path)
    with RaisesLeaf(Refused, "take a backup first"):
        await audit(library, address)
    assert library.ended == []
    point = await backup(library, address)
    with RaisesLeaf(NoSuchPoint, "no such point"):
        await audit(library, address, point="rp-" + "0" * 16)
    with RaisesLeaf(NoSuchPoint, "no disk other"):
        await audit(library, address, disks=[BackupDisk("other", "system")], point=point)
    library.points.remove(point)
    with RaisesLeaf(NoSuchPoint, "valid both here and at the target"):
        await audit(library, address)
    assert not library.busy
    await stop()
    with RaisesLeaf(CallFailed, "cannot connect"):
        await audit(library, address)


async def test_a_point_in_audit_is_not_pruned_and_a_lost_target_ends_it(tmp_path, library, nursery):
    address, stop = await start_target(nursery, tmp_path)
    await backup(library, address)
    await backup(library, address)
    refused = []

    async def prune_meanwhile(value):
        await trio.lowlevel.checkpoint()
        if value["step"] == "compare" and not refused:
            with RaisesLeaf(CallRefused, "audited"):
                async with connect(address) as client:
                    request = calls.PruneRequest("web", Keep(last=1), False)
                    await client.call(calls.PRUNE, request)
            refused.append(True)

    await audit(library, address, report=prune_meanwhile)
    assert refused

    async def stop_meanwhile(value):
        if value["step"] == "compare":
            await stop()
        await trio.lowlevel.checkpoint()

    with RaisesLeaf(CallFailed):
        await audit(library, address, report=stop_meanwhile)
    assert library.ended[-1][1] == "discard"


async def test_a_disk_that_grew_counts_its_end_as_changed(tmp_path, library, nursery):
    """And if the map forgot to say so, the audit finds what was written there."""
    address, _ = await start_target(nursery, tmp_path)
    await backup(library, address)
    disk = library.images["journal"]
    disk.data.extend(bytes(64 * KiB))
    assert places(await audit(library, address)) == {"root": [], "journal": []}
    _set(disk, 300 * KiB, b"beyond the end of the point")
    assert places(await audit(library, address)) == {"root": [], "journal": [[300 * KiB, 4096]]}

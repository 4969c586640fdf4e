"""The cases that break chains elsewhere, one by one, over real TCP: full where asked for, else the right base
or a refusal with the remedy; and what is restored is always what was there."""

import shutil

import pytest
import trio
from diskd_frozen import MemoryDisk, MemoryLibrary
from diskd_target import RaisesLeaf, start_target

from daemonkit.diskd_api import BackupDisk, BackupRequest
from diskd.errors import NoSuchPoint, Refused
from diskd.shell.backup import run_backup
from diskd.shell.repository import open_repository

KiB, MiB = 1 << 10, 1 << 20
pytestmark = pytest.mark.slow


def library_of(**sizes):
    library = MemoryLibrary(**sizes)
    for number, disk in enumerate(library.images.values()):
        disk.write(8192, bytes([number + 1]) * 50_000)
    return library


async def silent(_progress):
    await trio.lowlevel.checkpoint()


class Site:
    """A target, and everything that was ever backed up to it as it was."""

    def __init__(self, root, address, stop):
        self.root, self.address, self.stop = root, address, stop
        self.truth = {}

    async def backup(self, library, images, *, vm="web", mode="auto", since=None, names=None):
        disks = [BackupDisk(name, image) for name, image in zip(names or images, images, strict=True)]
        request = BackupRequest(vm, disks, "", str(self.address), mode, since)
        before = {disk.name: bytes(library.images[disk.image].data) for disk in disks}
        with trio.fail_after(60):
            report = await run_backup(library, request, report=silent, key=None)
        self.truth[vm, report.point] = before
        return report

    async def check(self):
        """Every point that is listed restores to what was there."""
        await self.stop()

        def read():
            seen = set()
            with open_repository(self.root) as repository:
                for listed in repository.listing(None):
                    if listed.damaged:
                        continue
                    seen.add((listed.vm, listed.point))
                    assert repository.verify(listed.vm, listed.point, lambda: None).problems == []
                    with repository.open(listed.vm, listed.point) as opened:
                        found = {
                            name: opened.views[name].read(0, opened.manifest.disk(name).virtual_size)
                            for name in opened.views
                        }
                    assert found == self.truth[listed.vm, listed.point]
            return seen

        return await trio.to_thread.run_sync(read)


@pytest.fixture
async def site(tmp_path, nursery):
    root = tmp_path / "repository"
    root.mkdir()
    return Site(root, *await start_target(nursery, root))


async def test_a_disk_that_was_added_needs_a_full_and_one_that_was_removed_does_not(site):
    library = library_of(a=300 * KiB, b=200 * KiB)
    first = await site.backup(library, ["a"])
    with RaisesLeaf(NoSuchPoint, "--full"):
        await site.backup(library, ["a", "b"])
    assert library.ended[-1][1] == "discard"
    with RaisesLeaf(NoSuchPoint, "no disk b"):
        await site.backup(library, ["a", "b"], mode="since", since=first.point)
    both = await site.backup(library, ["a", "b"], mode="full")
    assert (both.kind, both.base) == ("full", None)
    library.images["b"].write(0, b"after")
    assert (await site.backup(library, ["a", "b"])).base == both.point
    one = await site.backup(library, ["b"])
    assert one.kind == "differential"
    # And the one that was away: nothing was sent of it, so the last point that has both is the base.
    library.images["a"].write(0, b"changed while it was not part of the VM")
    again = await site.backup(library, ["a", "b"])
    assert again.base == list(site.truth)[-3][1]
    assert len(await site.check()) == 5


@pytest.mark.parametrize(
    "sizes", [[900 * KiB, 1200 * KiB], [200 * KiB, 700 * KiB], [64 * KiB, 300 * KiB + 512]]
)
async def test_a_resized_disk_restores_at_every_size(site, sizes):
    """Grown, shrunk, and grown again after a shrink: what was cut off does not come back."""
    library = library_of(a=300 * KiB)
    disk = library.images["a"]
    disk.write(250 * KiB, b"near the end" * 1000)
    await site.backup(library, ["a"])
    for size in sizes:
        old = len(disk.data)
        disk.data = disk.data[:size] + bytes(max(0, size - old))
        disk.allocated = {block for block in disk.allocated if block * 4096 < size}
        changed = range(min(old, size) // 4096, -(-max(old, size) // 4096))
        for blocks in disk.changed.values():
            blocks.update(changed)
        assert (await site.backup(library, ["a"])).kind == "differential"
        disk.write(size - 512, b"!" * 512)
        assert (await site.backup(library, ["a"])).kind == "differential"
    assert len(await site.check()) == 5


async def test_a_base_that_the_target_lost_is_not_built_on(site):
    library = library_of(a=300 * KiB)
    first = await site.backup(library, ["a"])
    library.images["a"].write(0, b"2" * 5000)
    second = await site.backup(library, ["a"])
    shutil.rmtree(site.root / "web" / second.point)
    library.images["a"].write(4096, b"3" * 5000)
    with RaisesLeaf(NoSuchPoint, "the target has no such point"):
        await site.backup(library, ["a"], mode="since", since=second.point)
    # The newest that both still hold is older, and everything since then is sent.
    third = await site.backup(library, ["a"])
    assert (third.base, third.disks[0].changed_bytes) == (first.point, 12 * KiB)
    shutil.rmtree(site.root / "web" / first.point)
    with RaisesLeaf(Refused, "--full"):
        await site.backup(library, ["a"])
    full = await site.backup(library, ["a"], mode="full")
    assert await site.check() == {("web", full.point)}


async def test_a_point_that_the_source_lost_is_not_a_base(site):
    library = library_of(a=300 * KiB)
    first = await site.backup(library, ["a"])
    second = await site.backup(library, ["a"])
    library.points.remove(second.point)
    library.forget(second.point)
    with RaisesLeaf(NoSuchPoint, "not a valid point of disk a"):
        await site.backup(library, ["a"], mode="since", since=second.point)
    assert (await site.backup(library, ["a"])).base == first.point
    for point in list(library.points):
        library.points.remove(point)
        library.forget(point)
    with RaisesLeaf(NoSuchPoint, "--full"):
        await site.backup(library, ["a"])
    assert (await site.backup(library, ["a"], mode="full")).kind == "full"
    assert len(await site.check()) == 4


async def test_two_targets_have_chains_of_their_own(site, tmp_path, nursery):
    (tmp_path / "second").mkdir()
    other = Site(tmp_path / "second", *await start_target(nursery, tmp_path / "second"))
    library = library_of(a=300 * KiB)
    bases = []
    for number in range(3):
        for place in (site, other):
            library.images["a"].write(number * 16 * KiB, bytes([number + 10]) * 4096)
            bases.append((await place.backup(library, ["a"])).base)
    ours, theirs = [p for _, p in site.truth], [p for _, p in other.truth]
    assert bases == [None, None, ours[0], theirs[0], ours[1], theirs[1]]
    assert len(await site.check()) == len(await other.check()) == 3


async def test_two_sources_of_one_name_never_build_on_each_other(site):
    """Two hosts with a VM "web", or disks that were made anew: only a full that was asked for is taken."""
    one, two = library_of(a=300 * KiB), library_of(a=300 * KiB)
    two.images["a"].write(100 * KiB, b"the other one" * 900)
    two._ids = iter(range(100, 200))
    first = await site.backup(one, ["a"])
    with RaisesLeaf(NoSuchPoint, "--full"):
        await site.backup(two, ["a"])
    stranger = await site.backup(two, ["a"], mode="full")
    one.images["a"].write(0, b"one")
    two.images["a"].write(0, b"two")
    assert (await site.backup(one, ["a"])).base == first.point
    assert (await site.backup(two, ["a"])).base == stranger.point
    assert len(await site.check()) == 4


async def test_many_vms_at_once_each_have_their_own_chain(site):
    libraries = {f"vm{number}": library_of(a=500 * KiB) for number in range(6)}

    async def back_up(vm, library):
        for number in range(3):
            library.images["a"].write(number * 32 * KiB, vm.encode() * 1000)
            await site.backup(library, ["a"], vm=vm)

    async with trio.open_nursery() as nursery:
        for vm, library in libraries.items():
            nursery.start_soon(back_up, vm, library)
    kinds = {}
    for vm, point in await site.check():
        kinds.setdefault(vm, []).append(point)
    assert {vm: len(points) for vm, points in kinds.items()} == dict.fromkeys(libraries, 3)


async def test_a_second_backup_of_a_vm_at_the_same_time_is_refused_and_harms_nothing(site):
    library = library_of(a=2 * MiB)
    outcomes = []

    async def back_up():
        try:
            outcomes.append((await site.backup(library, ["a"])).kind)
        except* Refused as error:
            outcomes.append(str(error.exceptions[0]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(back_up)
        nursery.start_soon(back_up)
    assert "full" in outcomes
    [other] = [outcome for outcome in outcomes if outcome != "full"] or ["held by a live backup"]
    assert other == "differential" or "held by a live backup" in other
    assert 1 <= len(await site.check()) <= 2


async def test_an_image_made_anew_under_its_old_name_needs_a_full(site):
    """Its points went with it: the target's are of another disk."""
    library = library_of(a=300 * KiB)
    await site.backup(library, ["a"])
    library.images["a"] = MemoryDisk("a", 300 * KiB)
    library.points.clear()
    with RaisesLeaf(NoSuchPoint, "--full"):
        await site.backup(library, ["a"])
    assert (await site.backup(library, ["a"], mode="full")).kind == "full"
    assert len(await site.check()) == 2

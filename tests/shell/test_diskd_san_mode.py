"""SAN mode on real file systems, with a real library and a real target: what is backed up, and what a
provider that fails costs."""

import json
import os

import pytest
import trio
from diskd_san_place import DISKS, KiB, MiB, get, nothing, place_on, put
from diskd_target import RaisesLeaf, start_target

from daemonkit.diskd_api import BackupRequest
from daemonkit.rpc import Call
from diskd.core import san_calls as calls
from diskd.errors import Refused
from diskd.shell.backup import run_backup
from diskd.shell.repository import open_repository
from diskd.shell.san import SanSource, _begin, _end, _list

pytestmark = pytest.mark.slow


async def back_up(san, address, *, mode="auto", report=nothing):
    request = BackupRequest("web", DISKS, 'name = "web"\n', str(address), mode, None)
    with trio.fail_after(60):
        return await run_backup(SanSource(san, "fast"), request, report=report, key=None)


def restored(root, point):
    with open_repository(root) as repository, repository.open("web", point) as opened:
        assert repository.verify("web", point, lambda: None).problems == []
        return {name: opened.views[name].read(0, 4 * MiB) for name in opened.views}


@pytest.mark.parametrize("kind", ["command", "btrfs-btrfs", "btrfs-reflink", "xfs-reflink"])
async def test_a_backup_from_a_snapshot_is_what_was_frozen(tmp_path, nursery, kind):
    repository = tmp_path / "repository"
    repository.mkdir()
    address, stop = await start_target(nursery, repository)
    with place_on(kind, tmp_path) as place:
        async with place.serving() as (library, san):
            await put(library, "a", 0, b"first" * 50_000)
            await put(library, "b", 1 * MiB, b"data" * 1000)
            truth, states = {}, []
            for number in range(3):
                await put(library, "a", number * 512 * KiB, bytes([number + 1]) * 10_000)
                frozen = {"root": await get(library, "a"), "data": await get(library, "b")}
                later = []

                async def write_meanwhile(value, number=number, later=later):
                    # The first sign after the cut: the checkpoint has ended, and the guest writes on.
                    if value["step"] == "frozen" and not later:
                        later.append(True)
                        states.append([info.state for info in library.checkpoints()][-1])
                        await put(library, "a", 3 * MiB + number * 8192, b"later" * 1000)
                        with RaisesLeaf(Refused, "is being backed up"):
                            await library.begin_checkpoint("web", DISKS, "")

                report = await back_up(san, address, report=write_meanwhile)
                assert later
                assert report.kind == ("full" if number == 0 else "differential")
                await place.gone()
                truth[report.point] = frozen
            assert set(states) <= {"merging", "pending"}
            assert report.disks[0].changed_bytes < 100 * KiB
            # An ordinary backup goes on from there.
            frozen = {"root": await get(library, "a"), "data": await get(library, "b")}
            request = BackupRequest("web", DISKS, "", str(address), "auto", None)
            plain = await run_backup(library, request, report=nothing, key=None)
            assert plain.base == report.point
            truth[plain.point] = frozen
    await stop()
    for point, frozen in truth.items():
        assert restored(repository, point) == frozen


@pytest.mark.parametrize("mode", ["fails", "lies", "talks", "hangs"])
async def test_a_provider_that_fails_leaves_vm_and_points_as_they_were(tmp_path, nursery, mode):
    repository = tmp_path / "repository"
    repository.mkdir()
    address, _ = await start_target(nursery, repository)
    with place_on("command", tmp_path) as place:
        async with place.serving() as (library, san):
            await put(library, "a", 0, b"first" * 10_000)
            first = await back_up(san, address)
            await put(library, "a", 8192, b"second" * 1000)
            before = library.points("a")
            place.mode(mode)
            with RaisesLeaf(
                Refused, "SAN provider fast failed to create" if mode in ("fails", "hangs") else ""
            ):
                await back_up(san, address)
            assert library.points("a") == before
            assert library.reserved == {}
            if mode != "hangs":  # Then it cannot be asked to delete either.
                assert place.left() == []
            place.mode("works")
            second = await back_up(san, address)
            assert (second.base, second.disks[0].changed_bytes) == (first.point, 8 * KiB)
            await place.gone()


async def test_a_checkpoint_that_failed_before_the_snapshot_was_there_is_no_backup(tmp_path, nursery):
    """B2: the AVHD was full, so the parent was written to while the provider was still copying it."""
    repository = tmp_path / "repository"
    repository.mkdir()
    address, _ = await start_target(nursery, repository)
    with place_on("command", tmp_path) as place:
        async with place.serving(avhd_limit_bytes=64 * KiB) as (library, san):
            await put(library, "a", 0, b"first" * 10_000)
            first = await back_up(san, address)
            place.mode("waits")

            async def guest():
                await place.until("began")
                await put(library, "a", 1 * MiB, b"too much for the AVHD" * 10_000)
                (place.directory / "go").touch()

            with RaisesLeaf((Refused, OSError)):
                async with trio.open_nursery() as inner:
                    inner.start_soon(guest)
                    await back_up(san, address)
            assert [point.point for point in library.points("a")] == [first.point]
            assert place.left() == []
            place.mode("works")
            assert (await back_up(san, address)).base == first.point


async def test_a_snapshot_that_cannot_be_deleted_is_deleted_later(tmp_path, nursery):
    repository = tmp_path / "repository"
    repository.mkdir()
    address, _ = await start_target(nursery, repository)
    with place_on("command", tmp_path) as place:
        async with place.serving() as (library, san):
            place.mode("stuck")
            first = await back_up(san, address)
            assert [point.valid for point in library.points("a")] == [True]
            assert len(place.left()) == 2
            listed = (await _list(san)(calls.SanNothing(), Call("test", nothing))).snapshots
            assert [(s.point, s.state) for s in listed] == [(first.point, "releasing")]
            place.mode("works")
            assert (await back_up(san, address)).base == first.point
            await place.gone()
            place.mode("stuck")
            await back_up(san, address)
        place.mode("works")
        async with place.serving():
            await place.gone()


async def test_a_provider_that_dawdles_does_not_hold_up_the_start(tmp_path, nursery):
    """A provider may take an hour for each left-over snapshot; meanwhile guests and control are served."""
    repository = tmp_path / "repository"
    repository.mkdir()
    address, _ = await start_target(nursery, repository)
    with place_on("command", tmp_path) as place:
        async with place.serving() as (library, san):
            place.mode("stuck")
            await back_up(san, address)
            lost = await SanSource(san, "fast").begin_checkpoint("other", DISKS[:1], "", target="1" * 32)
            for disk in lost.disks.values():
                disk.close()
        left = place.left()
        place.patient()
        place.mode("dawdles")
        with trio.fail_after(30):
            async with place.serving() as (library, san):
                assert place.left() == left
                assert library.reserved == {}
                assert [point.valid for point in library.points("a")] == [True, False]
                (place.directory / "go").touch()
                await place.gone()


async def test_a_daemon_that_dies_in_the_middle_leaves_no_snapshot_and_a_pending_point(tmp_path, nursery):
    repository = tmp_path / "repository"
    repository.mkdir()
    address, _ = await start_target(nursery, repository)
    with place_on("command", tmp_path) as place:
        async with place.serving() as (library, san):
            await put(library, "a", 0, b"first" * 10_000)
            first = await back_up(san, address)
            await put(library, "a", 8192, b"second" * 1000)
            source = SanSource(san, "fast")
            lost = await source.begin_checkpoint("web", DISKS, "", target="1" * 32)
            assert len(place.left()) == 2
            for disk in lost.disks.values():
                disk.close()
        async with place.serving() as (library, san):
            await place.gone()
            assert [point.valid for point in library.points("a")] == [True, False]
            second = await back_up(san, address)
            assert (second.base, second.disks[0].changed_bytes) == (first.point, 8 * KiB)


async def test_a_third_party_reads_the_snapshot_itself(tmp_path):
    with place_on("command", tmp_path) as place:
        async with place.serving() as (library, san):
            begin, end, listed = _begin(san), _end(san), _list(san)
            call = Call("test", nothing)
            await put(library, "a", 0, b"first" * 10_000)
            made = await begin(calls.SanBegin("fast", "web", DISKS, "the config", None), call)
            frozen = await get(library, "a")
            await put(library, "a", 0, b"later" * 10_000)
            mapping = json.loads(
                (place.root / "san" / library.daemon_name / f"{made.point}.json").read_text()
            )
            assert mapping["config"] == "the config"
            assert [disk["changes"] for disk in mapping["disks"]] == [{}, {}]
            assert await trio.Path(mapping["disks"][0]["raw"]).read_bytes() == frozen
            with pytest.raises(Refused, match="read by a third party"):
                await library.begin_checkpoint("web", DISKS, "")
        # It outlives the daemon.
        async with place.serving() as (library, san):
            end, listed = _end(san), _list(san)
            assert [s.mapping is not None for s in (await listed(calls.SanNothing(), call)).snapshots] == [
                True
            ]
            await end(calls.SanEnd(made.point, "keep"), call)
            assert place.left() == []
            assert [(p.point, p.valid) for p in library.points("a")] == [(made.point, True)]
            second = await _begin(san)(calls.SanBegin("fast", "web", DISKS, "", None), call)
            mapping = json.loads(san.mapping_path(second.point).read_text())
            changes = {disk["name"]: disk["changes"][made.point]["extents"] for disk in mapping["disks"]}
            assert changes == {"root": [[0, 52 * KiB]], "data": []}
            await end(calls.SanEnd(second.point, "discard"), call)
            assert [p.point for p in library.points("a")] == [made.point]
            with pytest.raises(Refused, match="no snapshot"):
                await end(calls.SanEnd(second.point, "keep"), call)


async def test_a_file_of_providers_that_others_may_write_is_refused(tmp_path, nursery):
    repository = tmp_path / "repository"
    repository.mkdir()
    address, _ = await start_target(nursery, repository)
    with place_on("command", tmp_path) as place:
        async with place.serving() as (library, san):
            (place.root / "san.toml").chmod(0o666)
            with RaisesLeaf(Refused, "chmod 600"):
                await back_up(san, address)
            (place.root / "san.toml").unlink()
            with RaisesLeaf(Refused, "known: none"):
                await back_up(san, address)
            assert library.checkpoints() == []


async def test_a_file_system_without_reflinks_says_so(tmp_path, nursery):
    repository = tmp_path / "repository"
    repository.mkdir()
    address, _ = await start_target(nursery, repository)
    with place_on("ext4-reflink", tmp_path) as place:
        async with place.serving() as (library, san):
            with RaisesLeaf(Refused, "cannot share extents"):
                await back_up(san, address)
            assert place.left() == []
            assert library.points("a") == []


async def test_a_snapshot_that_two_release_at_once_is_released_once(tmp_path):
    with place_on("command", tmp_path) as place:
        async with place.serving() as (library, san):
            call = Call("test", nothing)
            made = await _begin(san)(calls.SanBegin("fast", "web", DISKS, "", None), call)
            place.patient()
            place.mode("dawdles")
            async with trio.open_nursery() as both:
                both.start_soon(_end(san), calls.SanEnd(made.point, "keep"), call)
                both.start_soon(san.release, made.point, "keep")
                await place.until("deleting")
                (place.directory / "go").touch()
            assert place.left() == []
            assert [point.valid for point in library.points("a")] == [True]


@pytest.mark.parametrize("cancelled", [False, True])
async def test_what_a_provider_started_goes_with_it(tmp_path, cancelled):
    """A copy that goes on after its time makes a snapshot that nobody deletes."""
    with place_on("command", tmp_path) as place:
        os.mkfifo(place.directory / "alive")
        pipe = os.open(place.directory / "alive", os.O_RDONLY | os.O_NONBLOCK)

        def heard():
            try:
                return os.read(pipe, 100)
            except BlockingIOError:
                return None

        async with place.serving() as (_, san):
            place.mode("forks")
            with trio.move_on_after(30) as scope:
                async with trio.open_nursery() as inner:
                    if cancelled:
                        place.patient()

                        async def cancel():
                            while not heard():  # noqa: ASYNC110 - another process tells
                                await trio.sleep(0.01)
                            scope.cancel()

                        inner.start_soon(cancel)
                    with pytest.raises(Refused, match="took longer than 2 s"):
                        await SanSource(san, "fast").begin_checkpoint("web", DISKS, "", target="1" * 32)
            assert scope.cancelled_caught == cancelled
            with trio.fail_after(30):
                while heard() != b"":  # noqa: ASYNC110 - the end, when no other process has it open for writing
                    await trio.sleep(0.01)
        os.close(pipe)


async def test_a_deletion_that_is_tried_again_leaves_a_later_snapshot_its_reservation(tmp_path):
    with place_on("command", tmp_path) as place:
        async with place.serving() as (library, san):
            call = Call("test", nothing)
            place.mode("stuck")
            old = await _begin(san)(calls.SanBegin("fast", "web", DISKS[:1], "", None), call)
            with pytest.raises(Refused, match="failed to delete"):
                await _end(san)(calls.SanEnd(old.point, "keep"), call)
            await _begin(san)(calls.SanBegin("fast", "web", DISKS[:1], "", None), call)
            await _begin(san)(calls.SanBegin("fast", "other", DISKS[1:], "", None), call)
            assert sorted(library.reserved) == ["other", "web"]
            with pytest.raises(Refused, match="read by a third party"):
                await library.begin_checkpoint("web", DISKS[:1], "")


async def test_a_backup_does_not_wait_until_its_snapshot_is_deleted(tmp_path, nursery):
    """The deletion may take longer than the end of a backup may, and the target has committed."""
    repository = tmp_path / "repository"
    repository.mkdir()
    address, _ = await start_target(nursery, repository)
    with place_on("command", tmp_path) as place:
        async with place.serving() as (library, san):
            place.patient()
            place.mode("dawdles")
            report = await back_up(san, address)
            assert [(p.point, p.valid) for p in library.points("a")] == [(report.point, True)]
            assert library.reserved == {}
            assert len(place.left()) == 2
            (place.directory / "go").touch()
            await place.gone()


async def test_a_snapshot_that_is_still_being_made_is_not_ended(tmp_path):
    """The record would stand afterwards, of a snapshot that is deleted."""
    with place_on("command", tmp_path) as place:
        async with place.serving() as (library, san):
            call = Call("test", nothing)
            place.patient()
            place.mode("waits")
            async with trio.open_nursery() as inner:
                inner.start_soon(_begin(san), calls.SanBegin("fast", "web", DISKS, "", None), call)
                await place.until("began")
                (point,) = san.records
                with pytest.raises(Refused, match="still being made"):
                    await _end(san)(calls.SanEnd(point, "keep"), call)
                (place.directory / "go").touch()
            assert [record.state for record in san.records.values()] == ["standing"]
            await _end(san)(calls.SanEnd(point, "keep"), call)
            assert place.left() == []
            assert [(p.point, p.valid) for p in library.points("a")] == [(point, True)]

"""Backups of several VMs at the same time; a second one of the same VM is refused, naming the first."""

import os
import threading
from functools import partial

import pytest
import trio
from diskd_library import until
from diskd_target import RaisesLeaf, start_target
from image_harness import new_place

from daemonkit.diskd_api import BackupDisk, BackupRequest
from daemonkit.units import MiB
from diskd.core.inventory import LibrarySettings
from diskd.errors import Refused
from diskd.shell.backup import run_backup
from diskd.shell.library import open_library
from diskd.shell.repository import open_repository

SIZE = 2 * MiB
VMS = ("web", "db", "mail")


class Steps:
    """The progress of one backup; it goes on from "frozen" when ``gate`` is set."""

    def __init__(self) -> None:
        self.frozen, self.gate = trio.Event(), trio.Event()

    async def report(self, progress) -> None:
        await trio.lowlevel.checkpoint()
        if progress.get("step") == "frozen":
            self.frozen.set()
            await self.gate.wait()


@pytest.fixture
async def library(tmp_path):
    with new_place(tmp_path) as place:
        settings = LibrarySettings(shared_dir=str(place.settings.shared_dir))
        async with open_library(tmp_path / "root", settings) as opened:
            for number, vm in enumerate(VMS):
                await opened.create_image(vm, SIZE)
                device = (await opened.open(vm, peer="test", drop=lambda _: None)).device
                await device.write(0, bytes([number + 1]) * MiB)
            yield opened


def request(vm: str, image: str, address, mode="auto") -> BackupRequest:
    return BackupRequest(vm, [BackupDisk(image, image)], "", str(address), mode, None)


async def test_several_vms_are_backed_up_at_once(tmp_path, library, nursery):
    root = tmp_path / "repository"
    root.mkdir()
    address, stop = await start_target(nursery, root)
    for _ in range(2):
        steps = {vm: Steps() for vm in VMS}
        reports = {}

        async def back_up(vm: str, reports=reports, steps=steps) -> None:
            told = steps[vm].report
            reports[vm] = await run_backup(library, request(vm, vm, address), report=told, key=None)

        with trio.fail_after(60):
            async with trio.open_nursery() as backups:
                for vm in VMS:
                    backups.start_soon(back_up, vm)
                for each in steps.values():
                    await each.frozen.wait()
                assert sorted(info.vm for info in library.checkpoints()) == sorted(VMS), "all stand at once"
                for each in steps.values():
                    each.gate.set()
        assert len({report.point for report in reports.values()}) == len(VMS)
    await stop()

    def listed():
        with open_repository(root) as repository:
            return sorted((found.vm, found.kind) for found in repository.listing(None))

    found = await trio.to_thread.run_sync(listed)
    assert found == sorted((vm, kind) for vm in VMS for kind in ("differential", "full"))


async def test_a_second_backup_of_a_vm_is_refused_naming_the_first(tmp_path, library, nursery):
    root = tmp_path / "repository"
    root.mkdir()
    address, _ = await start_target(nursery, root)
    first = Steps()
    ask = partial(run_backup, library, report=Steps().report, key=None)
    with trio.fail_after(60):
        async with trio.open_nursery() as backups:
            backups.start_soon(
                partial(run_backup, library, request("web", "web", address), report=first.report, key=None)
            )
            await first.frozen.wait()
            [standing] = library.checkpoints()
            says = f"checkpoint {standing.checkpoint} of VM web is held by a backup that runs"
            for again in (request("web", "web", address), request("web", "db", address, "full")):
                with RaisesLeaf(Refused, says):
                    await ask(again)
            with RaisesLeaf(Refused, says):  # another VM, but its disk
                await ask(request("thief", "web", address))
            assert [info.checkpoint for info in library.checkpoints()] == [standing.checkpoint]
            first.gate.set()


async def test_of_two_that_begin_together_one_is_refused(library):
    refusals = []

    async def begin(hold: trio.Event) -> None:
        try:
            frozen = await library.begin_checkpoint("web", [BackupDisk("web", "web")], "")
        except Refused as refused:
            refusals.append(str(refused))
            hold.set()
        else:
            await hold.wait()
            await frozen.end("discard")

    hold = trio.Event()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(begin, hold)
    assert len(refusals) == 1 and "of vm web is just beginning" in refusals[0]


async def test_a_backup_that_waits_for_a_merge_says_how_far_it_is(tmp_path, library, nursery):
    root = tmp_path / "repository"
    root.mkdir()
    address, _ = await start_target(nursery, root)
    frozen = await library.begin_checkpoint("web", [BackupDisk("web", "web")], "")
    device = (await library.open("web", peer="test", drop=lambda _: None)).device
    await device.write(0, b"n" * SIZE)
    gate = threading.Event()
    files = library._images["web"].files
    files._sync = lambda descriptor: gate.wait(30) and os.fdatasync(descriptor)
    steps = []

    async def report(progress) -> None:
        await trio.lowlevel.checkpoint()
        steps.append(progress)
        if progress["step"] == "merge":
            gate.set()

    nursery.start_soon(frozen.end, "discard")
    await until(lambda: library.checkpoints() == [] or library.checkpoints()[0].state != "sealed")
    with trio.fail_after(60):
        await run_backup(library, request("web", "web", address), report=report, key=None)
    assert [step["step"] for step in steps][:2] == ["checkpoint", "merge"]
    told = [(step["done_bytes"], step["total_bytes"]) for step in steps if step["step"] == "merge"]
    assert told[0] == (0, SIZE) and all(0 <= done <= total == SIZE for done, total in told)

"""Carries out backups and restores of VMs (core.vm_copies says where): calls to diskd, progress passed back.

A backup goes on exactly as long as its caller waits for it: whoever goes away (the operator, the node in
between, the owner) cancels it at diskd, which then is as if it had not been tried.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar

import attrs
import structlog
import trio

from clusterd.config import PeerAddresses, parse_vm, renamed_vm
from clusterd.core import calls
from clusterd.core.commands import AddVm, Command
from clusterd.core.node import NodeCore
from clusterd.core.vm_copies import BackupPlace, check_restored, restored_names
from clusterd.errors import Refused, Unanswered
from clusterd.shell.diskds import Diskds
from clusterd.shell.loop import CoreLoop
from daemonkit.diskd_api import BackupDisk, BackupReport, BackupRequest, RestoreRequest
from daemonkit.errors import HoldfastError
from daemonkit.rpc import Call, CallFailed, connect

R = TypeVar("R")
Ask = Callable[[Command], Awaitable[calls.Accepted]]
OnProgress = Callable[[Any], None]

PROGRESS_MAX: Final = 64
CLEAN_UP_SECONDS_MAX: Final = 60.0

log = structlog.get_logger("vm_copies")


class VmCopies:
    """The handlers of ``vm.backup`` and ``vm.restore``. ``ask`` gives the core a command."""

    def __init__(
        self,
        core: NodeCore,
        loop: CoreLoop,
        diskds: Diskds,
        peers: Mapping[str, PeerAddresses],
        key: bytes | None,
        ask: Ask,
    ) -> None:
        self._core = core
        self._loop = loop
        self._diskds = diskds
        self._peers = peers
        self._key = key
        self._ask = ask

    # --- backup

    async def backup(self, params: calls.BackupVm, call: Call) -> BackupReport:
        """Raises Refused, CallFailed."""
        place = self._core.backup_place(params.vm, self._loop.now())
        run = self._backup_here if place.node == self._core.identity.name else self._backup_there
        if params.at not in (None, place.node):
            raise Refused(f"VM {params.vm} moved to node {place.node} just now: try again")

        async def work(on_progress: OnProgress) -> BackupReport:
            return await self._while_it_stays(params.vm, place, lambda: run(params, place, on_progress))

        return await _reporting(call, work)

    async def _backup_there(
        self, params: calls.BackupVm, place: BackupPlace, on_progress: OnProgress
    ) -> BackupReport:
        peer = self._peers.get(place.node)
        if peer is None:
            raise CallFailed(f"this node's configuration names no peer {place.node!r}")
        passed_on = attrs.evolve(params, at=place.node)
        async with connect(peer.control, key=self._key) as client:
            return await client.call(calls.VM_BACKUP, passed_on, on_progress=on_progress)

    async def _backup_here(
        self, params: calls.BackupVm, place: BackupPlace, on_progress: OnProgress
    ) -> BackupReport:
        config = place.config
        request = BackupRequest(
            vm=config.name,
            disks=[BackupDisk(disk.name, disk.image) for disk in config.disks],
            config=config.text,
            target=params.target,
            mode="full" if params.full else "auto",
            epoch=place.epoch,
            compress_level=params.compress_level,
        )
        report = await self._diskds.backup(config.disks[0].diskd, request, on_progress)
        log.info("vm.backed_up", vm=config.name, point=report.point, target=params.target)
        return report

    async def _while_it_stays(
        self, vm: str, place: BackupPlace, work: Callable[[], Awaitable[BackupReport]]
    ) -> BackupReport:
        """Every node on the way watches: the one that runs the backup may be gone, and say nothing."""
        reports: list[BackupReport] = []
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                while not self._core.has_gone_elsewhere(vm, place):
                    await self._loop.wait_turn()
                nursery.cancel_scope.cancel(reason="the VM went elsewhere")

            nursery.start_soon(watch)
            reports.append(await work())
            nursery.cancel_scope.cancel(reason="the backup is done")
        if not reports:
            raise Refused(
                f"VM {vm} was moved or failed over during its backup, which was given up;"
                " its changes stay tracked: run it again"
            )
        return reports[0]

    # --- restore

    async def restore(self, params: calls.RestoreVm, call: Call) -> calls.RestoredVm:
        """Raises Refused, CallFailed; then no image is left behind, except where the VM may be recorded."""
        return await _reporting(call, lambda on_progress: self._restore(params, on_progress))

    async def _restore(self, params: calls.RestoreVm, on_progress: OnProgress) -> calls.RestoredVm:
        name = params.new_name or params.vm
        if self._core.vm_config(name) is not None:
            raise Refused(
                f"VM {name} exists: restore under another name with --as NAME,"
                f" or remove it first (clusterctl vm remove {name})"
            )
        plan = RestoreRequest(params.vm, params.point, params.target, images={}, dry_run=True)
        found = await self._diskds.restore(params.diskd, plan, on_progress)
        images = restored_names(params.vm, params.new_name, {disk.name: disk.image for disk in found.disks})
        # Everything that can be refused is, before anything is copied.
        text = renamed_vm(found.config, name=name, images=images, diskd=params.diskd)
        config = check_restored(parse_vm(text, where="the restored VM file"), list(images.values()))
        request = RestoreRequest(params.vm, params.point, params.target, images=images)
        restored = await self._diskds.restore(params.diskd, request, on_progress)
        try:
            accepted = await self._ask(AddVm(config, start=params.start))
        except Unanswered as error:
            kept = ", ".join(sorted(images.values()))
            raise Unanswered(
                f"{error}; the restored images {kept} are kept: if 'clusterctl vm show {name}' does not know"
                " the VM, delete them (diskctl image delete)"
            ) from error
        except HoldfastError:
            with trio.move_on_after(CLEAN_UP_SECONDS_MAX, shield=True):
                await self._diskds.delete_images(params.diskd, sorted(images.values()))
            raise
        log.info("vm.restored", vm=name, point=params.point, images=images)
        return calls.RestoredVm(name, params.point, images, restored.data_bytes, accepted.text)


async def _reporting(call: Call, work: Callable[[OnProgress], Awaitable[R]]) -> R:
    """Run ``work``; what it reports goes to the caller, except where that is far too slow for it."""
    sender, receiver = trio.open_memory_channel[Any](PROGRESS_MAX)

    def on_progress(value: Any) -> None:
        try:
            sender.send_nowait(value)
        except trio.WouldBlock:
            return

    async def pass_on() -> None:
        async with receiver:
            async for value in receiver:
                await call.progress(value)

    results: list[R] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pass_on)
        async with sender:
            results.append(await work(on_progress))
    return results[0]

"""`diskd target`: receives exports, and answers for the points that it holds.

One listener carries control calls and streams alike (daemonkit.rpc's stream methods; ADR 0010). An
export is one connection:

    source: prefix, header        target: Ready(window), or Committed if it has that point already
    source: frames ...            target: Ack ... while verified and written
    source: trailer               target: Working ... then Committed; or RefusedReply at any moment

Everything that blocks runs in threads of its own limiter. A backup's failure (a full disk, a digest
that does not match, a source that vanished) removes that backup's directory and nothing else.

A source allows one backup of a VM at a time, so a new export of a VM means that the one still being
received is dead: it is cancelled, and gone before the new one begins. The same for a point that a source
settles (B3): after the answer it is committed, or never will be.
"""

import contextlib
import errno
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import attrs
import structlog
import trio

from daemonkit.errors import HoldfastError, OperatorError
from daemonkit.ports import Address
from daemonkit.rpc import Call, Registry, serve
from diskd.core import target_calls as calls
from diskd.core.catalog import Manifest, offered
from diskd.core.stream import (
    Ack,
    Committed,
    ExportHeader,
    Have,
    Ready,
    RefusedReply,
    Reply,
    SourceLost,
    StreamError,
    Trailer,
)
from diskd.errors import Damaged, Refused
from diskd.shell.bulk import BulkSocket
from diskd.shell.chain_view import OpenPoint
from diskd.shell.incoming import Incoming, Uncertain
from diskd.shell.nbd_server import NbdServer
from diskd.shell.point_audit import answer_audit
from diskd.shell.point_export import PointCatalog
from diskd.shell.point_restore import send_point
from diskd.shell.receiving import (
    FrameReceiver,
    Source,
    receive_frames,
    send_reply,
    signs_of_life,
)
from diskd.shell.repository import Gone, Repository, open_repository
from diskd.shell.work import Work

T = TypeVar("T")

# What a source may have on its way: enough for a link of 10 Gbit/s and 10 ms, small against memory.
WINDOW_BYTES: Final = 16 << 20
RECEIVING_MAX: Final = 8
READING_MAX: Final = 8
# Threads for what is answered at once, however many long jobs run.
_ANSWERING: Final = 4
# A source that says nothing for so long is dead: it has no reason to be silent while its window is open.
IDLE_SECONDS_MAX: Final = 120.0
HEADER_SECONDS_MAX: Final = 30.0
# So much of a broken export is sent twice at most, besides what the last sync took.
DURABLE_SECONDS: Final = 2.0
PROGRESS_SECONDS: Final = 0.5
SWEEP_SECONDS: Final = 3600.0
CLEAN_UP_SECONDS_MAX: Final = 60.0
_RECEIVE_BYTES: Final = 1 << 20

# What may end one export without being our defect.
_EXPECTED: Final = (
    HoldfastError,
    OSError,
    trio.TooSlowError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
)

# What may come between an export and its trailer without anything being wrong with what has come.
_INTERRUPTED: Final = (SourceLost, trio.Cancelled, trio.BrokenResourceError, trio.TooSlowError)

log = structlog.get_logger("target")


def poll_cancelled() -> None:
    """For worker threads: raises trio.Cancelled once the caller has been cancelled."""
    trio.from_thread.check_cancelled()


@attrs.define(eq=False)
class _Receiving:
    """``committing``: everything has come. ``unwanted``: what there is of it will never be gone on with."""

    point: str
    scope: trio.CancelScope
    ended: trio.Event
    committing: bool = False
    unwanted: bool = False


class _Busy(Refused):
    """All slots are taken."""


def leaf_of(error: BaseException) -> BaseException:
    """The most telling leaf of a group."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [leaf_of(inner) for inner in error.exceptions]
    for kind in (OperatorError, OSError, HoldfastError):
        for leaf in leaves:
            if isinstance(leaf, kind):
                return leaf
    return leaves[0]


def reason_of(error: BaseException) -> str:
    """One line for the other side."""
    if isinstance(error, OSError):
        where = f"{Path(str(error.filename)).name}: " if error.filename else ""
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "; make room at the target (diskctl target prune), then try again" if is_full else ""
        return f"{where}{error.strerror or error}{remedy}"
    return str(error) or type(error).__name__


class Target:
    """The calls and streams over one repository."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._threads = trio.CapacityLimiter(3 * RECEIVING_MAX + READING_MAX + _ANSWERING)
        self._receiving: dict[str, _Receiving] = {}
        self._readers: Counter[str] = Counter()
        self._slots = trio.Semaphore(RECEIVING_MAX)
        self._reading = trio.Semaphore(READING_MAX)

    def register(self, registry: Registry) -> None:
        """Everything that `diskd target` answers."""
        registry.add(calls.POINTS_OFFERED, self._points)
        registry.add(calls.SETTLE, self._settle)
        registry.add(calls.LIST, self._list)
        registry.add(calls.VERIFY, self._verify)
        registry.add(calls.SYNTHESIZE, self._synthesize)
        registry.add(calls.PRUNE, self._prune)
        registry.add(calls.SERVE, self._serve)
        registry.add_stream(calls.EXPORT, self._receive)
        registry.add_stream(calls.RESTORE, self._restore)
        registry.add_stream(calls.AUDIT, self._audit)

    async def _thread(self, function: Callable[..., T], *args: Any) -> T:
        return await trio.to_thread.run_sync(function, *args, limiter=self._threads)

    async def sweep(self) -> None:
        """Now and then remove what no source will come back for; until cancelled."""
        while True:
            await trio.sleep(SWEEP_SECONDS)
            await self.sweep_once(time.time())

    async def sweep_once(self, now: float) -> None:
        """The same, now: of all VMs that nobody is writing. What cannot be read is left to the next one."""
        try:
            vms = await self._thread(self._repository.vms)
        except OSError as error:
            log.warning("repository.not_swept", reason=reason_of(error))
            return
        for vm in vms:
            if vm in self._receiving:
                continue
            # As whoever writes: an export that begins meanwhile waits, and is not taken for a leftover.
            try:
                async with self._turn(vm, "sweep"):
                    for path in await self._thread(self._repository.clean_up, now, vm):
                        log.info("repository.cleaned_up", path=path)
            except Refused:
                continue
            except OSError as error:
                log.warning("repository.not_swept", vm=vm, reason=reason_of(error))

    # --- calls -------------------------------------------------------------------------------------

    async def _points(self, request: calls.VmName, _call: Call) -> calls.OfferedPoints:
        if request.vm is None:
            raise Refused("name the VM")
        loaded = await self._thread(self._repository.load, request.vm)
        points = [calls.OfferedPoint(p.point, dict(p.disks)) for p in offered(loaded.points)]
        return calls.OfferedPoints(
            self._repository.identity,
            len(loaded.points) + len(loaded.damaged),
            points,
            await self._thread(self._repository.unfinished_points, request.vm),
        )

    async def _settle(self, request: calls.PointName, _call: Call) -> calls.SettleReport:
        receiving = self._receiving.get(request.vm)
        if receiving is not None and receiving.point == request.point:
            receiving.unwanted = True
            await self._end(receiving, "its source settles the point")
        await self._thread(self._repository.forget, request.vm, request.point)
        loaded = await self._thread(self._repository.load, request.vm)
        return calls.SettleReport(request.point in loaded.points)

    async def _list(self, request: calls.VmName, _call: Call) -> calls.ListReport:
        return calls.ListReport(await self._thread(self._repository.listing, request.vm))

    async def _verify(self, request: calls.PointFilter, call: Call) -> calls.VerifyReport:
        wanted = await self._thread(self._repository.points_of, request.vm, request.point)
        total = await self._thread(self._repository.data_bytes, wanted)
        verified: list[calls.Verified] = []
        async with self._reading, self._told(call, request.vm, "verify", total) as work:
            for vm, point in wanted:
                work.vm, work.point = vm, point
                damaged = [found.point for found in verified if found.vm == vm and found.problems]
                verify = partial(self._repository.verify, vm, point, work, damaged=damaged)
                with contextlib.suppress(Gone):  # Pruned meanwhile: nothing that anybody would restore.
                    verified.append(await self._thread(verify))
        return calls.VerifyReport(verified)

    async def _synthesize(self, request: calls.PointName, call: Call) -> calls.SynthesizeReport:
        self._refuse_written(request.vm, "synthesize")
        async with self._turn(request.vm, request.point), self._told(call, request.vm, "synthesize") as work:
            try:
                report = await self._thread(self._repository.synthesize, request.vm, request.point, work)
            except Damaged as error:
                raise Damaged(f"{error}; take a full backup (diskctl backup --full)") from error
            except OSError as error:
                raise Refused(reason_of(error)) from error
        log.info("point.synthesized", vm=report.vm, point=report.point, was=report.was)
        return report

    async def _prune(self, request: calls.PruneRequest, call: Call) -> calls.PruneReport:
        prune = partial(self._repository.prune, request.vm, request.keep, dry_run=request.dry_run)
        if request.dry_run:
            return await self._thread(prune, poll_cancelled)
        self._refuse_written(request.vm, "prune")
        if readers := self._readers[request.vm]:
            raise Refused(
                f"{request.vm} is being restored, served or audited ({readers} times);"
                " prune again when that has ended"
            )
        async with self._turn(request.vm, "prune"), self._told(call, request.vm, "prune") as work:
            return await self._thread(prune, work)

    @asynccontextmanager
    async def _told(
        self, call: Call, vm: str | None, step: str, total_bytes: int | None = None
    ) -> AsyncIterator[Work]:
        """What a long job counts itself with; its caller is told now and then."""
        work = Work(poll_cancelled, vm, step, total_bytes=total_bytes)

        async def tell() -> None:
            while True:
                await trio.sleep(PROGRESS_SECONDS)
                await call.progress(work.report())

        await call.progress(work.report())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tell)
            yield work
            nursery.cancel_scope.cancel(reason="done")

    def _refuse_written(self, vm: str, verb: str) -> None:
        if (receiving := self._receiving.get(vm)) is not None:
            raise Refused(f"{vm}/{receiving.point} is being written; {verb} again when that has ended")

    # --- who writes what ---------------------------------------------------------------------------

    async def _end(self, receiving: _Receiving, reason: str) -> None:
        receiving.scope.cancel(reason=reason)
        await receiving.ended.wait()

    @asynccontextmanager
    async def _turn(self, vm: str, point: str) -> AsyncIterator[_Receiving]:
        """Be the only one who writes points of this VM; whoever was before is ended first. Only a commit of
        the same point goes on: its source has come back, and shall find the point."""
        while (earlier := self._receiving.get(vm)) is not None:
            if earlier.committing and earlier.point == point:
                await earlier.ended.wait()
                continue
            earlier.unwanted = earlier.unwanted or earlier.point != point
            log.info("export.superseded", vm=vm, point=earlier.point, by=point)
            await self._end(earlier, f"a newer backup of this VM began ({point})")
        try:
            self._slots.acquire_nowait()
        except trio.WouldBlock:
            raise _Busy(
                f"the target is busy with {RECEIVING_MAX} other backups; try again when one has ended"
            ) from None
        mine = _Receiving(point, trio.CancelScope(), trio.Event())
        self._receiving[vm] = mine
        try:
            with mine.scope:
                yield mine
            if mine.scope.cancelled_caught:
                raise Refused(
                    f"{vm}/{point}: ended by a newer backup of this VM, or by its source's settling it"
                )
        finally:
            if self._receiving.get(vm) is mine:
                del self._receiving[vm]
            mine.ended.set()
            self._slots.release()

    # --- exports -----------------------------------------------------------------------------------

    async def _receive(self, options: calls.ExportOptions, peer: str, stream: trio.abc.Stream) -> None:
        try:
            await self._receive_export(options, peer, stream)
        except (*_EXPECTED, BaseExceptionGroup) as error:
            leaf = leaf_of(error)
            if not isinstance(leaf, _EXPECTED):
                raise
            # No answer to these two: "refused" would say that nothing of it is kept.
            if isinstance(leaf, Uncertain):
                log.error("export.uncertain", peer=peer, reason=str(leaf))  # noqa: TRY400 - one line, no trace
                return
            if isinstance(leaf, SourceLost):
                log.warning("export.interrupted", peer=peer, reason=str(leaf))
                return
            reason = "the source fell silent" if isinstance(leaf, trio.TooSlowError) else reason_of(leaf)
            log.warning("export.refused", peer=peer, reason=reason)
            await self._say_last(stream, RefusedReply(reason, busy=isinstance(leaf, _Busy)))

    async def _say_last(self, stream: trio.abc.Stream, reply: Reply) -> None:
        """Say it, then read on until the source has closed: an early close would destroy the message."""
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            with trio.move_on_after(5):
                await send_reply(stream, reply)
                while await stream.receive_some(_RECEIVE_BYTES):
                    pass

    async def _receive_export(self, options: calls.ExportOptions, peer: str, stream: trio.abc.Stream) -> None:
        source = Source(stream)
        with trio.fail_after(HEADER_SECONDS_MAX):
            header = await source.next_event()
        if not isinstance(header, ExportHeader):
            raise StreamError("the stream ends before its header")
        async with signs_of_life(source), self._turn(header.vm, header.point) as turn:
            incoming = await self._thread(
                partial(self._repository.receive, header, source.decoder.opening, resume=options.resume)
            )
            if isinstance(incoming, Manifest):
                log.info("export.known", peer=peer, vm=header.vm, point=header.point)
                reply = Committed(incoming.point, incoming.source_digest)
            else:
                manifest = await self._take_whole(source, incoming, turn)
                reply = Committed(manifest.point, manifest.source_digest)
        await self._say_last(stream, reply)

    async def _take_whole(self, source: Source, incoming: Incoming, turn: _Receiving) -> Manifest:
        """As ``_take``; leaves nothing but the point, or what its source can go on with."""
        let_go = incoming.discard
        try:
            return await self._take(source, incoming, turn)
        except (BaseExceptionGroup, *_INTERRUPTED) as error:
            if not turn.unwanted and isinstance(leaf_of(error), _INTERRUPTED):
                let_go = incoming.suspend
            raise
        finally:
            with trio.move_on_after(CLEAN_UP_SECONDS_MAX, shield=True):
                await self._thread(let_go)

    async def _take(self, source: Source, incoming: Incoming, turn: _Receiving) -> Manifest:
        header = incoming.header
        log.info("export.began", vm=header.vm, point=header.point, base=header.base, known=incoming.taken)
        known = incoming.known()
        while (packed := await self._thread(next, known, None)) is not None:
            source.decoder.known(packed)
            await source.say(Have(packed))
        await source.say(Ready(WINDOW_BYTES))
        trailer = await self._take_frames(source, incoming)
        turn.committing = True
        manifest = await self._thread(
            lambda: incoming.commit(
                trailer,
                source_digest=trailer.digest.hex(),
                committed_at=self._repository.commit_time(header.vm),
                poll=poll_cancelled,
            )
        )
        await self._thread(incoming.publish)
        log.info("backup.committed", vm=header.vm, point=header.point, base=header.base, kind=header.kind)
        return manifest

    async def _take_frames(self, source: Source, incoming: Incoming) -> Trailer:
        """Receive and write side by side; the window and the buffers bound what is in memory."""

        async def acknowledge() -> None:
            await source.say(Ack(incoming.taken, incoming.durable))

        async def keep() -> None:
            while True:
                await trio.sleep(DURABLE_SECONDS)
                snapshot = await self._thread(incoming.snapshot)
                if snapshot is not None:
                    await self._thread(incoming.keep, snapshot)
                    await acknowledge()

        with BulkSocket(source.stream) as bulk:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keep)
                trailer = await receive_frames(
                    FrameReceiver(bulk, source.decoder, source.decoder.take_rest() + bulk.take_rest()),
                    incoming.batch,
                    acknowledge,
                    threads=self._threads,
                    idle_seconds_max=IDLE_SECONDS_MAX,
                )
                nursery.cancel_scope.cancel(reason="everything has come")
            return trailer

    # --- restores ----------------------------------------------------------------------------------

    async def _restore(self, params: calls.PointName, peer: str, stream: trio.abc.Stream) -> None:
        opening = self._opened(params.vm, params.point)
        async with self._reading:
            await send_point(opening, params, stream, self._thread, peer=peer, reason_of=reason_of)

    @asynccontextmanager
    async def _opened(self, vm: str, point: str) -> AsyncIterator[OpenPoint]:
        """The point, open for reading: its VM is not pruned meanwhile."""
        self._readers[vm] += 1
        try:
            opening = self._repository.open(vm, point)
            opened = await self._thread(opening.__enter__)
            try:
                yield opened
            finally:
                with trio.move_on_after(CLEAN_UP_SECONDS_MAX, shield=True):
                    await self._thread(opening.__exit__, None, None, None)
        finally:
            self._readers[vm] -= 1

    async def _audit(self, params: calls.PointName, _peer: str, stream: trio.abc.Stream) -> None:
        async with self._reading:
            await answer_audit(self._opened(params.vm, params.point), stream, self._thread)

    async def _serve(self, request: calls.ServeRequest, call: Call) -> calls.Nothing:
        """Until the caller goes, which cancels this; the NBD connections end with it."""
        listen = Address.parse(request.nbd)
        async with self._opened(request.vm, request.point) as opened:
            server = NbdServer(PointCatalog(opened))
            async with trio.open_nursery() as nursery:
                address = await nursery.start(server.serve_tcp, listen)
                log.info("point.served", vm=request.vm, point=request.point, nbd=str(address))
                exports = {disk.name: f"nbd://{address}/{disk.name}" for disk in opened.manifest.disks}
                await call.progress({"nbd": str(address), "exports": exports})
                await trio.sleep_forever()


async def run_target(
    root: Path,
    listen: Address,
    *,
    keys: list[bytes],
    ready: Callable[[Address], Awaitable[None]],
) -> None:
    """Serve until cancelled. Raises OperatorError for a root or an address that cannot be had."""
    with open_repository(root) as repository:
        registry = Registry()
        target = Target(repository)
        target.register(registry)
        async with trio.open_nursery() as nursery:
            address = await nursery.start(_serve, registry, listen, keys)
            nursery.start_soon(target.sweep)
            await ready(address)


async def _serve(
    registry: Registry, listen: Address, keys: list[bytes], *, task_status: trio.TaskStatus[Address]
) -> None:
    await serve(registry, listen, keys=keys, task_status=task_status)

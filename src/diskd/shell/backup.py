"""One backup, from the cut to the reference point (``backup.run`` on diskd's control).

    contact the target            before anything is frozen: an unreachable target costs nothing
    begin the checkpoint          Library.begin_checkpoint: all disks at one instant (B1)
    settle pending points         by id; the target's answer is final (B3)
    choose the base, send         core/copy_plan.py, shell/export.py
    end the checkpoint            keep: committed and acknowledged
                                  pending: the trailer may have left, but no answer came
                                  discard: anything else; the source is as if it had not been tried

Ending the checkpoint is shielded: whoever asked for the backup may have gone in the meantime.
"""

from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal, Protocol

import attrs
import structlog
import trio

from daemonkit.diskd_api import BACKUP_RUN, BackupDisk, BackupDiskReport, BackupReport, BackupRequest, Lease
from daemonkit.errors import HoldfastError, OperatorError
from daemonkit.ports import Address
from daemonkit.rpc import Call, CallFailed, Client, Registry, connect
from daemonkit.units import SECOND
from diskd.core import target_calls as calls
from diskd.core.copy_plan import ChosenMode, TargetPoint, choose_base, data_bytes
from diskd.core.inventory import (
    CONFIG_BYTES_MAX,
    DISKS_MAX,
    NAME_PATTERN,
    REPOSITORY_ID_LENGTH_MAX,
)
from diskd.core.patience import Patience
from diskd.core.ports import FrozenVm, OnMerge
from diskd.core.stream import abort, is_point
from diskd.core.stream_zstd import check_level
from diskd.errors import Refused
from diskd.shell.export import (
    CommittedOther,
    ExportSession,
    TargetLost,
    prepare_blocking,
    source_disks,
)
from diskd.shell.producing import Prepared

CONTACT_SECONDS_MAX: Final = 10.0
# Making a point durable takes two syncs of a disk; longer than this means that the disk is gone.
END_SECONDS_MAX: Final = 120.0
PROGRESS_SECONDS: Final = 0.5
RATE_SAMPLES: Final = 10

log = structlog.get_logger("backup")

EndOutcome = Literal["keep", "discard", "pending"]
Report = Callable[[Any], Awaitable[None]]


class CheckpointSource(Protocol):
    """The part of shell.library.Library that a backup needs."""

    async def begin_checkpoint(
        self,
        vm: str,
        disks: list[BackupDisk],
        config: str,
        *,
        target: str | None = None,
        allow_crash_consistent: bool = False,
        on_merge: OnMerge | None = None,
    ) -> FrozenVm:
        """All disks at one instant; Refused says why not. ``target``: the repository it is for."""
        ...

    async def resume_checkpoint(self, vm: str) -> FrozenVm:
        """The one that an interrupted backup of this VM left standing; Refused where there is none."""
        ...

    def lease(self, image: str) -> Lease: ...


def register_backup(registry: Registry, source: CheckpointSource, *, key: bytes | None = None) -> None:
    """Answer ``backup.run`` on diskd's control. ``key`` is the cluster key for the target's listener."""

    async def run(request: BackupRequest, call: Call) -> BackupReport:
        return await _while_unfenced(
            source, request, lambda: run_backup(source, request, report=call.progress, key=key)
        )

    async def export(request: calls.ExportRequest, _peer: str, stream: trio.abc.Stream) -> None:
        await run_export(source, request, stream)

    registry.add(BACKUP_RUN, run)
    registry.add_stream(calls.EXPORT_IMAGE, export)


async def _while_unfenced(
    source: CheckpointSource, request: BackupRequest, backup: Callable[[], Awaitable[BackupReport]]
) -> BackupReport:
    """Run it; give it up when another run of the VM takes its disks (``BackupRequest.epoch``)."""
    if not request.epoch:
        return await backup()
    reports: list[BackupReport] = []
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            # A lease tells nobody that it changed, and half a second makes no difference here.
            while all(source.lease(disk.image).epoch <= request.epoch for disk in request.disks):  # noqa: ASYNC110 - no event
                await trio.sleep(PROGRESS_SECONDS)
            nursery.cancel_scope.cancel(reason="fenced")

        nursery.start_soon(watch)
        reports.append(await backup())
        nursery.cancel_scope.cancel(reason="done")
    if not reports:
        raise Refused(
            f"{request.vm} was taken over by a newer run during its backup, which was given up;"
            " its changes stay tracked: run it again"
        )
    return reports[0]


async def run_export(source: CheckpointSource, request: calls.ExportRequest, stream: trio.abc.Stream) -> None:
    """``export.image``: the caller plays the target. Its point is kept once the caller has committed."""
    try:
        if not NAME_PATTERN.fullmatch(request.image):
            raise Refused(f"{request.image[:80]!r} is not an image's name")
        check_level(request.compress_level)
        frozen = await source.begin_checkpoint(request.image, [BackupDisk(request.image, request.image)], "")
    except (HoldfastError, OSError) as error:
        reason = str(error)
    else:
        reason = await _export_frozen(frozen, request, stream)
    if reason:
        with trio.move_on_after(CONTACT_SECONDS_MAX):
            await stream.send_all(abort(reason))
            await stream.aclose()


async def _export_frozen(frozen: FrozenVm, request: calls.ExportRequest, stream: trio.abc.Stream) -> str:
    """Why it cannot even begin, or nothing. Failures in the middle are raised: the stream just ends."""
    outcome: EndOutcome = "discard"
    try:
        try:
            prepared = await trio.to_thread.run_sync(prepare_blocking, frozen, request.since)
        except (HoldfastError, OSError) as error:
            return str(error)
        await ExportSession(prepared, compress_level=request.compress_level).run(stream)
        outcome = "keep" if request.keep else "discard"
    finally:
        with trio.move_on_after(END_SECONDS_MAX, shield=True):
            await frozen.end(outcome)
    return ""


def check_request(request: BackupRequest) -> None:
    """Raises Refused with the remedy."""
    check_level(request.compress_level)
    if request.mode == "since" and not (request.since and is_point(request.since)):
        raise Refused(f"{request.since!r} is not a reference point: rp- and 16 hex digits")
    if not NAME_PATTERN.fullmatch(request.vm):
        raise Refused(f"{request.vm[:80]!r} is not a VM's name: lower case letters, digits, '.', '_', '-'")
    if request.mode == "resume":
        return  # The checkpoint knows its disks and its configuration.
    if not 0 < len(request.disks) <= DISKS_MAX:
        raise Refused(f"a backup takes 1 to {DISKS_MAX} disks, not {len(request.disks)}")
    for disk in request.disks:
        if not NAME_PATTERN.fullmatch(disk.name):
            raise Refused(
                f"{disk.name[:80]!r} is not a disk's name: lower case letters, digits, '.', '_', '-'"
            )
    if len({disk.name for disk in request.disks}) != len(request.disks):
        raise Refused("two disks of the VM have one name")
    if len({disk.image for disk in request.disks}) != len(request.disks):
        raise Refused("one image is named twice")
    if len(request.config.encode()) > CONFIG_BYTES_MAX:
        raise Refused(f"the VM's configuration is larger than {CONFIG_BYTES_MAX} bytes")


async def run_backup(
    source: CheckpointSource, request: BackupRequest, *, report: Report, key: bytes | None
) -> BackupReport:
    """Raises Refused or another OperatorError; the source then still tracks every change (B3)."""
    check_request(request)
    target = Address.parse(request.target)
    began = trio.current_time()
    repository = (await _offered(target, request.vm, key)).repository[:REPOSITORY_ID_LENGTH_MAX]
    await report({"step": "checkpoint", "vm": request.vm})
    if request.mode == "resume":
        frozen = await source.resume_checkpoint(request.vm)
    else:
        frozen = await source.begin_checkpoint(
            request.vm,
            request.disks,
            request.config,
            target=repository,
            allow_crash_consistent=request.allow_crash_consistent,
            on_merge=_merge_teller(request.vm, report),
        )
    log.info("backup.began", vm=request.vm, point=frozen.point, target=str(target), mode=request.mode)
    backup = _Backup(frozen, request, target, key, report)
    outcome: EndOutcome | Literal["suspend"] = "discard"
    try:
        if frozen.target not in (None, repository):
            raise Refused(f"{frozen.point} was on its way to another target; go on with that one")
        if request.mode == "resume":
            _check_disks(request, frozen)
        await backup.send()
        outcome = "keep"
    except BaseException as error:  # also a cancelled one: how the checkpoint ends depends on why
        outcome = backup.outcome_of(error)
        raise
    finally:
        with trio.move_on_after(END_SECONDS_MAX, shield=True) as scope:
            await (frozen.suspend() if outcome == "suspend" else frozen.end(outcome))
        log.info("backup.ended", vm=request.vm, point=frozen.point, outcome=outcome)
    if scope.cancelled_caught:
        raise Refused(f"the target has committed {frozen.point}, but the disk here does not answer")
    return backup.result(trio.current_time() - began)


def _merge_teller(vm: str, report: Report) -> OnMerge:
    """Tells how far the merge is that the checkpoint waits for; the most it ever had to do is the whole."""
    total = 0

    async def tell(left_bytes: int) -> None:
        nonlocal total
        total = max(total, left_bytes)
        done = total - left_bytes
        await report({"step": "merge", "vm": vm, "done_bytes": done, "total_bytes": total})

    return tell


def _check_disks(request: BackupRequest, frozen: FrozenVm) -> None:
    stands = sorted(disk.image for disk in frozen.disks.values())
    if request.disks and sorted(disk.image for disk in request.disks) != stands:
        raise Refused(f"the interrupted backup of {request.vm} is of {', '.join(stands)}")


async def _offered(target: Address, vm: str, key: bytes | None) -> calls.OfferedPoints:
    with _answering(target):
        async with connect(target, key=key) as client:
            return await client.call(calls.POINTS_OFFERED, calls.VmName(vm))


@contextmanager
def _answering(target: Address) -> Iterator[None]:
    """A bound on what should take no time."""
    try:
        with trio.fail_after(CONTACT_SECONDS_MAX):
            yield
    except trio.TooSlowError:
        raise CallFailed(f"the target {target} does not answer") from None


def _lost_of(error: BaseException) -> OperatorError | None:
    """The loss of the target, where nothing else has gone wrong."""
    if isinstance(error, BaseExceptionGroup):
        found = [_lost_of(inner) for inner in error.exceptions]
        return None if None in found else found[0]
    return error if isinstance(error, TargetLost | CallFailed) else None


def _is_something_else(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return error.subgroup(CommittedOther) is not None
    return isinstance(error, CommittedOther)


def _is_cancelled(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_is_cancelled(inner) for inner in error.exceptions)
    return isinstance(error, trio.Cancelled)


@attrs.define(eq=False)
class Moved:
    """How fast an export has moved of late. ``bytes_per_second`` is of the last few seconds."""

    attempts: int = 0
    bytes_per_second: int | None = None
    remaining_s: int | None = None
    _samples: deque[tuple[float, int]] = attrs.field(factory=lambda: deque(maxlen=RATE_SAMPLES))

    def note(self, now: float, done: int, total: int) -> None:
        """``done`` of ``total`` bytes at ``now``."""
        if self._samples and done < self._samples[-1][1]:
            self._samples.clear()
        self._samples.append((now, done))
        since, before = self._samples[0]
        seconds = now - since
        if seconds > 0:
            self.bytes_per_second = round((done - before) / seconds)
            rate = self.bytes_per_second
            self.remaining_s = round((total - done) / rate) if rate > 0 else None


@attrs.define(eq=False)
class _Backup:
    """What happens between the cut and the end of the checkpoint."""

    frozen: FrozenVm
    request: BackupRequest
    target: Address
    key: bytes | None
    report: Report
    prepared: Prepared | None = None
    session: ExportSession | None = None
    base: str | None = None
    moved: Moved = attrs.field(factory=Moved)

    async def send(self) -> None:
        """Returns when the target has committed. A target that is lost is tried again for a while: the
        checkpoint stands meanwhile, and what the target has made durable is not sent again."""
        # Whoever wants to look at the frozen disks meanwhile finds them as IMAGE:CHECKPOINT.
        frozen = {"checkpoint": self.frozen.checkpoint, "point": self.frozen.point}
        await self.report({"step": "frozen", "vm": self.request.vm, **frozen})
        patience = Patience(self.request.retry_for_ns)
        while True:
            try:
                await self._attempt()
                return
            except (OperatorError, BaseExceptionGroup) as error:
                session, lost = self.session, _lost_of(error)
                if session is None or lost is None or not self.has_been_ready:
                    raise
                pause = patience.lost(round(trio.current_time() * SECOND), session.durable)
                if pause is None:
                    raise
                reason = str(lost)
            self.moved.attempts += 1
            log.info("backup.interrupted", vm=self.request.vm, point=self.frozen.point, reason=reason)
            await self.report({"step": "interrupted", "vm": self.request.vm, "reason": reason})
            await trio.sleep(pause / SECOND)

    def outcome_of(self, error: BaseException) -> EndOutcome | Literal["suspend"]:
        """What becomes of the checkpoint: it stands on where the target or the caller was lost on the way,
        and the caller has any patience. A backup that was fenced, or refused, is over."""
        session = self.session
        was_lost = _lost_of(error) is not None or (_is_cancelled(error) and not self.request.epoch)
        resuming = self.request.mode == "resume"
        if was_lost and self.request.retry_for_ns and (resuming or self.has_been_ready):
            return "suspend"
        if resuming and not self.has_been_ready:
            # Another process has sent it, as far as the trailer for all that is known here.
            if session is None or _lost_of(error) is not None:
                return "suspend"
            return "discard" if _is_something_else(error) else "pending"
        return "pending" if session is not None and session.may_have_committed else "discard"

    @property
    def has_been_ready(self) -> bool:
        """The target has taken this export, so that the point was not committed then."""
        return self.moved.attempts > 0 or (self.session is not None and self.session.has_begun)

    async def _attempt(self) -> None:
        async with connect(self.target, key=self.key) as client:
            if self.prepared is None:
                with _answering(self.target):
                    offered = await client.call(calls.POINTS_OFFERED, calls.VmName(self.request.vm))
                    if await self._settle(client, offered.repository):
                        offered = await client.call(calls.POINTS_OFFERED, calls.VmName(self.request.vm))
                self.base = await self._base(client, offered)
                self.prepared = await trio.to_thread.run_sync(prepare_blocking, self.frozen, self.base)
            before = self.session
            session = ExportSession(
                self.prepared,
                finished=before.finished if before else None,
                compress_level=self.request.compress_level,
            )
            session.durable = before.durable if before else 0
            with _answering(self.target):
                stream = await client.open_stream(
                    calls.EXPORT,
                    calls.ExportOptions(resume=before is not None or self.request.mode == "resume"),
                )
            self.session = session
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tell, session)
                await session.run(stream)
                nursery.cancel_scope.cancel(reason="committed")

    async def _settle(self, client: Client, repository: str) -> bool:
        """Whether anything was. Only the target that a point was sent to knows of it (B3): what waits for
        another one's word goes on waiting."""
        pending = self.frozen.pending_at(repository)
        for point in pending:
            answer = await client.call(calls.SETTLE, calls.PointName(self.request.vm, point))
            await self.frozen.settle(point, committed=answer.committed)
            log.info("backup.settled", vm=self.request.vm, point=point, committed=answer.committed)
        return bool(pending)

    async def _base(self, client: Client, offered: calls.OfferedPoints) -> str | None:
        """Of a resumed backup it is what the target has begun, or even committed, to build on."""
        point = self.frozen.point
        if self.request.mode == "resume":
            if point in offered.unfinished:
                return offered.unfinished[point]
            report = await client.call(calls.LIST, calls.VmName(self.request.vm))
            for listed in report.points:
                if listed.point == point:
                    return listed.base
        return self._choose(offered)

    def _choose(self, offered: calls.OfferedPoints) -> str | None:
        mode: ChosenMode = "auto" if self.request.mode == "resume" else self.request.mode
        points = [TargetPoint(point.point, point.disks) for point in offered.points]
        if mode == "auto" and not points and offered.known:
            raise Refused(
                f"none of the target's {offered.known} points of {self.request.vm} is good (target verify"
                " tells more); take a full backup: use --full"
            )
        return choose_base(
            mode, self.request.since, at_target=points, at_source=source_disks(self.frozen.disks)
        )

    async def _tell(self, session: ExportSession) -> None:
        total = session.prepared.data_bytes
        while True:
            self.moved.note(trio.current_time(), session.done_bytes, total)
            await self.report(
                {
                    "step": "send",
                    "vm": self.request.vm,
                    "point": self.frozen.point,
                    "base": self.base,
                    "done_bytes": session.done_bytes,
                    "total_bytes": total,
                    "bytes_per_second": self.moved.bytes_per_second,
                    "remaining_s": self.moved.remaining_s,
                }
            )
            await trio.sleep(PROGRESS_SECONDS)

    def result(self, seconds: float) -> BackupReport:
        """After the commit."""
        assert self.session is not None
        summary = self.session.summary()
        prepared = self.session.prepared
        disks = [
            BackupDiskReport(
                image=disk.image,
                changed_bytes=disk.changed_bytes,
                sent_bytes=data_bytes(plan) - savings.saved_bytes,
                exact=disk.exact,
                digest=digest.hex(),
            )
            for disk, plan, savings, digest in zip(
                prepared.header.disks, prepared.plans, prepared.savings, summary.disk_digests, strict=True
            )
        ]
        return BackupReport(
            vm=self.request.vm,
            point=self.frozen.point,
            base=self.base,
            kind=prepared.header.kind,
            consistency=prepared.header.consistency,
            seconds=round(seconds, 3),
            disks=disks,
        )

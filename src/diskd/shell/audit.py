"""`diskctl target audit`, the source's side (``audit.run`` on diskd's control).

    contact the target          which points it holds, and which repository it is
    begin a checkpoint          as for a backup: all disks at one instant, the guest writes on
    compare                     core/audit.py: everything outside the changes since the point
    end it, discarding          the changes stay tracked, as if nothing had been tried (B3)

While the target computes its digests of one question, a thread here computes ours.
"""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Final, Protocol

import attrs
import structlog
import trio

from daemonkit.diskd_api import BackupDisk
from daemonkit.frames import FrameReader, frame
from daemonkit.ports import Address
from daemonkit.rpc import Call, CallFailed, Registry, connect
from diskd.core import target_calls as calls
from diskd.core.audit import (
    ALL_ZERO,
    MESSAGE_BYTES_MAX,
    PORTION_BYTES,
    Answer,
    Findings,
    Probe,
    Question,
    Range,
    decode_answer,
    digest_of,
    encode_message,
    narrower,
    probes_of,
    questions_of,
    unchanged,
)
from diskd.core.copy_plan import ChosenMode, TargetPoint, choose_base, walk
from diskd.core.inventory import NAME_PATTERN, REPOSITORY_ID_LENGTH_MAX
from diskd.core.ports import FrozenDisk, FrozenVm
from diskd.errors import Refused
from diskd.shell.export import source_disks

CONTACT_SECONDS_MAX: Final = 10.0
# Ending a checkpoint takes two syncs of a disk; longer than this means that the disk is gone.
END_SECONDS_MAX: Final = 120.0
# One answer may read as much as a question bounds, from a slow disk.
SILENCE_SECONDS_MAX: Final = 300.0
PROGRESS_SECONDS: Final = 0.5
_RECEIVE_BYTES: Final = 64 << 10
# Differing places are looked at in portions of this many probes, so that a ruined disk takes bounded memory.
_NARROW_AT_ONCE: Final = 64

log = structlog.get_logger("audit")

Report = Callable[[Any], Awaitable[None]]


class CheckpointSource(Protocol):
    """The part of shell.library.Library that an audit needs."""

    async def begin_checkpoint(
        self, vm: str, disks: list[BackupDisk], config: str, *, target: str | None = None
    ) -> FrozenVm:
        """All disks at one instant; Refused says why not."""
        ...


def register_audit(registry: Registry, source: CheckpointSource, *, key: bytes | None = None) -> None:
    """Answer ``audit.run``. ``key`` is the cluster key for the target's listener."""

    async def run(request: calls.AuditRequest, call: Call) -> calls.AuditReport:
        return await run_audit(source, request, report=call.progress, key=key)

    registry.add(calls.AUDIT_RUN, run)


async def run_audit(
    source: CheckpointSource, request: calls.AuditRequest, *, report: Report, key: bytes | None
) -> calls.AuditReport:
    """Raises Refused, another OperatorError, OSError: then nothing was proved, and nothing is left behind."""
    target = Address.parse(request.target)
    if not NAME_PATTERN.fullmatch(request.vm):
        raise Refused(f"{request.vm[:80]!r} is not a VM's name: lower case letters, digits, '.', '_', '-'")
    began = trio.current_time()
    async with connect(target, key=key) as client:
        try:
            with trio.fail_after(CONTACT_SECONDS_MAX):
                offered = await client.call(calls.POINTS_OFFERED, calls.VmName(request.vm))
        except trio.TooSlowError:
            raise CallFailed(f"the target {target} does not answer") from None
        disks = _disks(request, offered)
        await report({"step": "checkpoint", "vm": request.vm})
        frozen = await source.begin_checkpoint(
            request.vm, disks, "", target=offered.repository[:REPOSITORY_ID_LENGTH_MAX]
        )
        try:
            point = _choose(request, offered, frozen)
            log.info("audit.began", vm=request.vm, point=point, target=str(target))
            with trio.fail_after(CONTACT_SECONDS_MAX):
                stream = await client.open_stream(calls.AUDIT, calls.PointName(request.vm, point))
            audit = _Audit(frozen, point, _Peer(stream), report)
            audited = await audit.run()
        finally:
            with trio.move_on_after(END_SECONDS_MAX, shield=True):
                await frozen.end("discard")
    differing = sum(disk.differing_bytes for disk in audited)
    log.info("audit.ended", vm=request.vm, point=point, differing_bytes=differing)
    return calls.AuditReport(request.vm, point, round(trio.current_time() - began, 3), audited)


def _disks(request: calls.AuditRequest, offered: calls.OfferedPoints) -> list[BackupDisk]:
    if not offered.points:
        raise Refused(f"the target has no good point of {request.vm} to compare with; take a backup first")
    return request.disks or [BackupDisk(*pair) for pair in sorted(offered.points[-1].disks.items())]


def _choose(request: calls.AuditRequest, offered: calls.OfferedPoints, frozen: FrozenVm) -> str:
    at_target = [TargetPoint(point.point, point.disks) for point in offered.points]
    at_source = source_disks(frozen.disks)
    mode: ChosenMode = "auto" if request.point is None else "since"
    point = choose_base(mode, request.point, at_target=at_target, at_source=at_source)
    assert point is not None  # Only where the target has no points, which was refused before.
    return point


class _Peer:
    """The target's end of the questions."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._reader = FrameReader(frame_bytes_max=MESSAGE_BYTES_MAX)

    async def ask(self, question: Question) -> None:
        """Send it; ``answer`` must be read before the next."""
        try:
            with trio.fail_after(SILENCE_SECONDS_MAX):
                await self._stream.send_all(frame(encode_message(question)))
        except (trio.BrokenResourceError, trio.TooSlowError) as error:
            raise CallFailed("the connection to the target broke") from error

    async def answer(self, probes: Sequence[Probe]) -> list[bytes]:
        """Raises Refused with the target's reason, CallFailed."""
        while (payload := self._reader.next_frame()) is None:
            try:
                with trio.fail_after(SILENCE_SECONDS_MAX):
                    data = await self._stream.receive_some(_RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.TooSlowError) as error:
                raise CallFailed("the target stopped answering") from error
            if not data:
                raise CallFailed("the target closed the connection in the middle of the audit")
            self._reader.feed(data)
        answer: Answer = decode_answer(payload, probes)
        if answer.refused is not None:
            raise Refused(f"the target refused: {answer.refused}")
        return answer.digests


@attrs.define(eq=False)
class _Audit:
    frozen: FrozenVm
    point: str
    peer: _Peer
    report: Report
    done_bytes: int = 0
    total_bytes: int = 0
    _told: float = float("-inf")
    _threads: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(1))

    async def run(self) -> list[calls.AuditedDisk]:
        """All disks, one after the other."""
        await self.peer.answer([])
        plans = []
        for name, disk in self.frozen.disks.items():
            changes = await trio.to_thread.run_sync(disk.changes_since, self.point)
            extents = [(start, min(length, disk.size_bytes - start)) for start, length in changes.extents
                       if start < disk.size_bytes]  # fmt: skip
            changed = sum(length for _, length in extents)
            self.total_bytes += disk.size_bytes - changed
            plans.append((name, disk, extents, changed, changes.exact))
        audited = []
        for name, disk, extents, changed, exact in plans:
            before = self.done_bytes
            findings = await self._compare(name, disk, list(unchanged(disk.size_bytes, extents)))
            audited.append(
                calls.AuditedDisk(
                    name,
                    disk.image,
                    disk.size_bytes,
                    changed,
                    self.done_bytes - before,
                    exact,
                    findings.bytes,
                    findings.places,
                )
            )
        return audited

    async def _compare(self, name: str, disk: FrozenDisk, ranges: list[Range]) -> Findings:
        findings = Findings()
        questions = questions_of(probes_of(walk(ranges, disk.allocation_blocking)))
        while (probes := await self._thread(lambda: next(questions, None))) is not None:
            for probe in await self._differing(name, disk, probes):
                await self._narrow(name, disk, probe, findings)
            self.done_bytes += sum(probe.length for probe in probes)
            await self._tell()
        return findings

    async def _differing(self, name: str, disk: FrozenDisk, probes: Sequence[Probe]) -> list[Probe]:
        await self.peer.ask(Question(name, [[probe.offset, probe.length] for probe in probes]))
        ours = await self._thread(lambda: _digests(disk, probes))
        theirs = await self.peer.answer(probes)
        return [probe for probe, one, other in zip(probes, ours, theirs, strict=True) if one != other]

    async def _narrow(self, name: str, disk: FrozenDisk, probe: Probe, findings: Findings) -> None:
        parts = narrower(probe, disk.block_bytes)
        if not parts:
            findings.add(probe.offset, probe.length)
            return
        for first in range(0, len(parts), _NARROW_AT_ONCE):
            for part in await self._differing(name, disk, parts[first : first + _NARROW_AT_ONCE]):
                await self._narrow(name, disk, part, findings)

    async def _thread(self, function: Callable[[], Any]) -> Any:
        return await trio.to_thread.run_sync(function, limiter=self._threads)

    async def _tell(self) -> None:
        if trio.current_time() - self._told >= PROGRESS_SECONDS:
            self._told = trio.current_time()
            await self.report(
                {
                    "step": "compare",
                    "vm": self.frozen.vm,
                    "point": self.point,
                    "done_bytes": self.done_bytes,
                    "total_bytes": self.total_bytes,
                }
            )


def _digests(disk: FrozenDisk, probes: Sequence[Probe]) -> list[bytes]:
    return list(_each_digest(disk, probes))


def _each_digest(disk: FrozenDisk, probes: Sequence[Probe]) -> Iterator[bytes]:
    buffer = memoryview(bytearray(PORTION_BYTES))
    for probe in probes:
        trio.from_thread.check_cancelled()
        if probe.is_zero:
            yield ALL_ZERO
            continue
        part = buffer[: probe.length]
        disk.read_into_blocking(probe.offset, part)
        yield digest_of(part)

"""The sending side of an export: reads the frozen disks and keeps the stream full.

Three parties, bounded by a few reused buffers: worker threads read, digest and frame, one per disk
(producing.py); the sender puts whole buffers on the wire, as far as the receiver's window allows; the
listener takes the replies. Nothing here runs in the guest's path: a slow or dead receiver only makes the
export wait or fail (B2).
"""

import contextlib
from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import Final, NoReturn

import trio

from daemonkit.errors import OperatorError
from daemonkit.frames import FrameReader
from diskd.core.copy_plan import Run, SourceDisk, data_bytes, plan_differential, plan_full, walk
from diskd.core.ports import FrozenDisk, FrozenVm
from diskd.core.qcow2 import FULL_CLUSTER_BYTES, choose_cluster_bytes
from diskd.core.stream import (
    REPLY_BYTES_MAX,
    Ack,
    Committed,
    DiskHeader,
    ExportHeader,
    Have,
    Ready,
    RefusedReply,
    Reply,
    StreamEncoder,
    StreamError,
    Trailer,
    Working,
    decode_reply,
)
from diskd.errors import Refused
from diskd.shell.bulk import BulkSocket
from diskd.shell.producing import (
    BUFFER_BYTES,
    BUFFERS_MORE,
    DISKS_AT_ONCE,
    Batch,
    Prepared,
    Producers,
    Savings,
    disks_at_once,
    fill_in_turn,
)

# The receiver gives a sign of life every two seconds, whatever it is busy with.
SILENCE_SECONDS_MAX: Final = 30.0
LAST_WORDS_SECONDS: Final = 2.0


class TargetLost(OperatorError):
    """The connection ended without an answer."""


class TargetBusy(TargetLost):
    """It takes nothing more now, and has not looked at what this export is of: as good as lost."""


class CommittedOther(StreamError):
    """The target has the point, but with other content than was frozen here."""


def prepare_blocking(frozen: FrozenVm, base: str | None) -> Prepared:
    """Plan the export of a frozen VM; for a worker thread. Raises NoSuchPoint, OSError."""
    headers, plans, disks = [], [], []
    for name, disk in frozen.disks.items():
        described, plan = _plan_disk(name, disk, base)
        headers.append(described)
        plans.append(plan)
        disks.append(disk)
    header = ExportHeader(
        vm=frozen.vm,
        point=frozen.point,
        base=base,
        kind="full" if base is None else "differential",
        consistency=frozen.consistency,
        config=frozen.config,
        disks=headers,
    )
    return Prepared(header, plans, disks, [Savings() for _ in disks])


def _plan_disk(name: str, disk: FrozenDisk, base: str | None) -> tuple[DiskHeader, list[Run]]:
    size = disk.size_bytes
    if base is None:
        plan = plan_full(walk([(0, size)], disk.allocation_blocking))
        changed, exact, over, cluster = data_bytes(plan), True, 0, FULL_CLUSTER_BYTES
    else:
        report = disk.changes_since(base)
        # A disk may have shrunk since the base: what is gone needs no copy.
        extents = [(start, min(length, size - start)) for start, length in report.extents if start < size]
        plan = plan_differential(walk(extents, disk.allocation_blocking))
        changed, exact, over = sum(length for _, length in extents), report.exact, report.over_report_bytes
        cluster = choose_cluster_bytes(plan, size)
    return DiskHeader(name, disk.image, size, disk.block_bytes, cluster, changed, exact, over), plan


class ReplyReader:
    """The receiver's messages from a stream."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._reader = FrameReader(frame_bytes_max=REPLY_BYTES_MAX)

    async def next(self) -> Reply:
        """Raises TargetLost at the end or where it is busy, Refused where the receiver refuses, StreamError
        for nonsense."""
        while (payload := self._reader.next_frame()) is None:
            try:
                with trio.fail_after(SILENCE_SECONDS_MAX):
                    data = await self._stream.receive_some(REPLY_BYTES_MAX)
            except trio.TooSlowError:
                raise TargetLost(f"the target said nothing for {SILENCE_SECONDS_MAX:g} s") from None
            except (trio.BrokenResourceError, OSError) as error:
                raise TargetLost(f"the connection to the target broke: {error}") from error
            if not data:
                raise TargetLost("the target closed the connection without an answer")
            self._reader.feed(data)
        reply = decode_reply(payload)
        if isinstance(reply, RefusedReply):
            kind = TargetBusy if reply.busy else Refused
            raise kind(f"the target refused: {' '.join(reply.reason.split())}")
        return reply


class ExportSession:
    """One export over one stream. ``run`` once; the other members are for whoever watches or cleans up."""

    def __init__(
        self, prepared: Prepared, *, finished: Trailer | None = None, compress_level: int = 0
    ) -> None:
        """Raises Refused for a VM that this format cannot carry. ``finished``: what an earlier session of
        the same export amounted to, where it got as far as its trailer. ``compress_level``: of zstd; 0 for
        none."""
        self.prepared = prepared
        self.finished = finished
        try:
            self.encoder = StreamEncoder(prepared.header)
        except StreamError as error:
            raise Refused(f"{prepared.header.vm} cannot be exported: {error}") from error
        # B3: once the trailer may have left, only the receiver knows whether the point exists.
        self.may_have_committed = finished is not None
        self.durable = 0
        self.has_begun = False
        self._compress_level = compress_level
        # Some read and digest, one sends.
        self._threads = trio.CapacityLimiter(DISKS_AT_ONCE + 1)
        self._window = 0
        self._unacked: deque[tuple[int, int]] = deque()
        self._unacked_bytes = 0
        self._sent_frames = 0
        self._acked_frames = 0
        self._moved = trio.Condition()
        self._committed: Committed | None = None

    @property
    def done_bytes(self) -> int:
        """Payload bytes framed so far, as the guest sees them."""
        return self.encoder.data_bytes

    def summary(self) -> Trailer:
        """The digests, once everything has been framed."""
        return self.finished or self.encoder.summary()

    async def run(self, stream: trio.abc.Stream) -> Committed:
        """Send everything; return when the receiver has committed. Raises Refused, TargetLost, OSError."""
        replies = ReplyReader(stream)
        producers = Producers(self.prepared, self.encoder)
        await self._send(stream, self.encoder.opening)
        while isinstance(first := await replies.next(), Working | Have):
            if isinstance(first, Have):
                await trio.to_thread.run_sync(producers.skip, first.headers, limiter=self._threads)
        if isinstance(first, Committed):
            # It has the point already: the same one only if its digest is that of what would be sent.
            if self.finished is None:
                await trio.to_thread.run_sync(producers.digest_blocking, limiter=self._threads)
            return self._check_committed(first)
        if not isinstance(first, Ready):
            raise StreamError("the target answered in an unknown order")
        self.may_have_committed, self.finished = False, None
        producers.begin(self._compress_level)
        self.has_begun, self.durable = True, self.encoder.frames
        self._sent_frames = self._acked_frames = self.durable
        self._window = max(first.window_bytes, BUFFER_BYTES)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen, replies)
                await self._send_frames(stream, producers)
                self.finished = self.encoder.summary()
                self.may_have_committed = True
                await self._send(stream, self.encoder.finish())
        except BaseExceptionGroup as group:
            if group.subgroup(Refused) is not None:
                # It said so itself: nothing of this stream exists there.
                self.may_have_committed = False
            raise
        assert self._committed is not None
        return self._check_committed(self._committed)

    async def _send_frames(self, stream: trio.abc.Stream, producers: Producers) -> None:
        unfinished = producers.unfinished
        workers = disks_at_once(len(unfinished), self._compress_level)
        buffers = workers + BUFFERS_MORE
        free_send, free = trio.open_memory_channel[bytearray](buffers)
        for _ in range(buffers):
            free_send.send_nowait(bytearray(BUFFER_BYTES))
        full_send, full = trio.open_memory_channel[Batch](buffers)
        # The channels are closed last: closed under a producer they would make errors of their own.
        with BulkSocket(stream) as bulk, free_send, free, full:
            async with trio.open_nursery() as nursery:
                waiting = iter(unfinished)
                with full_send:
                    for _ in range(workers):
                        fill = partial(fill_in_turn, waiting, free, full_send.clone(), threads=self._threads)
                        nursery.start_soon(fill)
                async for batch in full:
                    await self._wait_for_window(batch.used)
                    self._sent_frames += batch.frames
                    self._unacked.append((self._sent_frames, batch.used))
                    self._unacked_bytes += batch.used
                    await self._send_bulk(bulk, memoryview(batch.buffer)[: batch.used])
                    free_send.send_nowait(batch.buffer)

    async def _wait_for_window(self, size: int) -> None:
        async with self._moved:
            while self._unacked_bytes and self._unacked_bytes + size > self._window:
                await self._moved.wait()

    async def _listen(self, replies: ReplyReader) -> None:
        while True:
            reply = await replies.next()
            if isinstance(reply, Ack):
                await self._take_ack(reply)
            elif isinstance(reply, Committed):
                self._committed = reply
                return
            elif not isinstance(reply, Working):
                raise StreamError("the target answered in an unknown order")

    async def _take_ack(self, ack: Ack) -> None:
        if not self._acked_frames <= ack.taken <= self._sent_frames or not 0 <= ack.durable <= ack.taken:
            raise StreamError("the target acknowledged frames that were not sent")
        self._acked_frames = ack.taken
        self.durable = max(self.durable, ack.durable)
        while self._unacked and self._unacked[0][0] <= ack.taken:
            self._unacked_bytes -= self._unacked.popleft()[1]
        async with self._moved:
            self._moved.notify_all()

    async def _send(self, stream: trio.abc.Stream, data: bytes) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await stream.send_all(data)
            return
        await self._lost()

    async def _send_bulk(self, bulk: BulkSocket, data: memoryview) -> None:
        with contextlib.suppress(OSError):
            await trio.to_thread.run_sync(bulk.send_blocking, data, limiter=self._threads)
            return
        await self._lost()

    async def _lost(self) -> NoReturn:
        # Its last words may already be here; the listener raises them.
        await trio.sleep(LAST_WORDS_SECONDS)
        raise TargetLost("the connection to the target broke")

    def _check_committed(self, reply: Committed) -> Committed:
        if reply != Committed(self.prepared.header.point, self.summary().digest.hex()):
            raise CommittedOther("the target committed something else than was sent")
        return reply


def source_disks(disks: Mapping[str, FrozenDisk]) -> dict[str, SourceDisk]:
    """What the choice of a base asks of each disk."""
    return {name: SourceDisk(disk.image, disk.points) for name, disk in disks.items()}

"""The sending side of an export: reads the frozen disks and keeps the stream full.

Three parties, bounded by three reused buffers: a worker thread reads, digests and frames; the sender
puts whole buffers on the wire, as far as the receiver's window allows; the listener takes the replies.
Nothing here runs in the guest's path: a slow or dead receiver only makes the export wait or fail (B2).
"""

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Final, NoReturn

import attrs
import trio
from blake3 import blake3

from daemonkit.errors import OperatorError
from daemonkit.frames import FrameReader
from daemonkit.units import KiB
from diskd.core.copy_plan import Run, SourceDisk, data_bytes, frames_of, plan_differential, plan_full, walk
from diskd.core.ports import FrozenDisk, FrozenVm
from diskd.core.qcow2 import FULL_CLUSTER_BYTES, choose_cluster_bytes
from diskd.core.stream import (
    DATA_BYTES_MAX,
    FRAME,
    NO_DIGEST,
    REPLY_BYTES_MAX,
    Ack,
    Committed,
    DiskHeader,
    ExportHeader,
    FrameKind,
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

BUFFERS: Final = 3
# Several of the largest frames: what it costs to hand a buffer from thread to thread is shared by them.
BUFFER_BYTES: Final = 4 * (DATA_BYTES_MAX + 16 * KiB)
# The receiver gives a sign of life every two seconds, whatever it is busy with.
SILENCE_SECONDS_MAX: Final = 30.0
LAST_WORDS_SECONDS: Final = 2.0


class TargetLost(OperatorError):
    """The connection ended without an answer."""


class TargetBusy(TargetLost):
    """It takes nothing more now, and has not looked at what this export is of: as good as lost."""


class CommittedOther(StreamError):
    """The target has the point, but with other content than was frozen here."""


@attrs.frozen(eq=False)
class Prepared:
    """What is about to be sent."""

    header: ExportHeader
    plans: list[list[Run]]
    disks: list[FrozenDisk]

    @property
    def data_bytes(self) -> int:
        """Payload bytes in total."""
        return sum(data_bytes(plan) for plan in self.plans)


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
    return Prepared(header, plans, disks)


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


@attrs.define
class Batch:
    """A filled part of a buffer, and how many frames of the stream are complete with it."""

    buffer: bytearray
    used: int
    frames: int


class Producer:
    """Reads and frames, in a worker thread, one buffer per call."""

    def __init__(self, prepared: Prepared, encoder: StreamEncoder) -> None:
        self._prepared = prepared
        self._encoder = encoder
        self._frames = self._all_frames()
        self._next = next(self._frames, None)

    def _all_frames(self) -> Iterator[tuple[int, Run]]:
        for number, plan in enumerate(self._prepared.plans):
            for run in frames_of(plan):
                yield number, run

    def skip(self, packed: bytes) -> None:
        """The receiver has these frames: go on behind them, without reading them again. Raises Refused where
        they are not the ones that this plan begins with."""
        begin = self._encoder.frames
        with contextlib.suppress(StreamError):
            self._encoder.take_rows(packed)
        for start in range(0, len(packed), FRAME.size):
            kind, _, disk, _, offset, length, _ = FRAME.unpack_from(packed, start)
            if self._next != (disk, Run(kind, offset, length)):
                break
            self._next = next(self._frames, None)
        else:
            if (self._encoder.frames - begin) * FRAME.size == len(packed):
                return
        raise Refused(
            f"what the target has of {self._prepared.header.point} was sent by another plan; back up again"
            " without --resume"
        )

    def fill(self, buffer: bytearray) -> Batch | None:
        """As many frames as fit; None behind the last one. Raises OSError from the disk."""
        if self._next is None:
            return None
        view = memoryview(buffer)
        used, number = 0, self._encoder.frames
        packed: list[memoryview] = []
        while self._next is not None:
            disk, run = self._next
            begin = used + FRAME.size
            end = begin + run.length if run.kind is FrameKind.DATA else begin
            if end > len(buffer):
                break
            digest = NO_DIGEST
            if end > begin:
                data = view[begin:end]
                self._prepared.disks[disk].read_into_blocking(run.offset, data)
                digest = blake3(data).digest()
            FRAME.pack_into(view, used, run.kind, 0, disk, number, run.offset, run.length, digest)
            packed.append(view[used:begin])
            used, number = end, number + 1
            self._next = next(self._frames, None)
        self._encoder.take_rows(b"".join(packed))
        return Batch(buffer, used, number)


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

    def __init__(self, prepared: Prepared, *, finished: Trailer | None = None) -> None:
        """Raises Refused for a VM that this format cannot carry. ``finished``: what an earlier session of the
        same export amounted to, where it got as far as its trailer."""
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
        # One thread reads and digests, one sends.
        self._threads = trio.CapacityLimiter(2)
        self._window = 0
        self._unacked: deque[tuple[int, int]] = deque()
        self._unacked_bytes = 0
        self._acked_frames = 0
        self._moved = trio.Condition()
        self._committed: Committed | None = None

    @property
    def sent_bytes(self) -> int:
        """Payload bytes framed so far."""
        return self.encoder.data_bytes

    def summary(self) -> Trailer:
        """The digests, once everything has been framed."""
        return self.finished or self.encoder.summary()

    async def run(self, stream: trio.abc.Stream) -> Committed:
        """Send everything; return when the receiver has committed. Raises Refused, TargetLost, OSError."""
        replies = ReplyReader(stream)
        producer = Producer(self.prepared, self.encoder)
        await self._send(stream, self.encoder.opening)
        while isinstance(first := await replies.next(), Working | Have):
            if isinstance(first, Have):
                await trio.to_thread.run_sync(producer.skip, first.headers, limiter=self._threads)
        if isinstance(first, Committed):
            # It has the point already: the same one only if its digest is that of what would be sent.
            if self.finished is None:
                await trio.to_thread.run_sync(self._digest_blocking, producer, limiter=self._threads)
            return self._check_committed(first)
        if not isinstance(first, Ready):
            raise StreamError("the target answered in an unknown order")
        self.may_have_committed, self.finished = False, None
        self.has_begun, self._acked_frames = True, self.encoder.frames
        self.durable = self.encoder.frames
        self._window = max(first.window_bytes, BUFFER_BYTES)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen, replies)
                await self._send_frames(stream, producer)
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

    def _digest_blocking(self, producer: Producer) -> None:
        buffer = bytearray(BUFFER_BYTES)
        while producer.fill(buffer) is not None:
            trio.from_thread.check_cancelled()

    async def _send_frames(self, stream: trio.abc.Stream, producer: Producer) -> None:
        free_send, free = trio.open_memory_channel[bytearray](BUFFERS)
        for _ in range(BUFFERS):
            free_send.send_nowait(bytearray(BUFFER_BYTES))
        full_send, full = trio.open_memory_channel[Batch](BUFFERS)

        async def produce() -> None:
            async with full_send:
                async for buffer in free:
                    batch = await trio.to_thread.run_sync(producer.fill, buffer, limiter=self._threads)
                    if batch is None:
                        return
                    await full_send.send(batch)

        # The channels are closed last: closed under the producer they would make errors of their own.
        with BulkSocket(stream) as bulk, free_send, free, full:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(produce)
                async for batch in full:
                    await self._wait_for_window(batch.used)
                    self._unacked.append((batch.frames, batch.used))
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
        if not self._acked_frames <= ack.taken <= self.encoder.frames or not 0 <= ack.durable <= ack.taken:
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

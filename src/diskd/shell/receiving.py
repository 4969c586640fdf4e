"""The receiving side of an export: from the socket into large reused buffers, from there into the files.

Two worker threads side by side, each one hop per buffer: one receives, finds the frames, decompresses what
came compressed, and verifies the digests; the other writes what was verified. Nothing else is copied but what
a buffer's end, or the bound on what is decompressed at once, leaves for the next turn. Memory is the buffers,
and at most as much again for what was compressed; what may be on its way is the window that the source was
told.
"""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

import attrs
import trio

from daemonkit.frames import frame as frame_reply
from daemonkit.units import KiB
from diskd.core.stream import (
    DATA_BYTES_MAX,
    ExportHeader,
    Frame,
    FrameBatch,
    FrameKind,
    Reply,
    Rows,
    SourceLost,
    StreamDecoder,
    Trailer,
    Working,
    encode_reply,
)
from diskd.core.stream_zstd import Decompressor
from diskd.shell.bulk import BulkSocket

WORKING_SECONDS: Final = 2.0
SEND_SECONDS_MAX: Final = 30.0
_RECEIVE_BYTES: Final = 64 * KiB
_FRAMES: Final = (FrameKind.DATA, FrameKind.ZERO, FrameKind.HOLE, FrameKind.ZSTD)
BUFFERS: Final = 4
BUFFER_BYTES: Final = 4 * (DATA_BYTES_MAX + 16 * KiB)


@attrs.frozen(eq=False)
class Received:
    """Verified frames, and the buffer that they lie in."""

    batch: FrameBatch
    rows: Rows
    buffer: bytearray


class FrameReceiver:
    """Fills buffers from one stream, after its header has been taken."""

    def __init__(self, bulk: BulkSocket, decoder: StreamDecoder, rest: bytes) -> None:
        """``rest``: what was read beyond the header."""
        self._bulk = bulk
        self._decoder = decoder
        self._rest = rest
        self._inflate = Decompressor().decompress
        self.trailer: Trailer | None = None

    def receive_blocking(self, buffer: bytearray) -> Received:
        """The next frames, verified; none with the trailer. Raises StreamError, StreamAborted."""
        view = memoryview(buffer)
        filled = len(self._rest)
        view[:filled] = self._rest
        while True:
            batch, rows = self._decoder.batch(view[:filled])
            if len(batch):
                batch.check_data(rows, self._inflate)
                self._rest = bytes(view[batch.used : filled])
                return Received(batch, rows, buffer)
            if filled and view[0] not in _FRAMES:
                self._take_end(view, filled)
                return Received(batch, rows, buffer)
            filled += self._more(view[filled:])

    def _take_end(self, view: memoryview, filled: int) -> None:
        """The trailer, or the reason why there is none."""
        self._decoder.feed(view[:filled])
        while (event := self._decoder.next_event()) is None:
            self._decoder.feed(view[: self._more(view)])
        assert isinstance(event, Trailer)
        self.trailer = event

    def _more(self, room: memoryview) -> int:
        try:
            count = self._bulk.receive_blocking(room)
        except OSError as error:
            raise SourceLost(f"the connection to the source broke: {error.strerror}") from error
        if count == 0:
            raise SourceLost("the stream ends before its trailer: it is not complete")
        return count


async def receive_frames(
    receiver: FrameReceiver,
    write: Callable[[FrameBatch, Rows], None],
    acknowledge: Callable[[], Awaitable[None]],
    *,
    threads: trio.CapacityLimiter,
    idle_seconds_max: float,
) -> Trailer:
    """Receive and write side by side. ``write`` runs in a worker thread, ``acknowledge`` follows each call of
    it. Raises SourceLost for a source whose next frame takes longer than so long, or that goes."""
    free_send, free = trio.open_memory_channel[bytearray](BUFFERS)
    for _ in range(BUFFERS):
        free_send.send_nowait(bytearray(BUFFER_BYTES))
    full_send, full = trio.open_memory_channel[Received](BUFFERS)

    async def receive() -> None:
        async with full_send:
            while receiver.trailer is None:
                buffer = await free.receive()
                try:
                    with trio.fail_after(idle_seconds_max):
                        received = await trio.to_thread.run_sync(
                            receiver.receive_blocking, buffer, limiter=threads
                        )
                except trio.TooSlowError:
                    raise SourceLost("the source fell silent") from None
                await full_send.send(received)

    # The channels are closed last: closed under the receiver they would make errors of their own, and hide
    # the one that ended the writing.
    with free_send, free, full:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            async for received in full:
                await trio.to_thread.run_sync(write, received.batch, received.rows, limiter=threads)
                free_send.send_nowait(received.buffer)
                await acknowledge()
    assert receiver.trailer is not None
    return receiver.trailer


class Source:
    """The stream that an export comes in, and what is said to it."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.decoder = StreamDecoder()
        self._speaking = trio.Lock()

    async def say(self, reply: Reply) -> None:
        """One message to the source."""
        async with self._speaking:
            await send_reply(self.stream, reply)

    async def next_event(self) -> ExportHeader | Frame | Trailer | None:
        """None at the end of the stream."""
        while (event := self.decoder.next_event()) is None:
            data = await self.stream.receive_some(_RECEIVE_BYTES)
            if not data:
                return None
            self.decoder.feed(data)
        return event


async def send_reply(stream: trio.abc.Stream, reply: Reply) -> None:
    """Raises TooSlowError for a peer that does not read."""
    with trio.fail_after(SEND_SECONDS_MAX):
        await stream.send_all(frame_reply(encode_reply(reply)))


@asynccontextmanager
async def signs_of_life(source: Source) -> AsyncIterator[None]:
    """Tell the source regularly that its export is being worked on, however slow the disk is. A source
    that has gone does not stop a commit: it settles the point later (B3)."""

    async def tell() -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            while True:
                await trio.sleep(WORKING_SECONDS)
                await source.say(Working())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tell)
        yield
        nursery.cancel_scope.cancel(reason="done")

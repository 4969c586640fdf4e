"""`diskctl export`: an image's export stream into a file or pipe; the client plays the target.

The file holds the stream as it came, so that whoever has it can verify and apply it with nothing else.
"""

import contextlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, Protocol

import trio

from daemonkit.durable import sync_directory
from daemonkit.errors import OperatorError
from daemonkit.frames import frame as frame_reply
from daemonkit.ports import Address
from daemonkit.rpc import connect
from diskd.core import target_calls as calls
from diskd.core.stream import (
    Ack,
    Committed,
    ExportHeader,
    Frame,
    Ready,
    Reply,
    StreamDecoder,
    Trailer,
    Working,
    encode_reply,
)
from diskd.errors import Refused
from diskd.shell.restore import open_part

WINDOW_BYTES: Final = 8 << 20
SILENCE_SECONDS_MAX: Final = 120.0
WORKING_SECONDS: Final = 2.0
_RECEIVE_BYTES: Final = 1 << 20
# What is decompressed at once, at most: the bytes received at once may stand for ten thousand times as many.
_TAKEN_BYTES_MAX: Final = 4 << 20

Progress = Callable[[int], None]


Event = ExportHeader | Frame | Trailer


class Output(Protocol):
    """Where an export goes; called in worker threads."""

    def take(self, data: bytes, events: list[Event]) -> None:
        """Events, and then the bytes of the stream that they ended in; events that end in the same bytes may
        come in several calls, the bytes with the last of them. Raises StreamError, OSError."""
        ...

    def publish(self) -> None:
        """All of it is there: make it durable, and give it its name."""
        ...


class _Output:
    """A file that gets its name at the end, or a pipe."""

    def __init__(self, path: Path | None, pipe: int) -> None:
        self._path = path
        self._descriptor = pipe
        if path is not None:
            if path.exists():
                raise Refused(f"{path} exists already; give another -o")
            self._temporary, self._descriptor = open_part(path)

    def take(self, data: bytes, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Frame):
                event.check()
        view = memoryview(data)
        while view:
            view = view[os.write(self._descriptor, view) :]

    def publish(self) -> None:
        if self._path is not None:
            os.fsync(self._descriptor)
            os.rename(self._temporary, self._path)
            sync_directory(self._path.parent)

    def close(self) -> None:
        if self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary)
            os.close(self._descriptor)


async def export_image(
    diskd: Address,
    request: calls.ExportRequest,
    path: Path | None,
    *,
    pipe: int,
    key: bytes | None,
    on_progress: Progress,
) -> tuple[ExportHeader, Trailer]:
    """Receive an export into ``path``, or into the descriptor ``pipe``. Raises OperatorError, OSError.

    The point is kept at the source only once everything is verified and, in a file, durable.
    """
    output = await trio.to_thread.run_sync(_Output, path, pipe)
    try:
        return await receive_export(diskd, request, output, key=key, on_progress=on_progress)
    finally:
        output.close()


async def receive_export(
    diskd: Address,
    request: calls.ExportRequest,
    output: Output,
    *,
    key: bytes | None,
    on_progress: Progress,
) -> tuple[ExportHeader, Trailer]:
    """Receive an export into whatever ``output`` makes of it. Raises OperatorError, OSError."""
    async with connect(diskd, key=key) as client:
        stream = await client.open_stream(calls.EXPORT_IMAGE, request)
        return await _receive(stream, output, on_progress)


async def _receive(
    stream: trio.abc.Stream, output: Output, on_progress: Progress
) -> tuple[ExportHeader, Trailer]:
    speaking = trio.Lock()

    async def say(reply: Reply) -> None:
        async with speaking:
            await _say(stream, reply)

    async def tell() -> None:
        while True:
            await trio.sleep(WORKING_SECONDS)
            await say(Working())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tell)
        result = await _take(stream, output, on_progress, say)
        nursery.cancel_scope.cancel(reason="done")
    return result


async def _take(
    stream: trio.abc.Stream,
    output: Output,
    on_progress: Progress,
    say: Callable[[Reply], Awaitable[None]],
) -> tuple[ExportHeader, Trailer]:
    intake = _Intake(output)
    while True:
        data = await _some(stream, intake.decoder)
        before = intake.frames
        await trio.to_thread.run_sync(intake.take_blocking, data)
        header, trailer = intake.header, intake.trailer
        if header is not None and not intake.is_ready:
            intake.is_ready = True
            await say(Ready(WINDOW_BYTES))
        if header is not None and trailer is not None:
            await trio.to_thread.run_sync(output.publish)
            await say(Committed(header.point, trailer.digest.hex()))
            return header, trailer
        if intake.frames > before:
            await say(Ack(intake.frames, 0))
            on_progress(intake.done_bytes)


class _Intake:
    """Takes the stream apart, and says how far it is. ``is_ready``: the source was told to go on."""

    def __init__(self, output: Output) -> None:
        self.decoder = StreamDecoder()
        self.header: ExportHeader | None = None
        self.trailer: Trailer | None = None
        self.frames = 0
        self.done_bytes = 0
        self.is_ready = False
        self._output = output

    def take_blocking(self, data: bytes) -> None:
        """For a worker thread. Raises StreamError, StreamAborted, OSError, trio.Cancelled."""
        self.decoder.feed(data)
        events: list[Event] = []
        size = 0
        while (event := self.decoder.next_event()) is not None:
            events.append(event)
            if isinstance(event, ExportHeader):
                self.header = event
            elif isinstance(event, Trailer):
                self.trailer = event
            else:
                self.frames += 1
                self.done_bytes += len(event.data)
                size += len(event.data)
            if size >= _TAKEN_BYTES_MAX:
                self._output.take(b"", events)
                events, size = [], 0
                trio.from_thread.check_cancelled()
        self._output.take(data, events)


async def _some(stream: trio.abc.Stream, decoder: StreamDecoder) -> bytes:
    # A checkpoint may wait for an earlier merge before the first byte comes, so that takes any time.
    limit = SILENCE_SECONDS_MAX if decoder.opening else float("inf")
    try:
        with trio.fail_after(limit):
            data = await stream.receive_some(_RECEIVE_BYTES)
    except trio.TooSlowError:
        raise OperatorError(f"diskd said nothing for {limit:g} s") from None
    except trio.BrokenResourceError:
        raise OperatorError("the connection to diskd broke; its log says why") from None
    if not data:
        raise OperatorError("diskd ended the export in the middle; its log says why")
    return bytes(data)


async def _say(stream: trio.abc.Stream, reply: Reply) -> None:
    try:
        await stream.send_all(frame_reply(encode_reply(reply)))
    except trio.BrokenResourceError:
        raise OperatorError("the connection to diskd broke; its log says why") from None

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

Progress = Callable[[int], None]


Event = ExportHeader | Frame | Trailer


class Output(Protocol):
    """Where an export goes; called in worker threads."""

    def take(self, data: bytes, events: list[Event]) -> None:
        """The next bytes of the stream, and what ends in them. Raises StreamError, OSError."""
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
    decoder = StreamDecoder()
    header: ExportHeader | None = None
    frames = done = 0
    while True:
        data = await _some(stream, decoder)
        decoder.feed(data)
        events: list[Event] = []
        while (found := decoder.next_event()) is not None:
            events.append(found)
        await trio.to_thread.run_sync(output.take, data, events)
        for event in events:
            if isinstance(event, ExportHeader):
                header = event
                await say(Ready(WINDOW_BYTES))
            elif isinstance(event, Frame):
                frames += 1
                done += len(event.data)
            elif header is not None:
                await trio.to_thread.run_sync(output.publish)
                await say(Committed(header.point, event.digest.hex()))
                return header, event
        if events:
            await say(Ack(frames, 0))
            on_progress(done)


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

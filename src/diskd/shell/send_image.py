"""The client's side of ``image.receive``: standard input, or whatever descriptor, as a new image."""

import os
import stat
from collections.abc import Callable
from typing import Any, Final

import attrs
import trio

from daemonkit.errors import OperatorError
from daemonkit.frames import FrameReader
from daemonkit.ports import Address
from daemonkit.rpc import connect
from daemonkit.schema import structure
from diskd.core import calls, import_stream
from diskd.core.import_stream import DATA_BYTES_MAX, encode_piece
from diskd.core.inventory import ImageInfo
from diskd.errors import Refused

_RECEIVE_BYTES: Final = 64 << 10
_OPEN_SECONDS_MAX: Final = 60.0


@attrs.define
class _Source:
    """A descriptor, read in pieces; holes of a file are skipped where it is one."""

    descriptor: int
    is_file: bool
    size_bytes: int | None
    offset: int = 0

    def next_piece(self) -> bytes | int | None:
        """For a worker thread; None at the end."""
        if self.is_file:
            position = os.lseek(self.descriptor, 0, os.SEEK_CUR)
            try:
                data_at = os.lseek(self.descriptor, position, os.SEEK_DATA)
            except OSError:  # only a hole is left
                data_at = os.lseek(self.descriptor, 0, os.SEEK_END)
            if data_at > position:
                return data_at - position
        parts: list[bytes] = []
        missing = DATA_BYTES_MAX
        while missing and (part := os.read(self.descriptor, missing)):
            parts.append(part)
            missing -= len(part)
        data = b"".join(parts)
        if data.count(0) == len(data):
            return len(data) or None
        return data


def open_source(descriptor: int) -> _Source:
    """Raises OperatorError for a terminal."""
    status = os.fstat(descriptor)
    if os.isatty(descriptor):
        raise OperatorError("standard input is a terminal: pipe the raw disk into this command")
    is_file = stat.S_ISREG(status.st_mode)
    size = None
    if is_file:
        position = os.lseek(descriptor, 0, os.SEEK_CUR)
        size = max(0, status.st_size - position)
    return _Source(descriptor, is_file, size)


async def send_image(
    diskd: Address,
    name: str,
    descriptor: int,
    *,
    key: bytes | None,
    on_progress: Callable[[Any], None],
) -> ImageInfo:
    """The new image. Raises OperatorError with diskd's reason; then there is none, nor any part of it."""
    source = open_source(descriptor)
    async with connect(diskd, key=key) as client:
        with trio.fail_after(_OPEN_SECONDS_MAX):
            stream = await client.open_stream(calls.IMAGE_RECEIVE, calls.ReceiveImage(name))
        answers: list[ImageInfo] = []
        async with trio.open_nursery() as nursery:

            async def listen() -> None:
                answers.append(await _answer(stream))
                nursery.cancel_scope.cancel(reason="answered")

            nursery.start_soon(listen)
            await _send(stream, source, on_progress)
    return answers[0]


async def _send(stream: trio.abc.Stream, source: _Source, on_progress: Callable[[Any], None]) -> None:
    speaking = trio.Lock()

    async def say(piece: bytes | int | None) -> None:
        try:
            async with speaking:
                await stream.send_all(encode_piece(piece))
        except trio.BrokenResourceError:
            # diskd has hung up: what it said before is about to be read.
            await trio.sleep_forever()

    async def live() -> None:
        while True:
            await trio.sleep(import_stream.ALIVE_SECONDS)
            await say(0)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(live)
        piece: bytes | int | None = 0
        while piece is not None:
            # The thread of a pipe in which nobody writes is left behind when we are told to stop.
            piece = await trio.to_thread.run_sync(source.next_piece, abandon_on_cancel=True)
            await say(piece)
            source.offset += piece if isinstance(piece, int) else len(piece or b"")
            on_progress({"done_bytes": source.offset, "total_bytes": source.size_bytes})
        nursery.cancel_scope.cancel(reason="all is sent")


async def _answer(stream: trio.abc.Stream) -> ImageInfo:
    reader = FrameReader(frame_bytes_max=import_stream.ANSWER_BYTES_MAX)
    while (payload := reader.next_frame()) is None:
        try:
            data = await stream.receive_some(_RECEIVE_BYTES)
        except trio.BrokenResourceError:
            data = b""
        if not data:
            raise OperatorError("diskd ended the connection before the image was complete; its log says why")
        reader.feed(data)
    answer = import_stream.decode_answer(payload)
    if answer.refusal is not None:
        raise Refused(answer.refusal)
    return structure(ImageInfo, answer.document, where="image.receive")

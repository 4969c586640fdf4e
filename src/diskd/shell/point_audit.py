"""The target's side of an audit: digests of what it would restore (core/audit.py), one question at a time.

The point stays open, and so cannot be pruned, until the source goes. Every byte is verified as it is read, so
a damaged place is told as such and never mistaken for a difference.
"""

import contextlib
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

import trio

from daemonkit.errors import HoldfastError
from daemonkit.frames import FrameReader, frame
from diskd.core.audit import (
    ALL_ZERO,
    MESSAGE_BYTES_MAX,
    PORTION_BYTES,
    SOMETHING,
    Answer,
    Question,
    decode_question,
    digest_of,
    encode_message,
)
from diskd.core.stream import FrameKind
from diskd.errors import Damaged, Refused
from diskd.shell.chain_view import ChainView, OpenPoint

Thread = Callable[[Callable[[], list[bytes]]], Awaitable[list[bytes]]]

# A source that compares is never silent for long: it reads what it asks about.
IDLE_SECONDS_MAX: Final = 120.0
SEND_SECONDS_MAX: Final = 30.0
_RECEIVE_BYTES: Final = 64 << 10


async def answer_audit(
    opening: AbstractAsyncContextManager[OpenPoint], stream: trio.abc.Stream, thread: Thread
) -> None:
    """Until the source closes. What goes wrong here is told to it, and ends the audit."""
    try:
        async with opening as opened:
            await _answer_all(opened, stream, thread)
    except (HoldfastError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, Damaged):
            reason += "; take a full backup (diskctl backup --full)"
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            await _send(stream, Answer([], reason))
            await stream.aclose()


async def _answer_all(opened: OpenPoint, stream: trio.abc.Stream, thread: Thread) -> None:
    reader = FrameReader(frame_bytes_max=MESSAGE_BYTES_MAX)
    await _send(stream, Answer([]))
    while True:
        while (payload := reader.next_frame()) is None:
            with trio.fail_after(IDLE_SECONDS_MAX):
                data = await stream.receive_some(_RECEIVE_BYTES)
            if not data:
                return
            reader.feed(data)
        question = decode_question(payload)
        view = opened.views.get(question.disk)
        if view is None:
            raise Refused(f"{opened.manifest.vm}/{opened.manifest.point} has no disk {question.disk[:80]}")
        digests = await thread(_Digests(view, question))
        await _send(stream, Answer(digests))


async def _send(stream: trio.abc.Stream, answer: Answer) -> None:
    with trio.fail_after(SEND_SECONDS_MAX):
        await stream.send_all(frame(encode_message(answer)))


class _Digests:
    """The answer to a question, for a worker thread; stops soon after the audit has been cancelled."""

    def __init__(self, view: ChainView, question: Question) -> None:
        self._view = view
        self._question = question

    def __call__(self) -> list[bytes]:
        return [self._digest(offset, length) for offset, length in self._question.ranges]

    def _digest(self, offset: int, length: int) -> bytes:
        trio.from_thread.check_cancelled()
        if length > PORTION_BYTES:
            return self._whether_zero(offset, length)
        if all(piece.kind is not FrameKind.DATA for piece in self._view.pieces(offset, length)):
            return ALL_ZERO
        return digest_of(self._view.read(offset, length))

    def _whether_zero(self, offset: int, length: int) -> bytes:
        for piece in self._view.pieces(offset, length):
            if piece.kind is FrameKind.DATA:
                trio.from_thread.check_cancelled()
                if digest_of(self._view.read_piece(piece)) != ALL_ZERO:
                    return SOMETHING
        return ALL_ZERO

"""The target's side of a restore: a point as a full export, each byte verified on its way from the file (B4).

What goes wrong here is told to the reader at its place in the stream; what it has got until then was good.
"""

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Final

import structlog
import trio

from daemonkit.errors import HoldfastError
from diskd.core import target_calls as calls
from diskd.core.stream import FrameKind, StreamEncoder, abort
from diskd.errors import Damaged
from diskd.shell.chain_view import OpenPoint
from diskd.shell.receiving import SEND_SECONDS_MAX
from diskd.shell.repository import full_of

Thread = Callable[[Callable[[], bytes]], Awaitable[bytes]]

# A restore may wait for its reader's disk, so the limit is that of a peer which is gone.
IDLE_SECONDS_MAX: Final = 120.0
_PART_BYTES: Final = 1 << 20

log = structlog.get_logger("target")


async def send_point(
    opening: AbstractAsyncContextManager[OpenPoint],
    params: calls.PointName,
    stream: trio.abc.Stream,
    thread: Thread,
    *,
    peer: str,
    reason_of: Callable[[BaseException], str],
) -> None:
    """Until the reader has it all, or goes."""
    try:
        async with opening as opened:
            await _send_all(opened, stream, thread)
    except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError) as error:
        why = str(error) or "it took nothing for too long"
        log.warning("restore.reader_lost", peer=peer, vm=params.vm, point=params.point, reason=why)
    except (HoldfastError, OSError) as error:
        log.warning("restore.failed", peer=peer, vm=params.vm, point=params.point, reason=str(error))
        reason = reason_of(error)
        if isinstance(error, Damaged):
            reason += f"; restore another point (diskctl target verify {params.vm} tells which are good)"
        with contextlib.suppress(trio.BrokenResourceError, OSError), trio.move_on_after(SEND_SECONDS_MAX):
            await stream.send_all(abort(reason))
            await stream.aclose()


async def _send_all(opened: OpenPoint, stream: trio.abc.Stream, thread: Thread) -> None:
    header, frames = full_of(opened)
    encoder = StreamEncoder(header)
    await _send(stream, encoder.opening)
    while part := await thread(lambda: _next_part(encoder, frames)):
        await _send(stream, part)
    await _send(stream, encoder.finish())


async def _send(stream: trio.abc.Stream, data: bytes) -> None:
    with trio.fail_after(IDLE_SECONDS_MAX):
        await stream.send_all(data)


def _next_part(encoder: StreamEncoder, frames: Iterator[tuple[int, int, bytes]]) -> bytes:
    """Some frames with their data; empty at the end."""
    parts: list[bytes] = []
    size = 0
    for disk, offset, data in frames:
        parts += [encoder.frame(FrameKind.DATA, disk, offset, len(data), data), data]
        size += len(data)
        if size >= _PART_BYTES:
            break
    return b"".join(parts)

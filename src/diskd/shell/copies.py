"""Calls that copy a whole disk into diskd: ``image.import`` from a file on its host, ``image.receive`` from a
client's pipe (core/import_stream.py). A copy that does not end well has left nothing."""

import contextlib
from pathlib import Path
from typing import Final

import structlog
import trio

from daemonkit.errors import HoldfastError
from daemonkit.rpc import Call, Registry
from daemonkit.schema import unstructure
from diskd.core import calls
from diskd.core.import_stream import Answer, encode_answer
from diskd.core.inventory import ImageInfo
from diskd.errors import Refused
from diskd.shell.library import Library

# After a refusal what the client had sent already is read, so that closing does not overtake the answer.
_LAST_WORDS_SECONDS: Final = 5.0
_RECEIVE_BYTES: Final = 1 << 20

log = structlog.get_logger("copies")


def register_copies(registry: Registry, library: Library) -> None:
    """Enter the calls."""

    async def import_(params: calls.ImportImage, call: Call) -> ImageInfo:
        return await import_image(library, params, call)

    async def receive(params: calls.ReceiveImage, _peer: str, stream: trio.abc.Stream) -> None:
        await receive_image(library, params, stream)

    registry.add(calls.IMAGE_IMPORT, import_)
    registry.add_stream(calls.IMAGE_RECEIVE, receive)


async def import_image(library: Library, params: calls.ImportImage, call: Call) -> ImageInfo:
    """Raises Refused. Its progress is told to the caller as far as that takes it."""
    if not params.path.startswith("/"):
        raise Refused(f"{params.path}: write the file's absolute path on diskd's host")
    # The importer may report far more often than a client can take it: only the newest state matters.
    sender, receiver = trio.open_memory_channel[calls.Copied](1)

    def progress(done_bytes: int, total_bytes: int) -> None:
        with contextlib.suppress(trio.WouldBlock):
            sender.send_nowait(calls.Copied(done_bytes, total_bytes))

    async def report() -> None:
        async for copied in receiver:
            await call.progress(unstructure(copied))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(report)
        async with sender:
            info = await library.import_image(params.image, Path(params.path), progress=progress)
    return info


async def receive_image(library: Library, params: calls.ReceiveImage, stream: trio.abc.Stream) -> None:
    """Whatever comes of it is said on the stream; a client that has gone is in the log."""
    try:
        info = await library.receive_image(params.image, stream)
    except (HoldfastError, BaseExceptionGroup) as error:
        leaf = error
        while isinstance(leaf, BaseExceptionGroup):
            leaf = leaf.exceptions[0]
        if not isinstance(leaf, HoldfastError):
            raise
        log.info("image.not_received", image=params.image[:80], reason=str(leaf))
        answer = Answer(None, str(leaf))
    else:
        answer = Answer(unstructure(info), None)
    with trio.move_on_after(_LAST_WORDS_SECONDS), contextlib.suppress(trio.BrokenResourceError):
        await stream.send_all(encode_answer(answer))
        while answer.refusal is not None and await stream.receive_some(_RECEIVE_BYTES):
            pass

"""Calls that copy whole disks.

    into diskd    ``image.import`` from a file on its host, ``image.receive`` from a client's pipe
                  (core/import_stream.py)
    out of it     ``image.hold`` freezes an image for as long as the client stays, for a converter to
                  read over NBD (our own client reads an export stream: shell/backup.py)

What does not end well has left nothing, at the source neither.
"""

import contextlib
from pathlib import Path
from typing import Final

import structlog
import trio

from daemonkit import diskd_api as api
from daemonkit.errors import HoldfastError
from daemonkit.rpc import Call, Registry
from daemonkit.schema import unstructure
from diskd.core import calls
from diskd.core.import_stream import Answer, encode_answer
from diskd.core.inventory import ImageInfo, check_name
from diskd.errors import Refused
from diskd.shell.control import Listening
from diskd.shell.library import Library

# After a refusal what the client had sent already is read, so that closing does not overtake the answer.
_LAST_WORDS_SECONDS: Final = 5.0
# Two syncs of a disk; longer than this means that the disk is gone.
_END_SECONDS: Final = 120.0
_RECEIVE_BYTES: Final = 1 << 20

log = structlog.get_logger("copies")


def register_copies(registry: Registry, library: Library, listening: Listening) -> None:
    """Enter the calls."""

    async def import_(params: calls.ImportImage, call: Call) -> ImageInfo:
        return await import_image(library, params, call)

    async def receive(params: calls.ReceiveImage, _peer: str, stream: trio.abc.Stream) -> None:
        await receive_image(library, params, stream)

    async def hold(params: api.ImageName, _peer: str, stream: trio.abc.Stream) -> None:
        await hold_image(library, params.image, listening, stream)

    registry.add(calls.IMAGE_IMPORT, import_)
    registry.add_stream(calls.IMAGE_HOLD, hold)
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


async def hold_image(library: Library, image: str, listening: Listening, stream: trio.abc.Stream) -> None:
    """Freeze the image, say where it can be read, and let go of it when the client does."""
    try:
        check_name("an image", image)
        frozen = await library.begin_checkpoint(image, [api.BackupDisk(image, image)], "")
    except HoldfastError as error:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(encode_answer(Answer(None, str(error))))
        return
    try:
        held = calls.HeldImage(
            f"{image}:{frozen.checkpoint}",
            frozen.disks[image].size_bytes,
            listening.nbd,
            listening.nbd_socket,
        )
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(encode_answer(Answer(unstructure(held), None)))
            await stream.receive_some(1)
    finally:
        with trio.move_on_after(_END_SECONDS, shield=True):
            await frozen.end("discard")

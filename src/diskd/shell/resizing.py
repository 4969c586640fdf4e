"""Growing an open image (core.resize tells the order), while its guests go on.

The room that the side files and the bitmap need is taken before anybody is held up. Then writes are held for
as long as the few small durable steps take. An NBD client learned the size when it connected and keeps it;
whoever connects afterwards sees the new one.
"""

import secrets

import structlog
import trio

from diskd.core import resize as core
from diskd.core.geometry import Identity
from diskd.core.shared import SharedArea, create_area
from diskd.errors import Refused
from diskd.shell.image import Image
from diskd.shell.image_files import settled_facts
from diskd.shell.open_image import OpenImage
from diskd.shell.raw_layer import now_ns

log = structlog.get_logger("image")


async def resize(opened: OpenImage, size_bytes: int) -> None:
    """``grow`` for an image of the library. Raises Refused only."""
    image, checkpoint, overlay = opened.image, opened.checkpoint, opened.overlay
    if checkpoint is not None and size_bytes > image.size_bytes:
        raise Refused(
            f"image {image.name} is still being merged after checkpoint {checkpoint}: wait until that is done"
            if overlay is not None and overlay.merge is not None
            else f"image {image.name} is part of checkpoint {checkpoint}: wait for its backup, or end it with"
            f" diskctl checkpoint end {checkpoint}"
        )
    try:
        await grow(image, size_bytes)
    except OSError as error:
        raise Refused(f"image {image.name} is not resized yet: {error.strerror or error}") from error


async def grow(image: Image, size_bytes: int) -> None:
    """Durable when it returns. The present size is fine, a smaller one Refused; so is any during a checkpoint
    or a merge. Raises OSError where the image failed meanwhile: its next opening finishes what was begun."""
    try:
        target = core.grown(image.identity, size_bytes)
    except Refused as error:
        raise Refused(f"image {image.name} is not resized: {error}") from error
    if target == image.identity:
        return
    _require_alone(image)
    area = await _new_area(image, target)
    try:
        try:
            async with image.flush_turn, image.commit_turn:
                await image.perform(core.reserve(target, now_ns()), refusable=True)
            await image.sync_layer()
            await _swap(image, target, area)
        except OSError as error:
            if image.failure is not None:
                raise
            raise Refused(
                f"image {image.name} is not resized: {error.strerror}; make room on its file system"
            ) from error
    finally:
        if image.tracker.area is not area:
            image.shared.remove(area.nonce)
            area.release()
    log.info("image.resized", image=image.name, size_bytes=size_bytes)
    await image.join_segments()


def _require_alone(image: Image) -> None:
    image.require_working()
    tracker = image.tracker
    if image.layer is not image.raw or tracker.prepared is not None or tracker.frozen is not None:
        raise Refused(
            f"image {image.name} is part of a checkpoint that stands or is being merged:"
            " resize it when that is over (diskctl image show tells)"
        )
    if image.is_closed:
        raise Refused(f"image {image.name} is being closed: open it again to resize it")


async def _new_area(image: Image, target: Identity) -> SharedArea:
    tracker = image.tracker
    boot_id, active = tracker.header.boot_id, tracker.catalogue.active + 1
    nonce = secrets.token_bytes(16)
    try:
        return await trio.to_thread.run_sync(
            create_area, image.shared, target, tracker.generation, boot_id, nonce, active
        )
    except OSError as error:
        raise Refused(
            f"image {image.name} is not resized: no shared memory for a larger bitmap:"
            f" {error.strerror}; free some there"
        ) from error


async def _swap(image: Image, target: Identity, area: SharedArea) -> None:
    """Under the hold, with nothing of tracking under way: durable, then in memory, in one go."""
    tracker, before = image.tracker, image.identity
    async with image.held(), image.flush_turn, image.catalogue_turn, image.commit_turn:
        _require_alone(image)
        if image.identity != before or tracker.catalogue.active + 1 != area.interval:
            raise Refused(f"image {image.name} was resized or cut meanwhile: look at it, and try again")
        with trio.CancelScope(shield=True):
            facts = await trio.to_thread.run_sync(settled_facts, image.files)
            intent = core.plan(tracker, facts, target.geometry.size_bytes, now_ns())
            await image.perform(core.record(tracker, intent), refusable=True)
            # A crash from here on finds times of the raw file that are later than any write.
            area.time_ns = max(now_ns(), intent.time_ns)
            header = core.live_header(tracker, intent, area.nonce)
            await image.perform(core.carry_out(target, intent, header, now_ns()))
            area.time_ns = now_ns()
        old = tracker.resized(target, core.recovered(target, intent, header, area))
        image.resized(target)
        image.shared.remove(old.nonce)
        old.release()

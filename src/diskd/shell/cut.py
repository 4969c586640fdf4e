"""Cutting a reference point of one image (T2, B1).

    idle --prepare--> prepared --freeze--> frozen --persist--> idle, the point pending
      ^                  |                   |
      +----- cancel -----+----- cancel ------+

``prepare`` allocates the next bitmap and names it in the MRT, before anybody is held up. ``freeze`` is one
assignment in memory. ``persist`` makes the frozen interval durable, syncs the raw file, so that no power loss
can take back bytes that a backup is about to read, and only then records the point.
"""

import secrets
from typing import TYPE_CHECKING

import trio

from diskd.core import mrt, points
from diskd.core.shared import create_area
from diskd.core.tracker import next_header, replace_catalogue, store_interval, switch_interval
from diskd.errors import Refused
from diskd.shell.raw_layer import now_ns

if TYPE_CHECKING:
    from diskd.shell.image import Image


class Cut:
    """The cut in progress, if any, of one image."""

    def __init__(self, image: "Image") -> None:
        self._image = image
        self._thawed = trio.Event()
        self._thawed.set()

    async def wait_thawed(self) -> None:
        """Return when no interval is frozen, or was not a moment ago: look again."""
        await self._thawed.wait()

    async def prepare(self) -> None:
        image, tracker = self._image, self._image.tracker
        # A resize may come before our turn: what depends on the size is looked up only then.
        async with image.flush_turn:
            image.require_working()
            if tracker.prepared is not None or tracker.frozen is not None:
                raise Refused(f"{image.name}: another point is being cut; wait for it")
            points.check_cut(tracker.catalogue)
            nonce = secrets.token_bytes(16)
            try:
                area = await trio.to_thread.run_sync(
                    create_area,
                    image.shared,
                    image.identity,
                    tracker.generation,
                    tracker.header.boot_id,
                    nonce,
                    tracker.catalogue.active + 1,
                )
            except OSError as error:
                raise Refused(
                    f"{image.name}: no shared memory for another bitmap: {error.strerror}; free some there"
                ) from error
            try:
                async with image.commit_turn:
                    header = next_header(tracker, next_nonce=nonce, root_sequence=tracker.root.sequence)
                    await image.perform(mrt.write_header(image.identity, header, now_ns()))
                    tracker.prepare(area, header)
            finally:
                if tracker.prepared is not area:
                    # Cancelled: nobody else knows of it. Failed: the MRT may name it.
                    if image.failure is None:
                        image.shared.remove(nonce)
                    area.release()

    def freeze(self, point: str) -> None:
        self._image.tracker.freeze(point)
        self._thawed = trio.Event()

    async def persist(self) -> None:
        image, tracker = self._image, self._image.tracker
        async with image.flush_turn, image.catalogue_turn:
            image.require_working()
            frozen = tracker.frozen
            if frozen is None:
                raise Refused(f"{image.name}: no point is being cut")
            catalogue = points.cut(
                tracker.catalogue, frozen.point, image.size_bytes, frozen.area.over_report_bytes
            )
            await image.perform(store_interval(tracker, frozen.area, catalogue), refusable=True)
            try:
                await image.raw.flush()
            except OSError as error:
                image.fail(f"the sync of a cut failed: {error.strerror or error}")
                raise
            async with image.commit_turn:
                header = next_header(
                    tracker,
                    nonce=tracker.area.nonce,
                    next_nonce=mrt.NO_NONCE,
                    root_sequence=tracker.root.sequence,
                )
                await image.perform(replace_catalogue(image.identity, catalogue), refusable=True)
                root = await image.perform(switch_interval(tracker, catalogue, header, now_ns()))
                done = tracker.persisted(catalogue, root, header)
            image.shared.remove(done.nonce)
            done.release()
            self._thawed.set()

    async def cancel(self) -> None:
        image, tracker = self._image, self._image.tracker
        async with image.flush_turn:
            if tracker.frozen is not None:
                unused = tracker.unfreeze()
                self._thawed.set()
            elif tracker.prepared is not None:
                unused, tracker.prepared = tracker.prepared, None
            else:
                return
            async with image.commit_turn:
                header = next_header(
                    tracker,
                    nonce=tracker.area.nonce,
                    next_nonce=mrt.NO_NONCE,
                    root_sequence=tracker.root.sequence,
                )
                await image.perform(mrt.write_header(image.identity, header, now_ns()))
                tracker.header = header
            image.shared.remove(unused.nonce)
            unused.release()

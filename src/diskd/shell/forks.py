"""Makes overlays: a new, empty AVHD at a fork, or one that an earlier process left behind."""

import contextlib
import secrets
from pathlib import Path

import attrs
import trio

from daemonkit.durable import sync_directory
from diskd.core import avhd
from diskd.core.avhd import AvhdMap, Head
from diskd.core.inventory import SpaceInfo
from diskd.errors import Damaged
from diskd.shell import live_map, low_disk
from diskd.shell.held import Invalidate
from diskd.shell.image_files import remove_halves
from diskd.shell.live_map import LiveMap
from diskd.shell.open_image import OpenImage
from diskd.shell.overlay import OverlayLayer
from diskd.shell.overlay_settings import OverlaySettings


@attrs.frozen
class Forks:
    """``shared_dir`` is a tmpfs; ``boot_id`` tells whether what lies there is of this boot."""

    shared_dir: Path
    boot_id: str
    settings: OverlaySettings

    def space(self, image: OpenImage) -> SpaceInfo | None:
        """What is left of the image's file system and of its limits; None where that cannot be told."""
        try:
            found = low_disk.room(image.image.directory)
        except OSError:
            return None
        reserve, overlay = self.settings.low_disk_limit, image.overlay
        return SpaceInfo(
            found.free,
            0 if reserve is None else reserve.of(found.total),
            0 if overlay is None else overlay.map.data_blocks * overlay.head.block_bytes,
            self.settings.avhd_limit_bytes,
        )

    async def make(self, image: OpenImage, checkpoint: str, invalidate: Invalidate) -> OverlayLayer:
        """An empty AVHD, durable, over the image's parent; nobody uses it yet. Raises OSError, Refused."""
        head = Head(
            checkpoint,
            str(image.image.uuid),
            image.image.size_bytes,
            image.image.block_bytes,
            secrets.token_hex(8),
            live_map.new_nonce(image.image.uuid),
        )
        (image.image.directory / avhd.DIRECTORY).mkdir(exist_ok=True)
        nothing = bytes(avhd.cell_bytes(head.blocks))
        live = await self._live(head.live_nonce, nothing)
        try:
            await image.files.run(avhd.create(head))
            await trio.to_thread.run_sync(sync_directory, image.image.directory)
            return self._overlay(image, await _states(head, live), live, invalidate)
        except BaseException:
            live.close()
            raise

    async def _live(self, nonce: str, cells: bytes) -> LiveMap:
        # In a thread: that of a large image takes a while to allocate and to fill.
        return await trio.to_thread.run_sync(LiveMap.create, self.shared_dir, nonce, cells, self.boot_id)

    async def attach(self, image: OpenImage, head: Head, invalidate: Invalidate) -> OverlayLayer:
        """The overlay over what an earlier process left. Raises Damaged: never the parent alone.

        The mapped copy of the same boot is ahead of the durable map; it is believed until the durable one
        has caught up and names another.
        """
        geometry = (str(image.image.uuid), image.image.size_bytes, image.image.block_bytes)
        if (head.image_uuid, head.size_bytes, head.block_bytes) != geometry:
            raise Damaged(f"image {image.name}: its AVHD belongs to another image")
        cells = await image.files.run(avhd.load_cells(head))
        # What was closed cleanly has no mapped copy, and neither has what was open when the power was lost.
        mapped = live_map.recover(self.shared_dir, head.live_nonce, len(cells), self.boot_id)
        nonce = live_map.new_nonce(image.image.uuid)
        live = await self._live(nonce, mapped or cells)
        try:
            states = await _states(head, live)
            if mapped is not None:
                states.mark_all_dirty()
                await image.files.run(avhd.flush(states.take_dirty(), parent=True))
            states.head = await image.files.run(avhd.renew(head, nonce))
            live_map.forget_others(self.shared_dir, image.image.uuid, nonce)
            return self._overlay(image, states, live, invalidate)
        except BaseException:
            live.close()
            raise

    def _overlay(
        self, image: OpenImage, states: AvhdMap, live: LiveMap, invalidate: Invalidate
    ) -> OverlayLayer:
        return OverlayLayer(
            image.image.directory,
            states,
            live,
            image.image.raw,
            image.files,
            self.settings,
            on_failure=invalidate,
            fail=image.image.fail,
        )


async def _states(head: Head, live: LiveMap) -> AvhdMap:
    return await trio.to_thread.run_sync(AvhdMap.over, head, live.cells)


async def left_behind(image: OpenImage, frozen: str | None) -> Head | None:
    """The head of an AVHD that was completed and not removed; half of one is cleaned up, and so is half of a
    head, which would keep the directory for ever. ``frozen``: the checkpoint whose AVHD must be there. Raises
    Damaged."""
    directory = image.image.directory / avhd.DIRECTORY
    await trio.to_thread.run_sync(remove_halves, directory)
    head = await image.files.run(avhd.load_head())
    if frozen is not None and (head is None or head.checkpoint != frozen):
        raise Damaged(
            f"image {image.name}: the AVHD of its checkpoint {frozen} is missing ({avhd.HEAD_FILE}), and with"
            " it what was written since: put it back"
        )
    if head is None:
        await image.files.run(avhd.remove())
        with contextlib.suppress(OSError):
            directory.rmdir()
    return head

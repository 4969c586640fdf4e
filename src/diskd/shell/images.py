"""The images of a root and their lives: created, imported, opened, released, deleted; at start and stop.

An image is *open* (served, in ``opened``), or *closed*: known and not served, because it was released or
because it is damaged. One verb at a time works on a name.
"""

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final
from uuid import uuid4

import structlog
import trio

from daemonkit import durable
from daemonkit.errors import HoldfastError
from daemonkit.units import format_size
from diskd.core import lease
from diskd.core.geometry import BLOCK_BYTES_DEFAULT, RAW, REGION_BYTES_DEFAULT, Geometry, Identity
from diskd.core.inventory import ImageInfo, check_name
from diskd.core.lease import LeaseState
from diskd.errors import Refused
from diskd.shell import directories, resizing
from diskd.shell.checkpoints import Checkpoints
from diskd.shell.image import Image, ImageSettings, Writer
from diskd.shell.image_files import adopt_blocking
from diskd.shell.imports import SizeCheck
from diskd.shell.open_image import OpenImage

log = structlog.get_logger()

Fill = Callable[[Path, SizeCheck], Awaitable[None]]

GRAINS: Final = (BLOCK_BYTES_DEFAULT, REGION_BYTES_DEFAULT)
_RELEASED: Final = "released"
STOP_SECONDS: Final = 60.0  # a clean stop flushes; beyond this the next start recovers instead


class Images:
    """``opened`` is shared with the checkpoints and the exports; only this class changes it."""

    def __init__(
        self,
        directory: Path,
        settings: ImageSettings,
        opened: dict[str, OpenImage],
        checkpoints: Checkpoints,
        *,
        nursery_that_outlives_calls: trio.Nursery,
    ) -> None:
        self._directory = directory
        self._settings = settings
        self._opened = opened
        self._checkpoints = checkpoints
        self._nursery = nursery_that_outlives_calls
        self._closed: dict[str, str | None] = {}  # released (None), or damaged with the reason
        self._in_work: set[str] = set()

    # --- looking -----------------------------------------------------------------------------------

    def list_all(self) -> list[ImageInfo]:
        """Sorted by name; damaged and released ones included."""
        return [self.show(name) for name in sorted(self._opened.keys() | self._closed.keys())]

    def show(self, name: str) -> ImageInfo:
        """Raises Refused where there is none of that name."""
        if name in self._closed:
            return directories.describe(self._directory / name, self._closed[name])
        image = self.find(name)
        overlay, state = image.overlay, image.lease_state
        merging = overlay is not None and overlay.merge is not None
        return ImageInfo(
            name=name,
            uuid=str(image.image.uuid),
            size_bytes=image.image.size_bytes,
            block_bytes=image.image.block_bytes,
            region_bytes=image.image.identity.geometry.region_bytes,
            allocated_bytes=directories.allocated_bytes(image.image.directory),
            state="open",
            reason=image.image.failure,
            epoch=state.epoch,
            holder=None if state.released else state.holder,
            connections=image.connections,
            checkpoint=image.checkpoint,
            merge_remaining_bytes=overlay.map.entries * image.image.block_bytes
            if overlay is not None and merging
            else None,
            points=len(image.image.points()),
        )

    def find(self, name: str) -> OpenImage:
        """Raises Refused, with what else it is."""
        image = self._opened.get(name)
        if image is not None:
            return image
        if name in self._closed:
            reason = self._closed[name]
            remedy = f"open it again: diskctl image open {name}"
            raise Refused(
                f"image {name} is {'released' if reason is None else f'damaged: {reason}'}; {remedy}"
            )
        raise Refused(f"there is no image {name!r}")

    @contextlib.contextmanager
    def _working_on(self, name: str) -> Iterator[None]:
        if name in self._in_work:
            raise Refused(f"image {name} is being made, opened, resized, released or deleted: wait for that")
        self._in_work.add(name)
        try:
            yield
        finally:
            self._in_work.discard(name)

    async def create(
        self, name: str, size_bytes: int, *, block_bytes: int = 4096, region_bytes: int = 1 << 20
    ) -> ImageInfo:
        """A new, sparse, empty image."""
        async with self._new(name) as directory:
            await self._make(directory, size_bytes, block_bytes=block_bytes, region_bytes=region_bytes)
            return await self._publish(name, directory)

    async def import_(self, name: str, fill: Fill) -> ImageInfo:
        """A new image with the content that ``fill`` gives its raw file: from its first byte on it is tracked
        as if a guest had written that."""
        async with self._new(name) as directory:
            try:
                await trio.to_thread.run_sync(directory.mkdir)
                await fill(directory / RAW, self._check_size)
                size_bytes = (directory / RAW).stat().st_size
                identity = Identity(uuid4(), Geometry.check(size_bytes, *GRAINS))
                await trio.to_thread.run_sync(adopt_blocking, directory, identity)
                await directories.run_once(directory, lease.persist(LeaseState()))
            except OSError as error:
                raise Refused(f"image {name} cannot be imported: {error.strerror or error}") from error
            return await self._publish(name, directory)

    def _check_size(self, size_bytes: int) -> None:
        """Raises Refused before any space is taken."""
        needed = Geometry.check(size_bytes, *GRAINS).bitmap_bytes
        found = os.statvfs(self._settings.shared_dir)
        if needed > found.f_bavail * found.f_frsize:
            raise Refused(
                f"an image of {format_size(size_bytes)} needs {format_size(needed)} of shared memory, and"
                f" {self._settings.shared_dir} has {format_size(found.f_bavail * found.f_frsize)}: enlarge it"
            )

    @asynccontextmanager
    async def new_images(self, sizes: Mapping[str, int]) -> AsyncIterator[dict[str, Writer]]:
        """Several new images, to be filled by the body; they are there when it ends well, all or none."""
        async with contextlib.AsyncExitStack() as stack:
            made: dict[str, Image] = {}
            places: dict[str, Path] = {}
            for name, size_bytes in sizes.items():
                places[name] = await stack.enter_async_context(self._new(name))
                await self._make(places[name], size_bytes)
                made[name] = await Image.open(places[name], self._settings)
                stack.push_async_callback(_close_shielded, made[name])
            yield {name: image.open_writer(lambda: None) for name, image in made.items()}
            published: list[str] = []
            try:
                for name, image in made.items():
                    await image.close()
                    await self._publish(name, places[name])
                    published.append(name)
            except BaseException:
                with trio.move_on_after(STOP_SECONDS, shield=True):
                    for name in published:
                        await self._remove(name)
                raise

    @asynccontextmanager
    async def _new(self, name: str) -> AsyncIterator[Path]:
        """Where it is made; nothing of it is left if that fails."""
        with self._working_on(check_name("an image", name)):
            if name in self._opened or name in self._closed:
                raise Refused(f"image {name} exists already: choose another name, or delete it first")
            directory = self._directory / f".new-{name}"
            try:
                yield directory
            finally:
                with trio.move_on_after(STOP_SECONDS, shield=True):
                    await self._discard(directory)

    async def _discard(self, path: Path) -> None:
        """Remove half an image. What is large takes its time, and must not hold up others."""
        await trio.to_thread.run_sync(directories.discard, path, self._settings.shared_dir)

    async def _make(
        self, directory: Path, size_bytes: int, *, block_bytes: int = 4096, region_bytes: int = 1 << 20
    ) -> None:
        try:
            await Image.create(directory, size_bytes, block_bytes=block_bytes, region_bytes=region_bytes)
            await directories.run_once(directory, lease.persist(LeaseState()))
        except OSError as error:
            raise Refused(f"the image cannot be created: {error}") from error

    async def _publish(self, name: str, directory: Path) -> ImageInfo:
        try:
            await trio.to_thread.run_sync(directories.rename, directory, self._directory / name)
        except OSError as error:
            raise Refused(f"image {name} cannot be created: {error}") from error
        await self._serve(name)
        log.info("image.created", image=name)
        return self.show(name)

    async def _serve(self, name: str) -> None:
        """Open it and put it into the catalog. Raises Refused or Damaged."""
        image = await OpenImage.open(self._directory / name, self._settings)
        try:
            await self._checkpoints.attach(image)
        except BaseException:
            with trio.move_on_after(STOP_SECONDS, shield=True):
                await image.close()
            raise
        self._closed.pop(name, None)
        self._opened[name] = image
        await self._nursery.start(image.image.run)

    async def resize(self, name: str, size_bytes: int) -> ImageInfo:
        """Grow it. Its present size is fine; refused while it is part of a checkpoint."""
        with self._working_on(name):
            await resizing.resize(self.find(name), size_bytes)
            return self.show(name)

    async def delete(self, name: str, *, dry_run: bool = False) -> list[str]:
        """The paths that are (or, dry, would be) removed. Refused while the image is in use."""
        with self._working_on(name):
            path = self._directory / name
            if name not in self._closed:
                self._refuse_use(self.find(name), "delete")
            paths = sorted(str(found) for found in [path, *path.rglob("*")])
            if dry_run:
                return paths
            await self._remove(name)
            return paths

    async def _remove(self, name: str) -> None:
        image = self._opened.pop(name, None)
        self._closed.pop(name, None)
        if image is not None:
            await image.close()
        path, shared = self._directory / name, self._settings.shared_dir
        try:
            await trio.to_thread.run_sync(directories.delete, path, shared)
        except OSError as error:
            raise Refused(f"image {name} cannot be deleted: {error}") from error
        log.info("image.deleted", image=name)

    def _refuse_use(self, image: OpenImage, verb: str) -> None:
        if image.connections:
            raise Refused(f"image {image.name} has {image.connections} connections: close them to {verb} it")
        if not image.lease_state.is_free:
            held = image.lease_state
            raise Refused(
                f"image {image.name} is under lease (epoch {held.epoch}, {held.holder}): release it"
            )
        checkpoint = self._checkpoints.using(image.name) or (image.overlay and image.checkpoint)
        if checkpoint:
            raise Refused(f"image {image.name} is part of checkpoint {checkpoint}: wait until it is merged")

    async def release(self, name: str) -> ImageInfo:
        """Close it cleanly, so that another daemon can open it with its tracking intact."""
        with self._working_on(name):
            image = self.find(name)
            self._refuse_use(image, "release")
            del self._opened[name]
            self._closed[name] = None
            try:
                await trio.to_thread.run_sync(durable.replace_file, self._directory / name / _RELEASED, b"")
                await image.close()
            except OSError as error:
                self._closed[name] = str(error)
                raise Refused(f"image {name} could not be closed cleanly: {error}") from error
            return self.show(name)

    async def open(self, name: str) -> ImageInfo:
        """Serve a released image again, or one that was damaged and has been repaired."""
        with self._working_on(name):
            if name not in self._closed:
                return self.show(name)
            await self._serve(name)
            await trio.to_thread.run_sync(durable.remove_file, self._directory / name / _RELEASED)
            return self.show(name)

    # --- start and stop ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Open every image, then take up what their checkpoints left behind. Called once."""
        shared = self._settings.shared_dir
        for path in await trio.to_thread.run_sync(directories.sweep, self._directory, shared):
            name = path.name
            if (path / _RELEASED).exists():
                self._closed[name] = None
                continue
            try:
                self._opened[name] = await OpenImage.open(path, self._settings)
            except (OSError, HoldfastError) as error:
                self._refuse_image(name, str(error))
        for name, reason in (await self._checkpoints.recover(self._closed)).items():
            image = self._opened.pop(name)
            self._refuse_image(name, reason)
            with contextlib.suppress(OSError):
                await image.close()
        for image in self._opened.values():
            await self._nursery.start(image.image.run)

    def _refuse_image(self, name: str, reason: str) -> None:
        self._closed[name] = reason
        log.error("image.damaged", image=name, reason=reason)

    async def stop(self) -> None:
        """Close every image cleanly. Nothing else of the library runs any more."""
        for image in self._opened.values():
            try:
                await image.close()
            except OSError as error:
                log.warning("image.close_failed", image=image.name, reason=str(error))


async def _close_shielded(image: Image) -> None:
    with trio.move_on_after(STOP_SECONDS, shield=True):
        await image.close()

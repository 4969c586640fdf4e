"""All images under one root: the catalog of exports, leases, checkpoints, points, recovery and merges.

ROOT/lock                 held while a daemon serves the root
ROOT/images/NAME/         one image (DESIGN.md section 7); ``released`` in it: another daemon may open it
ROOT/images/.new-NAME     being created or imported; swept at the start
ROOT/images/.gone-NAME    being deleted; swept at the start
ROOT/checkpoints/ID/      one checkpoint's record
"""

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import structlog
import trio

from daemonkit import durable
from daemonkit.diskd_api import ActivityReport, BackupDisk, Lease
from daemonkit.errors import HoldfastError
from diskd.core import lease
from diskd.core.inventory import (
    ChangesInfo,
    CheckpointInfo,
    HeldBy,
    ImageInfo,
    LibrarySettings,
    Outcome,
    PointInfo,
    check_name,
)
from diskd.core.lease import LeaseState
from diskd.core.ports import Export, FrozenVm
from diskd.errors import NoSuchExport, Refused
from diskd.shell import directories, imports
from diskd.shell.checkpoints import Checkpoints
from diskd.shell.forks import Forks
from diskd.shell.frozen import FrozenDevice, contexts
from diskd.shell.image import Image, ImageSettings
from diskd.shell.imports import Progress
from diskd.shell.open_image import OpenImage
from diskd.shell.overlay import OverlaySettings

__all__ = ["Library", "Progress", "open_library"]

log = structlog.get_logger()

_RELEASED: Final = "released"
_STOP_SECONDS: Final = 60.0  # a clean stop flushes; beyond this the next start recovers instead


class Library:
    """Made by ``open_library``. Every refusal is Refused (an OperatorError), one line that says what to do.

    Implements ports.ExportCatalog: ``names``, ``open``, ``info``.
    """

    def __init__(
        self,
        root: Path,
        settings: LibrarySettings,
        image_settings: ImageSettings,
        *,
        nursery_that_outlives_calls: trio.Nursery,
    ) -> None:
        self._directory = root / "images"
        self._image_settings = image_settings
        self._nursery = nursery_that_outlives_calls
        self._images: dict[str, OpenImage] = {}
        self._closed: dict[str, str | None] = {}  # released (None), or damaged with the reason
        self._in_work: set[str] = set()
        overlay_settings = OverlaySettings(settings.merge_batch_bytes, settings.avhd_limit_bytes)
        boot_id = image_settings.boot_id_file.read_text().strip()
        self._checkpoints = Checkpoints(
            root / "checkpoints",
            self._images,
            Forks(image_settings.shared_dir, boot_id, overlay_settings),
            settings.checkpoint_resume_timeout_ns,
            nursery_that_outlives_calls=nursery_that_outlives_calls,
        )

    # --- exports -----------------------------------------------------------------------------------

    def names(self) -> Sequence[str]:
        """Export names that ``open`` would accept now."""
        found: list[str] = []
        for name in sorted(self._images):
            found += self._images[name].export_names()
            found += self._checkpoints.exports(name)
        return found

    async def open(self, name: str, *, peer: str, drop: Callable[[str], None]) -> Export:
        """ports.ExportCatalog.open: `IMAGE`, `IMAGE@EPOCH`, `IMAGE:CHECKPOINT`."""
        image, epoch, checkpoint = self._parse(name)
        if checkpoint is not None:
            return self._frozen_export(image, checkpoint)
        export = await image.open_session(epoch, drop)
        log.info("export.opened", export=name, peer=peer)
        return export

    async def info(self, name: str) -> Export:
        """ports.ExportCatalog.info."""
        image, epoch, checkpoint = self._parse(name)
        return image.info(epoch) if checkpoint is None else self._frozen_export(image, checkpoint)

    def _parse(self, name: str) -> tuple[OpenImage, int | None, str | None]:
        """Raises NoSuchExport."""
        base, colon, checkpoint = name.partition(":")
        base, at, digits = base.partition("@")
        epoch = lease.parse_epoch(digits) if at else None
        image = self._images.get(base)
        if image is None or (at and (colon or epoch is None)):
            raise NoSuchExport(f"there is no export {name[:200]!r}")
        return image, epoch, checkpoint if colon else None

    def _frozen_export(self, image: OpenImage, checkpoint: str) -> Export:
        try:
            disk = self._checkpoints.frozen_disk(image.name, checkpoint)
        except Refused as error:
            raise NoSuchExport(str(error)) from error
        return Export(FrozenDevice(disk), True, contexts(disk), lambda: None, disk.block_bytes)

    # --- images ------------------------------------------------------------------------------------

    def images(self) -> list[ImageInfo]:
        """Sorted by name; damaged and released ones included."""
        return [self.image(name) for name in sorted(self._images.keys() | self._closed.keys())]

    def image(self, name: str) -> ImageInfo:
        """Raises Refused where there is none of that name."""
        if name in self._closed:
            return directories.describe(self._directory / name, self._closed[name])
        image = self._find(name)
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

    def _find(self, name: str) -> OpenImage:
        """Raises Refused, with what else it is."""
        image = self._images.get(name)
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
            raise Refused(f"image {name} is being created, opened, released or deleted: wait for that")
        self._in_work.add(name)
        try:
            yield
        finally:
            self._in_work.discard(name)

    async def create_image(
        self, name: str, size_bytes: int, *, block_bytes: int = 4096, region_bytes: int = 1 << 20
    ) -> ImageInfo:
        """A new, sparse, empty image."""
        async with self._new(name) as directory:
            await self._create(directory, size_bytes, block_bytes=block_bytes, region_bytes=region_bytes)
            return await self._publish(name, directory)

    async def import_image(self, name: str, source: Path, *, progress: Progress | None = None) -> ImageInfo:
        """A new image with the content of a raw file, or of whatever ``qemu-img convert`` reads."""
        async with self._new(name) as directory:
            kind = await trio.to_thread.run_sync(imports.detect_format, source)
            converted = directory.with_name(f"{directory.name}.raw")
            try:
                if kind != "raw":
                    await imports.convert(source, kind, converted)
                    source = converted
                await self._create(directory, await trio.to_thread.run_sync(imports.size_of, source))
                image = await Image.open(directory, self._image_settings)
                try:
                    await imports.copy_in(source, image.open_writer(lambda: None), progress)
                finally:
                    with trio.move_on_after(_STOP_SECONDS, shield=True):
                        await image.close()
            except OSError as error:
                raise Refused(f"image {name} cannot be imported: {error}") from error
            finally:
                with trio.move_on_after(_STOP_SECONDS, shield=True):
                    await self._discard(converted)
            return await self._publish(name, directory)

    @asynccontextmanager
    async def _new(self, name: str) -> AsyncIterator[Path]:
        """Where it is made; nothing of it is left if that fails."""
        with self._working_on(check_name("an image", name)):
            if name in self._images or name in self._closed:
                raise Refused(f"image {name} exists already: choose another name, or delete it first")
            directory = self._directory / f".new-{name}"
            try:
                yield directory
            finally:
                with trio.move_on_after(_STOP_SECONDS, shield=True):
                    await self._discard(directory)

    async def _discard(self, path: Path) -> None:
        """Remove half an image. What is large takes its time, and must not hold up others."""
        await trio.to_thread.run_sync(directories.discard, path, self._image_settings.shared_dir)

    async def _create(
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
        return self.image(name)

    async def _serve(self, name: str) -> None:
        """Open it and put it into the catalog. Raises Refused or Damaged."""
        image = await OpenImage.open(self._directory / name, self._image_settings)
        try:
            await self._checkpoints.attach(image)
        except BaseException:
            with trio.move_on_after(_STOP_SECONDS, shield=True):
                await image.close()
            raise
        self._closed.pop(name, None)
        self._images[name] = image
        await self._nursery.start(image.image.run)

    async def delete_image(self, name: str, *, dry_run: bool = False) -> list[str]:
        """The paths that are (or, dry, would be) removed. Refused while the image is in use."""
        with self._working_on(name):
            path = self._directory / name
            if name not in self._closed:
                self._refuse_use(self._find(name), "delete")
            paths = sorted(str(found) for found in [path, *path.rglob("*")])
            if dry_run:
                return paths
            image = self._images.pop(name, None)
            self._closed.pop(name, None)
            if image is not None:
                await image.close()
            try:
                await trio.to_thread.run_sync(directories.delete, path, self._image_settings.shared_dir)
            except OSError as error:
                raise Refused(f"image {name} cannot be deleted: {error}") from error
            log.info("image.deleted", image=name)
            return paths

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

    async def release_image(self, name: str) -> ImageInfo:
        """Close it cleanly, so that another daemon can open it with its tracking intact."""
        with self._working_on(name):
            image = self._find(name)
            self._refuse_use(image, "release")
            del self._images[name]
            self._closed[name] = None
            try:
                await trio.to_thread.run_sync(durable.replace_file, self._directory / name / _RELEASED, b"")
                await image.close()
            except OSError as error:
                self._closed[name] = str(error)
                raise Refused(f"image {name} could not be closed cleanly: {error}") from error
            return self.image(name)

    async def open_image(self, name: str) -> ImageInfo:
        """Serve a released image again, or one that was damaged and has been repaired."""
        with self._working_on(name):
            if name not in self._closed:
                return self.image(name)
            await self._serve(name)
            await trio.to_thread.run_sync(durable.remove_file, self._directory / name / _RELEASED)
            return self.image(name)

    def activity(self, images: list[str]) -> ActivityReport:
        """daemonkit.diskd_api.IMAGE_ACTIVITY."""
        known = [self._images[name].activity() for name in images if name in self._images]
        return ActivityReport(known, [name for name in images if name not in self._images])

    # --- leases (S1) -------------------------------------------------------------------------------

    async def acquire_lease(self, image: str, epoch: int, holder: str) -> Lease:
        """Answers once the epoch is durable and every call of older epochs is finished and dropped."""
        return await self._change_lease(image, lease.acquire, epoch, holder)

    async def prepare_lease(self, image: str, epoch: int, holder: str) -> Lease:
        """Let ``epoch`` connect and read; its writes get EPERM until it is acquired."""
        return await self._change_lease(image, lease.prepare, epoch, holder)

    async def release_lease(self, image: str, epoch: int, holder: str) -> Lease:
        """The holder lets go; the epoch stays where it is."""
        return await self._change_lease(image, lease.release, epoch, holder)

    async def _change_lease(self, image: str, decision: lease.Decision, epoch: int, holder: str) -> Lease:
        try:
            return await self._find(image).change_lease(decision, epoch, holder)
        except OSError as error:
            raise Refused(f"the lease of image {image} could not be made durable: {error}") from error

    def lease(self, image: str) -> Lease:
        """The newest lease."""
        return self._find(image).show_lease()

    # --- points and changes ------------------------------------------------------------------------

    def points(self, image: str) -> list[PointInfo]:
        """Oldest first, invalid and pending ones included."""
        return [
            PointInfo(
                point.id,
                point.rct_id,
                point.state == "valid",
                None
                if point.state == "valid"
                else point.reason or "pending: nobody has said yet whether its backup was committed",
            )
            for point in self._find(image).image.points()
        ]

    async def delete_point(self, image: str, point: str) -> None:
        """Join its interval with the next. Refused while its checkpoint stands."""
        found = self._find(image).image
        if point not in [known.id for known in found.points()]:
            raise Refused(f"image {image} has no point {point}")
        for info in self._checkpoints.infos():
            if info.point == point:
                raise Refused(f"point {point} belongs to checkpoint {info.checkpoint}, which is {info.state}")
        try:
            await found.delete_point(point)
        except OSError as error:
            raise Refused(f"point {point} cannot be deleted: {error}") from error

    async def changes(self, image: str, since: str) -> ChangesInfo:
        """The changes since a valid point up to now. Raises NoSuchPoint (T4)."""
        found = self._find(image).image
        report = await found.changes(since)
        return ChangesInfo(
            image, since, found.block_bytes, report.exact, report.over_report_bytes, report.extents
        )

    # --- checkpoints -------------------------------------------------------------------------------

    async def begin_checkpoint(
        self,
        vm: str,
        disks: list[BackupDisk],
        config: str,
        *,
        held_by: HeldBy = "backup",
        target: str | None = None,
    ) -> FrozenVm:
        """Fork all disks of the VM at one instant (B1); waits for an earlier merge of the same images.

        Refused while a live backup or ``checkpoint begin`` holds a checkpoint of this VM or these images.
        If the caller dies without ``end``, its owner calls ``FrozenVm.end("discard")`` or ``("pending")``.
        """
        return await self._checkpoints.begin(vm, disks, config, held_by, target)

    async def end_checkpoint(self, checkpoint: str, outcome: Outcome) -> None:
        """``diskctl checkpoint end``: FrozenVm.end by id."""
        await self._checkpoints.end(checkpoint, outcome)

    def frozen(self, checkpoint: str) -> FrozenVm:
        """A standing checkpoint by id. Raises Refused where there is none."""
        return self._checkpoints.frozen(checkpoint)

    def checkpoints(self) -> list[CheckpointInfo]:
        """Every checkpoint that has a record, oldest first, pending ones included."""
        return self._checkpoints.infos()

    # --- start and stop ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Open every image, then take up what their checkpoints left behind. Called once."""
        shared = self._image_settings.shared_dir
        for path in await trio.to_thread.run_sync(directories.sweep, self._directory, shared):
            name = path.name
            if (path / _RELEASED).exists():
                self._closed[name] = None
                continue
            try:
                self._images[name] = await OpenImage.open(path, self._image_settings)
            except (OSError, HoldfastError) as error:
                self._refuse_image(name, str(error))
        for name, reason in (await self._checkpoints.recover(self._closed)).items():
            image = self._images.pop(name)
            self._refuse_image(name, reason)
            with contextlib.suppress(OSError):
                await image.close()
        for image in self._images.values():
            await self._nursery.start(image.image.run)

    def _refuse_image(self, name: str, reason: str) -> None:
        self._closed[name] = reason
        log.error("image.damaged", image=name, reason=reason)

    async def stop(self) -> None:
        """Close every image cleanly. Nothing else of the library runs any more."""
        for image in self._images.values():
            try:
                await image.close()
            except OSError as error:
                log.warning("image.close_failed", image=image.name, reason=str(error))
        self._checkpoints.close()


@asynccontextmanager
async def open_library(root: Path, settings: LibrarySettings | None = None) -> AsyncIterator[Library]:
    """The library under ``root`` (made where absent, locked), recovered and merging in the background.

    Leaving the context closes every image cleanly. Raises OperatorError (LockHeldError, Damaged ...).
    """
    chosen = settings or LibrarySettings()
    image_settings = ImageSettings(chosen.tracking_flush_interval_ns, chosen.max_open_bytes)
    if chosen.shared_dir is not None:
        image_settings = ImageSettings(
            chosen.tracking_flush_interval_ns, chosen.max_open_bytes, Path(chosen.shared_dir)
        )
    try:
        for path in (root, root / "images", root / "checkpoints"):
            path.mkdir(exist_ok=True, parents=path is root)
        lock = durable.lock_file(root / "lock")
    except OSError as error:
        raise Refused(f"{root}: {error.strerror}") from error
    failure: Exception | None = None
    library: Library | None = None
    try:
        async with trio.open_nursery() as nursery:
            library = Library(root, chosen, image_settings, nursery_that_outlives_calls=nursery)
            try:
                await library.start()
                yield library
            except Exception as error:  # noqa: BLE001 - raised below, without the nursery's group around it
                failure = error
            finally:
                nursery.cancel_scope.cancel(reason="the library stops")
        if failure is not None:
            raise failure
    finally:
        # Only now: a merge whose copy is under way in a thread must not write to an image that was closed.
        if library is not None:
            with trio.move_on_after(_STOP_SECONDS, shield=True):
                await library.stop()
        os.close(lock)

"""The images of a root and their lives: created, imported, opened, released, deleted; at start and stop.

An image is *open* (served, in ``opened``), *broken* (this daemon's, and it could not be opened), or with
nobody or another daemon, which only its owner record tells (core.ownership). One verb at a time works on a
name; every few seconds each open image is looked at whether it is still ours.
"""

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final
from uuid import uuid4

import structlog
import trio

from daemonkit.errors import HoldfastError, words_of
from daemonkit.units import format_size
from diskd.core import lease
from diskd.core.geometry import BLOCK_BYTES_DEFAULT, RAW, REGION_BYTES_DEFAULT, Geometry, Identity
from diskd.core.inventory import NAME_PATTERN, ImageInfo, check_name
from diskd.core.lease import LeaseState
from diskd.core.ownership import Lost, Owner
from diskd.errors import Refused
from diskd.shell import directories, owning, resizing
from diskd.shell.checkpoint_records import sweep as sweep_checkpoints
from diskd.shell.checkpoint_recovery import CheckpointRecovery, close_records
from diskd.shell.checkpoints import Checkpoints
from diskd.shell.image import Image, ImageSettings, Writer
from diskd.shell.image_files import adopt_blocking
from diskd.shell.imports import SizeCheck
from diskd.shell.insistence import Action
from diskd.shell.open_image import OpenImage
from diskd.shell.owning import AT_START, Claimant, NotOurs, Order
from diskd.shell.raw_layer import now_ns

log = structlog.get_logger()

Fill = Callable[[Path, SizeCheck], Awaitable[None]]

GRAINS: Final = (BLOCK_BYTES_DEFAULT, REGION_BYTES_DEFAULT)
_CHECK_SECONDS: Final = 2.0  # how long a daemon may serve what an operator wrongly gave to another
STOP_SECONDS: Final = 60.0  # a clean stop flushes; beyond this the next start recovers instead


class Images:
    """``opened`` is shared with the checkpoints and the exports; only this class changes it."""

    def __init__(
        self,
        directory: Path,
        settings: ImageSettings,
        opened: dict[str, OpenImage],
        checkpoints: Checkpoints,
        claimant: Claimant,
        *,
        nursery_that_outlives_calls: trio.Nursery,
    ) -> None:
        self._directory = directory
        self._settings = settings
        self._opened = opened
        self._checkpoints = checkpoints
        self._broken: dict[str, str] = {}  # this daemon's, and why it cannot be opened, or was lost
        self._nursery = nursery_that_outlives_calls
        self._claimant = claimant
        self._recovery = CheckpointRecovery(checkpoints, self._is_elsewhere, self._broken.__contains__)
        self._in_work: set[str] = set()
        self._being_checked: set[str] = set()

    # --- looking -----------------------------------------------------------------------------------

    def list_all(self) -> list[ImageInfo]:
        """Sorted by name; those included that are not open here."""
        names = {path.name for path in directories.listing(self._directory)}
        return [self.show(name) for name in sorted(names | self._opened.keys())]

    def show(self, name: str) -> ImageInfo:
        """Raises Refused where there is none of that name."""
        image = self._opened.get(name)
        if image is None:
            closed, reason, owner = self._whose(name)
            return directories.describe(
                self._directory / name, closed, reason, owning.owner_info(self._claimant, owner)
            )
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
            merge_remaining_bytes=image.unmerged_bytes if overlay is not None and merging else None,
            points=len(image.image.points()),
            owner=image.ownership.show(),
            space=self._checkpoints.forks.space(image),
        )

    def _whose(self, name: str) -> tuple[directories.ClosedState, str, Owner | None]:
        """The state, the reason and the owner of an image that is not open here. Raises Refused."""
        path = self._directory / name
        if NAME_PATTERN.fullmatch(name) is None or not path.is_dir():
            raise Refused(f"there is no image {name!r}")
        try:
            owner = owning.owner_blocking(path)
        except (OSError, HoldfastError) as error:
            return "damaged", words_of(error), None
        if name in self._broken and (owner is None or owner.daemon.name == self._claimant.me.name):
            return "damaged", self._broken[name], owner
        state, reason = owning.explain(owner, self._claimant)
        lost = self._broken.get(name)
        return state, f"{reason}; {lost}" if lost is not None else reason, owner

    def _is_elsewhere(self, name: str, uuid: str) -> bool:
        """For the recovery of checkpoints: it exists, and is not this daemon's to serve."""
        if name in self._opened or name in self._broken:
            return False
        return directories.uuid_of(self._directory / name) == uuid

    def find(self, name: str) -> OpenImage:
        """Raises Refused, with what else it is."""
        image = self._opened.get(name)
        if image is not None:
            return image
        state, reason, owner = self._whose(name)
        text = f"damaged: {reason}" if state == "damaged" else reason
        if owner is not None and owner.state == "serving" and state == "elsewhere":
            raise Refused(f"image {name} is {text}; ask there")
        raise Refused(f"image {name} is {text}; open it again: diskctl image open {name}")

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
                await directories.run_once(directory, lease.found(self._claimant.me, now_ns()))
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
            if (self._directory / name).exists():
                raise Refused(f"image {name} exists already: choose another name, or delete it first")
            directory = directories.unborn(self._directory, name, self._claimant.me.name)
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
            await directories.run_once(directory, lease.found(self._claimant.me, now_ns()))
        except OSError as error:
            raise Refused(f"the image cannot be created: {error}") from error

    async def _publish(self, name: str, directory: Path) -> ImageInfo:
        try:
            await trio.to_thread.run_sync(directories.rename, directory, self._directory / name)
        except OSError as error:
            raise Refused(f"image {name} cannot be created: {error}") from error
        await self._serve(name, Order())
        log.info("image.created", image=name)
        return self.show(name)

    async def _serve(self, name: str, order: Order) -> None:
        """Open it and put it into the catalog. Raises Refused or Damaged."""
        image = await OpenImage.open(self._directory / name, self._settings, self._claimant, order)
        try:
            await self._recovery.attach(image)
        except BaseException:
            with trio.move_on_after(STOP_SECONDS, shield=True):
                await image.close()
            raise
        self._broken.pop(name, None)
        # Nothing waits between these: what is served has somebody who flushes it.
        self._opened[name] = image
        self._nursery.start_soon(image.image.run)

    async def resize(self, name: str, size_bytes: int) -> ImageInfo:
        """Grow it. Its present size is fine; refused while it is part of a checkpoint."""
        with self._working_on(name):
            await resizing.resize(self.find(name), size_bytes)
            return self.show(name)

    async def delete(self, name: str, *, dry_run: bool = False) -> list[str]:
        """The paths that are (or, dry, would be) removed. Refused while the image is in use."""
        with self._working_on(name):
            path = self._directory / name
            image = self._opened.get(name)
            if image is not None:
                self._refuse_use(image, "delete")
            else:
                self._whose(name)
            paths = sorted(str(found) for found in [path, *path.rglob("*")])
            if dry_run:
                return paths
            await self._remove(name)
            return paths

    async def _remove(self, name: str) -> None:
        image = self._opened.pop(name, None)
        path, shared, me = self._directory / name, self._settings.shared_dir, self._claimant.me.name
        try:
            if image is not None:
                with trio.CancelScope(shield=True):  # out of the catalog already: it is closed in any case
                    await image.retire(f"image {name} was deleted")
                await image.close()
            async with owning.claimed_for_deletion(path, self._claimant):
                await trio.to_thread.run_sync(directories.delete, path, shared, me)
            self._broken.pop(name, None)
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
        if checkpoint and not (verb == "release" and self._recovery.waits(image)):
            raise Refused(f"image {image.name} is part of checkpoint {checkpoint}: wait until it is merged")

    async def release(self, name: str) -> ImageInfo:
        """Close it cleanly, so that another daemon can open it with its tracking intact."""
        await self._see_through(partial(self._release, name))
        return self.show(name)

    async def _release(self, name: str) -> None:
        with self._working_on(name):
            image = self.find(name)
            self._refuse_use(image, "release")
            await self._give_away(image, f"image {name} was released")
            log.info("image.released", image=name)

    async def hand_over(self, name: str, epoch: int, holder: str) -> None:
        """To another daemon, for a new run: every older one is fenced here first. Its checkpoint goes along
        as it stands, as at a restart. Raises Refused."""
        await self._see_through(partial(self._hand_over, name, epoch, holder))

    async def _hand_over(self, name: str, epoch: int, holder: str) -> None:
        with self._working_on(name):
            image = self.find(name)
            await image.change_lease(lease.acquire, epoch, holder)
            if self._checkpoints.is_beginning(name):
                raise Refused(f"a checkpoint of image {name} is just beginning: ask again")
            await self._give_away(image, f"image {name} was handed over to {holder}")
            log.info("image.handed_over", image=name, epoch=epoch, holder=holder)

    async def _give_away(self, image: OpenImage, reason: str) -> None:
        """Close it and say that anybody may open it. Raises Refused, and it is closed all the same."""
        name = image.name
        del self._opened[name]
        try:
            await close_records(self._recovery.detach(image, reason))
            await image.retire(reason)
            await image.stop_merging(reason)
        except trio.Cancelled:
            self._opened[name] = image  # the library stops, and closes what is open
            raise
        failure = image.image.failure
        try:
            await image.close("released")
        except OSError as error:
            self._broken[name] = failure or words_of(error)
            raise Refused(
                f"image {name} could not be closed cleanly, and stays with this daemon: {error}; open it here"
                f" (diskctl image open {name}), or fence this host ({self._claimant.me.host})"
            ) from error
        if failure is not None:
            log.warning("image.given_away_unclean", image=name, reason=failure)

    async def _see_through(self, action: Action) -> None:
        """Return when it is done. Whoever stops waiting does not stop it: an image that is out of the catalog
        and not closed yet would be with nobody until the next start."""
        errors: list[Exception] = []
        done = trio.Event()

        async def run() -> None:
            try:
                await action()
            except (OSError, HoldfastError) as error:
                errors.append(error)
            finally:
                done.set()

        self._nursery.start_soon(run)
        await done.wait()
        if errors:
            raise errors[0]

    def lease_elsewhere(self, name: str) -> LeaseState:
        """As the storage has it, of an image that is not open here. Raises Refused, also where it is damaged:
        nobody shall plan with it."""
        state, reason, _ = self._whose(name)
        if state == "damaged":
            raise Refused(f"image {name} is damaged: {reason}")
        return directories.lease_of(self._directory / name)

    async def open(self, name: str, order: Order) -> ImageInfo:
        """Serve an image that is released, was damaged and is repaired, or is a dead daemon's."""
        with self._working_on(name):
            if name not in self._opened:
                self._whose(name)
                try:
                    await self._serve(name, order)
                except OSError as error:
                    raise Refused(f"image {name} cannot be opened: {error}") from error
            return self.show(name)

    # --- start and stop ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Open every image, then take up what their checkpoints left behind. Called once."""
        shared, me = self._settings.shared_dir, self._claimant.me.name
        for path in await trio.to_thread.run_sync(directories.sweep, self._directory, shared, me):
            name = path.name
            try:
                self._opened[name] = await OpenImage.open(path, self._settings, self._claimant, AT_START)
            except (NotOurs, Lost) as error:
                log.info("image.elsewhere", image=name, reason=str(error))
            except (OSError, HoldfastError) as error:
                self._refuse_image(name, words_of(error))
        await sweep_checkpoints(self._checkpoints.directory, me)
        for name, reason in (await self._recovery.recover()).items():
            image = self._opened.pop(name)
            self._refuse_image(name, reason)
            with contextlib.suppress(OSError, Lost):
                await image.close()
        for image in self._opened.values():
            self._nursery.start_soon(image.image.run)
        self._nursery.start_soon(self._watch)

    async def _watch(self) -> None:
        """See to it that nothing is served that somebody else has."""
        while True:
            await trio.sleep(_CHECK_SECONDS)
            for name, image in list(self._opened.items()):
                if name not in self._being_checked and name not in self._in_work:
                    self._being_checked.add(name)
                    self._nursery.start_soon(self._check, name, image)

    async def _check(self, name: str, image: OpenImage) -> None:
        """In a task of its own: storage that hangs must not keep the other images from being looked at."""
        try:
            await image.ownership.check()
        except Lost as error:
            await self.lose(name, image, words_of(error))
        except OSError as error:
            log.warning("image.not_checked", image=name, reason=str(error))
        finally:
            self._being_checked.discard(name)

    async def lose(self, name: str, image: OpenImage, reason: str) -> None:
        """Stop serving what is not ours any more. Whoever is at work on it finds out for himself."""
        await self._see_through(partial(self._lose, name, image, reason))

    async def _lose(self, name: str, image: OpenImage, reason: str) -> None:
        if self._opened.get(name) is not image or name in self._in_work:
            return
        with self._working_on(name):
            del self._opened[name]
            self._broken[name] = f"this daemon lost it: {reason}"
            log.error("image.lost", image=name, reason=reason)
            records = self._recovery.detach(image, f"image {name} was lost: {reason}")
            await image.lose(f"the image is not served here any more: {reason}")
            await close_records(records)

    def _refuse_image(self, name: str, reason: str) -> None:
        self._broken[name] = reason
        log.error("image.damaged", image=name, reason=reason)

    async def stop(self) -> None:
        """Close every image cleanly. Nothing else of the library runs any more."""
        for image in self._opened.values():
            try:
                await image.close()
            except (OSError, Lost) as error:
                log.warning("image.close_failed", image=image.name, reason=str(error))
        self._recovery.close()


async def _close_shielded(image: Image) -> None:
    with trio.move_on_after(STOP_SECONDS, shield=True):
        await image.close()

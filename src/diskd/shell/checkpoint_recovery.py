"""Takes up checkpoints that an earlier process left, or another daemon whose images came here (B6).

A record belongs to whoever serves *all* of its images that still exist. While a VM's images are with two
daemons (half-way through a move), nobody acts on the record: it *waits*, its images are served over their
AVHDs, and nothing is merged, since its frozen view may still be somebody's. When the last image arrives, the
record is read anew and goes on as after a restart: it stands for ``checkpoint_resume_timeout`` from then on.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial

import structlog

from daemonkit.errors import HoldfastError, words_of
from daemonkit.hooks import hooks_of
from diskd.core import checkpoint
from diskd.core.checkpoint import Record
from diskd.core.inventory import Outcome
from diskd.shell.checkpoint_records import Loaded, load_records
from diskd.shell.checkpoints import Checkpoints
from diskd.shell.forks import left_behind
from diskd.shell.frozen import FrozenImage
from diskd.shell.held import Held, Invalidate
from diskd.shell.insistence import Action
from diskd.shell.open_image import OpenImage

log = structlog.get_logger()

# Of an image's name and uuid: it exists, and is not this daemon's to serve.
IsElsewhere = Callable[[str, str], bool]
# Of an image's name: it is this daemon's, and cannot be opened.
IsBroken = Callable[[str], bool]


class CheckpointRecovery:
    """``recover`` goes with a start, ``attach`` and ``detach`` with one image opened or closed later."""

    def __init__(self, checkpoints: Checkpoints, is_elsewhere: IsElsewhere, is_broken: IsBroken) -> None:
        self._checkpoints = checkpoints
        self._is_elsewhere = is_elsewhere
        self._is_broken = is_broken
        self._waiting: dict[str, Held] = {}

    async def recover(self) -> dict[str, str]:
        """Take up what the records say. Every image is open, and has no writer yet.

        Returns those that must not be served, with the reason: the caller closes them.
        """
        loaded = await load_records(self._checkpoints.directory)
        records = self._take(loaded, dict(self._checkpoints.images))
        refused: dict[str, str] = {}
        for image in list(self._checkpoints.images.values()):
            try:
                await self._put_over(image, loaded)
            except (OSError, HoldfastError) as error:
                refused[image.name] = words_of(error)
        for held in records:
            for name in refused:
                held.images.pop(name, None)
            held.incomplete = any(
                disk.image in refused or self._is_broken(disk.image) for disk in held.record.disks
            )
            await self._resume(held)
        for image in self._checkpoints.images.values():
            self._explain_waiting(image)
            self._merge_orphan(image)
        return refused

    async def attach(self, image: OpenImage) -> None:
        """The same for one image opened later, which is not among the open ones yet."""
        loaded = await load_records(self._checkpoints.directory)
        try:
            await self._put_over(image, loaded)
        except BaseException:  # then it is still nobody's here, and so are its records
            for _, _, files in loaded:
                files.close()
            raise
        fresh = self._take(loaded, {**self._checkpoints.images, image.name: image})
        self._explain_waiting(image)
        for held in self._checkpoints.held.values():
            if held not in fresh and held.incomplete and _names(held.record, image):
                held.images[image.name] = image
                held.incomplete = any(self._is_broken(name) for name in _others(held.record, image))
                fresh.append(held)
        for held in fresh:
            for known_image in held.images.values():
                known_image.stuck = None
            await self._resume(held)
        self._merge_orphan(image)

    def detach(self, image: OpenImage, reason: str) -> list[Held]:
        """The image is served no more, though it exists: its records are somebody else's, or wait.

        From this step on nothing is recorded in them; ``close_records`` is what is left to do."""
        lost: list[Held] = []
        for records in (self._checkpoints.held, self._waiting):
            for identifier, held in list(records.items()):
                if not _names(held.record, image):
                    continue
                del records[identifier]
                held.lost = reason
                for disk in held.disks.values():
                    disk.end(reason)
                lost.append(held)
        return lost

    def waits(self, image: OpenImage) -> bool:
        """Its AVHD's record waits for another image: so it may be given away as it is."""
        return image.checkpoint in self._waiting

    def close(self) -> None:
        """Let go of the files of records that wait."""
        for held in self._waiting.values():
            held.files.close()

    def _take(self, loaded: Sequence[Loaded], known: dict[str, OpenImage]) -> list[Held]:
        """The records that became ours; others wait, or are ours already."""
        found: list[Held] = []
        for record, invalid, files in loaded:
            images = {
                disk.image: known[disk.image]
                for disk in record.disks
                if disk.image in known and str(known[disk.image].image.uuid) == disk.uuid
            }
            elsewhere = [
                disk.image
                for disk in record.disks
                if disk.image not in images and self._is_elsewhere(disk.image, disk.uuid)
            ]
            waited = self._waiting.pop(record.checkpoint, None)
            if waited is not None:
                waited.files.close()
            held = Held(record, files, images, invalid=invalid)
            if record.checkpoint in self._checkpoints.held or (elsewhere and not images):
                files.close()
            elif elsewhere:
                self._waiting[record.checkpoint] = held
                log.warning("checkpoint.waits", checkpoint=record.checkpoint, images=elsewhere)
            else:
                self._checkpoints.held[record.checkpoint] = held
                found.append(held)
        return found

    async def _put_over(self, image: OpenImage, loaded: Sequence[Loaded]) -> None:
        """Put a left-behind AVHD over its parent again. Raises Damaged, also where it must be there and is
        not: what was written since the cut would be missing."""
        frozen = [
            record.checkpoint
            for record, invalid, _ in loaded
            if record.state == "sealed" and not invalid and _names(record, image)
        ]
        head = await left_behind(image, frozen[0] if frozen else None)
        if head is None:
            return
        overlay = await self._checkpoints.forks.attach(image, head, self._invalidator(head.checkpoint))
        image.image.layer = image.overlay = overlay
        image.checkpoint = head.checkpoint

    def _explain_waiting(self, image: OpenImage) -> None:
        waited = self._waiting.get(image.checkpoint or "")
        if waited is not None:
            others = ", ".join(sorted(set(_others(waited.record, image)) - waited.images.keys()))
            image.stuck = f"{others} of its checkpoint {image.checkpoint} is not with this daemon"

    def _invalidator(self, identifier: str) -> Invalidate:
        """Of whatever holds the record at that time; an orphaned AVHD is being merged from the start."""

        async def invalidate(reason: str) -> None:
            held = self._checkpoints.held.get(identifier) or self._waiting.get(identifier)
            if held is not None:
                await self._checkpoints.invalidator(held)(reason)

        return invalidate

    def _merge_orphan(self, image: OpenImage) -> None:
        """An AVHD whose checkpoint has no record any more: nobody waits for it, but its bytes count."""
        overlay = image.overlay
        if overlay is None or overlay.merge is not None or self.waits(image):
            return
        if overlay.head.checkpoint not in self._checkpoints.held:
            overlay.start_merging()
            self._checkpoints.nursery.start_soon(self._checkpoints.merge_image, image, overlay)

    async def _resume(self, held: Held) -> None:
        decision = checkpoint.recover(held.record, invalid=held.invalid)
        if decision.standing:
            for disk in held.record.disks:
                image = held.images.get(disk.image)
                if image is not None and image.overlay is not None:
                    held.disks[disk.name] = FrozenImage(image.image, image.overlay, held.record.point)
            self._checkpoints.let_stand(held)
            self._checkpoints.nursery.start_soon(self._checkpoints.watch_space, held)
            return
        checkpoints = self._checkpoints
        is_ending = held.record.state == "ending"
        action = partial(checkpoints.settle_points if is_ending else checkpoints.finish, held)
        if decision.end is None:
            checkpoints.start_merging(held, "the daemon was restarted")
        else:
            action = partial(self._abandon, held, decision.end)
            if held.record.state == "preparing":
                checkpoints.start_merging(held, "the checkpoint never came about")
                if hooks_of(held.record.config) is not None:
                    checkpoints.nursery.start_soon(self._thaw_and_abandon, held, action)
                    return
        with contextlib.suppress(OSError):  # what a full disk does not take is made up for
            await checkpoints.insist(held, action)

    async def _thaw_and_abandon(self, held: Held, abandon: Action) -> None:
        """Beside everything else: thawing takes its time, and may need the guest's own disk to be served. The
        record goes after that, so that whoever is killed meanwhile thaws again."""
        await self._checkpoints.hooks(held).thaw_after_crash()
        with contextlib.suppress(OSError, HoldfastError):  # made up for, or somebody else's by now
            await self._checkpoints.insist(held, abandon)

    async def _abandon(self, held: Held, outcome: Outcome) -> None:
        if held.record.state == "preparing":
            async with held.lock:
                await self._checkpoints.persist(held, checkpoint.advance(held.record, "end", outcome))
        if held.record.is_standing:
            await self._checkpoints.end_held(held, outcome)
        else:
            await self._checkpoints.settle_points(held)


async def close_records(records: list[Held]) -> None:
    """Of checkpoints that are not this daemon's any more: when no change of a record is under way."""
    for held in records:
        async with held.lock:
            held.files.close()


def _names(record: Record, image: OpenImage) -> bool:
    return any((disk.image, disk.uuid) == (image.name, str(image.image.uuid)) for disk in record.disks)


def _others(record: Record, image: OpenImage) -> list[str]:
    return [disk.image for disk in record.disks if disk.image != image.name]

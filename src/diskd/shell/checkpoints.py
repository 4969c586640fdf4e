"""Carries out core.checkpoint over the open images: fork, seal, invalidate, end, settle, merge.

Order of a begin (B1): record, AVHDs and maps and the next bitmaps durable; hold every disk's writes; one
step in memory switches all bitmaps and layers; let go; the frozen bitmaps and parents durable; seal. Of an
end: the outcome durable; points settled; answered; merged behind; the record goes last.
What an earlier process or another daemon left is taken up in checkpoint_recovery.py.
"""

import contextlib
import secrets
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Final

import attrs
import structlog
import trio

from daemonkit.diskd_api import BackupDisk
from daemonkit.errors import HoldfastError, words_of
from daemonkit.hooks import hooks_of
from daemonkit.units import SECOND
from diskd.core import checkpoint
from diskd.core.checkpoint import Record
from diskd.core.inventory import (
    CheckpointInfo,
    HeldBy,
    Outcome,
)
from diskd.core.ports import OnMerge
from diskd.errors import NoSuchPoint, Refused
from diskd.shell import low_disk
from diskd.shell.checkpoint_records import make_directory
from diskd.shell.forks import Forks
from diskd.shell.frozen import FrozenImage
from diskd.shell.held import (
    Held,
    Invalidate,
    StandingCheckpoint,
    check_request,
    describe,
    new_record,
    refuse_standing,
)
from diskd.shell.hooks import HookRunner, HookSettings
from diskd.shell.insistence import Action, Insistence
from diskd.shell.open_image import OpenImage
from diskd.shell.overlay import OverlayLayer

log = structlog.get_logger()

# Undoing a begin is a few small durable steps; beyond this the next start does it.
_UNDO_SECONDS: Final = 30.0
_MERGE_REPORT_SECONDS: Final = 1.0


class Checkpoints:
    """All checkpoints under ROOT/checkpoints. ``images`` looks an open image up (raises Refused)."""

    def __init__(
        self,
        directory: Path,
        images: Mapping[str, OpenImage],
        forks: Forks,
        resume_timeout_ns: int,
        daemon: str,
        hooks: HookSettings,
        *,
        nursery_that_outlives_calls: trio.Nursery,
    ) -> None:
        self.directory = directory
        self.images = images
        self.resume_timeout_ns = resume_timeout_ns
        self._daemon = daemon
        self._hooks = hooks
        self.forks = forks
        self.nursery = nursery_that_outlives_calls
        self._insistence = Insistence(nursery_that_outlives_calls=nursery_that_outlives_calls)
        self.held: dict[str, Held] = {}
        self._beginning: dict[str, str] = {}  # "vm NAME" and "image NAME": checkpoint id
        self._changed = trio.Event()

    # --- looking ---------------------------------------------------------------------------------------

    def infos(self) -> list[CheckpointInfo]:
        """Every record, oldest first."""
        found = sorted(self.held.values(), key=lambda held: held.record.created_ns)
        return [describe(held) for held in found]

    def find(self, identifier: str) -> Held:
        """Raises Refused."""
        held = self.held.get(identifier)
        if held is None:
            raise Refused(f"there is no checkpoint {identifier}")
        return held

    def frozen(self, identifier: str) -> StandingCheckpoint:
        """Raises Refused unless it stands."""
        held = self.find(identifier)
        if held.record.state != "sealed":
            raise Refused(f"checkpoint {identifier} is {held.record.state}: its frozen view has ended")
        return StandingCheckpoint(self, held)

    def frozen_disk(self, image: str, identifier: str) -> FrozenImage:
        """What IMAGE:CHECKPOINT opens. Raises Refused."""
        self.frozen(identifier)
        for disk in self.held[identifier].disks.values():
            if disk.image == image:
                return disk
        raise Refused(f"checkpoint {identifier} has no image {image}")

    def pending(self, vm: str, target: str) -> list[str]:
        """Points of the VM whose acknowledgement by this target was lost, oldest first."""
        found = [held.record for held in self.held.values() if held.record.waits_for(vm, target)]
        return [record.point for record in sorted(found, key=lambda record: record.created_ns)]

    def exports(self, image: str) -> list[str]:
        """The export names of an image's standing frozen views."""
        infos = (describe(held) for held in self.held.values())
        return [info.exports[image] for info in infos if image in info.exports]

    def is_beginning(self, image: str) -> bool:
        """Whether a checkpoint of this image is being made, or waits for a merge to be."""
        return f"image {image}" in self._beginning

    def using(self, image: str) -> str | None:
        """The checkpoint that an image belongs to until it is merged."""
        for held in self.held.values():
            if image in held.images and held.record.state not in ("pending", "gone"):
                return held.record.checkpoint
        return self._beginning.get(f"image {image}")

    # --- begin -----------------------------------------------------------------------------------------

    async def begin(
        self,
        vm: str,
        disks: list[BackupDisk],
        config: str,
        held_by: HeldBy,
        target: str | None,
        *,
        allow_crash_consistent: bool,
        on_merge: OnMerge | None = None,
    ) -> StandingCheckpoint:
        """Library.begin_checkpoint."""
        images = check_request(self.images, vm, disks, config)
        hooks_of(config)  # refused before anything is done
        identifier = f"cp-{secrets.token_hex(8)}"
        claims = [f"vm {vm}", *(f"image {name}" for name in images)]
        for claim in claims:
            if claim in self._beginning:
                raise Refused(f"checkpoint {self._beginning[claim]} of {claim} is just beginning")
        refuse_standing(self.held.values(), vm, images)
        self._beginning.update(dict.fromkeys(claims, identifier))
        try:
            await self._abandon_deserted(vm, images, identifier)
            await self._wait_merged(images, on_merge)
            await self._require_room(images)
            record = new_record(identifier, vm, disks, config, held_by, target, images)
            return await self._begin(record, images, allow_crash_consistent=allow_crash_consistent)
        except OSError as error:
            raise Refused(f"the checkpoint cannot begin: {error}") from error
        finally:
            for claim in claims:
                del self._beginning[claim]

    async def _wait_merged(self, images: Mapping[str, OpenImage], on_merge: OnMerge | None) -> None:
        """Until no image has an AVHD. Raises Refused where that will not come about."""
        while any(image.overlay is not None for image in images.values()):
            for name, image in images.items():
                if self.images.get(name) is not image:
                    raise Refused(f"image {name} is not served here any more")
                if image.stuck is not None:
                    raise Refused(f"image {name} cannot be merged: {image.stuck}; reopen it")
            if on_merge is not None:
                await on_merge(sum(image.unmerged_bytes for image in images.values()))
            with trio.move_on_after(_MERGE_REPORT_SECONDS):
                await self._changed.wait()

    async def _abandon_deserted(self, vm: str, images: Mapping[str, OpenImage], by: str) -> None:
        for held in [held for held in self.held.values() if held.is_deserted]:
            if held.record.vm == vm or not images.keys().isdisjoint(held.images):
                log.info("checkpoint.abandoned", checkpoint=held.record.checkpoint, by=by)
                await self.end(held.record.checkpoint, checkpoint.given_up(held.record))

    async def _begin(
        self, record: Record, images: dict[str, OpenImage], *, allow_crash_consistent: bool
    ) -> StandingCheckpoint:
        held = Held(record, await make_directory(self.directory, record, self._daemon), images)
        self.held[record.checkpoint] = held
        try:
            await self._fork(held, allow_crash_consistent=allow_crash_consistent)
            self.nursery.start_soon(self.watch_space, held)
            for image in images.values():
                await image.image.persist_cut()
                if image.overlay is not None:
                    image.overlay.parent_is_synced = True
            async with held.lock:
                if held.invalid:
                    raise Refused("the checkpoint was invalidated while it began: an AVHD cannot take writes")
                await self.persist(held, checkpoint.advance(held.record, "sealed"))
        except BaseException:
            with trio.move_on_after(_UNDO_SECONDS, shield=True):
                await self._undo(held)
            raise
        log.info("checkpoint.sealed", checkpoint=record.checkpoint, vm=record.vm, point=record.point)
        return StandingCheckpoint(self, held)

    async def _require_room(self, images: dict[str, OpenImage]) -> None:
        directories = [image.image.directory for image in images.values()]
        reason = await low_disk.too_little(directories, self.forks.settings.low_disk_limit)
        if reason is not None:
            raise Refused(f"the checkpoint cannot begin: {reason}: free some space, or lower that setting")

    async def watch_space(self, held: Held) -> None:
        """Give the checkpoint up before its AVHDs fill the file system."""
        await low_disk.watch(
            [image.image.directory for image in held.images.values()],
            self.forks.settings.low_disk_limit,
            stands=lambda: held.record.is_standing and not held.invalid and held.lost is None,
            give_up=self.invalidator(held),
        )

    async def _fork(self, held: Held, *, allow_crash_consistent: bool) -> None:
        """AVHDs, maps and bitmaps first; then the guest is quieted, and all disks cut in one step under the
        hold."""
        overlays: dict[str, OverlayLayer] = {}
        try:
            for name, image in held.images.items():
                await image.image.prepare_cut()
                overlays[name] = await self.forks.make(image, held.record.checkpoint, self.invalidator(held))
            hooks = self.hooks(held)
            async with hooks.quiesced(allow_crash_consistent=allow_crash_consistent) as quiesced:
                await self._cut(held, overlays)
            held.record = attrs.evolve(held.record, consistency=quiesced.consistency)
        except BaseException:
            with trio.move_on_after(_UNDO_SECONDS, shield=True):
                for name, overlay in overlays.items():
                    if held.images[name].overlay is not overlay:
                        await overlay.dispose()
            raise

    async def _cut(self, held: Held, overlays: dict[str, OverlayLayer]) -> None:
        disks = {disk.image: disk.name for disk in held.record.disks}
        async with contextlib.AsyncExitStack() as stack:
            for image in held.images.values():
                await stack.enter_async_context(image.image.held())
            # From here to the end of the hold nothing waits, and nothing can fail half-way.
            for name, image in held.images.items():
                image.image.freeze(held.record.point)
                image.image.layer = image.overlay = overlays[name]
                image.checkpoint = held.record.checkpoint
                held.disks[disks[name]] = FrozenImage(image.image, overlays[name], held.record.point)

    def hooks(self, held: Held) -> HookRunner:
        """Of the VM, for this checkpoint."""
        record = held.record
        return HookRunner(self._hooks, hooks_of(record.config), record.vm, record.checkpoint)

    async def _undo(self, held: Held) -> None:
        """A begin failed: as if it had not been tried. What cannot be done now, the next start does."""
        for image in held.images.values():
            with contextlib.suppress(OSError, HoldfastError):
                await image.image.cancel_cut()
        async with held.lock:
            ended = checkpoint.advance(held.record, "end", "discard")
            try:
                await self.persist(held, ended)
            except OSError as error:
                held.record = ended
                held.may_stand = not await self._can_flag(held)
                if held.may_stand:
                    # The record may say "sealed": while nothing says otherwise, durably, the parents stay.
                    for image in held.images.values():
                        image.stuck = f"the end of {held.record.checkpoint} cannot be recorded: {error}"
                    return
            self.start_merging(held, "the checkpoint could not begin")
        with contextlib.suppress(OSError, HoldfastError):
            await self.insist(held, partial(self.settle_points, held))

    async def _can_flag(self, held: Held) -> bool:
        try:
            await self._flag(held)
        except OSError:
            return False
        return True

    # --- invalidation (B2) -----------------------------------------------------------------------------

    def invalidator(self, held: Held) -> Invalidate:
        async def invalidate(reason: str) -> None:
            async with held.lock:
                if (held.record.is_standing or held.may_stand) and not held.invalid:
                    await self._flag(held)
                    log.warning("checkpoint.invalid", checkpoint=held.record.checkpoint, reason=reason)
                self.start_merging(held, reason)

        return invalidate

    async def _flag(self, held: Held) -> None:
        held.require_ours()
        if not held.invalid:
            with trio.CancelScope(shield=True):
                await held.files.run(checkpoint.invalidate(held.record))
            held.invalid = True

    def start_merging(self, held: Held, reason: str) -> None:
        """The frozen view has ended, durably: parents may change. Not ours: whoever has the images merges."""
        if held.lost is not None:
            return
        for disk in held.disks.values():
            disk.end(reason)
        for name, image in held.images.items():
            overlay = image.overlay
            if overlay is None or overlay.head.checkpoint != held.record.checkpoint or name in held.merging:
                continue
            overlay.start_merging()
            held.merging.add(name)
            self.nursery.start_soon(self._merge, held, image, overlay)

    async def _merge(self, held: Held, image: OpenImage, overlay: OverlayLayer) -> None:
        if await self.merge_image(image, overlay):
            held.merging.discard(image.name)
            with contextlib.suppress(OSError):
                await self.insist(held, partial(self.finish, held))

    async def merge_image(self, image: OpenImage, overlay: OverlayLayer) -> bool:
        """True when the image is on its parent alone and the AVHD is gone."""
        try:
            with image.merging():
                await self._merge_whole(image, overlay)
                return True
        except (OSError, HoldfastError) as error:
            # The entries stand and the AVHD is read on; the next start of the image merges again.
            image.stuck = words_of(error)
            log.error("merge.failed", image=image.name, reason=image.stuck)  # noqa: TRY400 - one line, no trace
        self._notify()  # also where it was cut short: whoever waits for it looks at the image again
        return False

    async def _merge_whole(self, image: OpenImage, overlay: OverlayLayer) -> None:
        while True:
            await overlay.run_merge()
            async with image.image.held():
                if overlay.map.entries == 0:
                    image.image.layer = image.image.raw
                    break
        await overlay.dispose()
        image.overlay = image.checkpoint = None
        log.info("merge.done", image=image.name)
        self._notify()

    # --- end and settle (B3) ---------------------------------------------------------------------------

    async def end(self, identifier: str, outcome: Outcome) -> None:
        """FrozenVm.end. Once the outcome is durable it is carried out, whoever stops waiting."""
        held = self.find(identifier)
        if held.record.is_pending and outcome != "pending":  # the operator's word, for a target that is gone
            await self.settle(held.record.vm, held.record.point, committed=outcome == "keep")
            return
        try:
            await self.insist(held, partial(self.end_held, held, outcome))
        except OSError as error:
            raise Refused(f"the end of checkpoint {identifier} cannot be recorded: {error}") from error

    async def suspend(self, identifier: str) -> None:
        """FrozenVm.suspend."""
        held = self.find(identifier)
        if held.record.state == "sealed" and not held.invalid:
            self.let_stand(held)
        else:
            await self.end(identifier, checkpoint.given_up(held.record))

    def let_stand(self, held: Held) -> None:
        """Nobody holds it from now on: it is given up unless somebody comes back in time."""
        token = held.idle = object()

        async def expire() -> None:
            await trio.sleep(self.resume_timeout_ns / SECOND)
            if held.idle is token and held.record.is_standing and held.lost is None:
                log.warning("checkpoint.expired", checkpoint=held.record.checkpoint)
                with contextlib.suppress(Refused):
                    await self.end(held.record.checkpoint, checkpoint.given_up(held.record))

        self.nursery.start_soon(expire)

    def resume(self, vm: str) -> StandingCheckpoint:
        """Hold the checkpoint again that a backup of this VM left standing. Raises Refused."""
        for held in self.held.values():
            if held.record.vm != vm or held.record.held_by != "backup" or not held.record.is_standing:
                continue
            if held.invalid or held.incomplete:
                raise Refused(
                    f"checkpoint {held.record.checkpoint} of {vm} is no longer good; back up again without"
                    " --resume"
                )
            if held.idle is None:
                raise Refused(f"checkpoint {held.record.checkpoint} of {vm} is held by a backup that runs")
            held.idle = None
            return StandingCheckpoint(self, held)
        raise Refused(
            f"no interrupted backup of {vm} stands here (it does for checkpoint_resume_timeout): back up"
            " again without --resume; the changes are still tracked"
        )

    async def end_held(self, held: Held, outcome: Outcome) -> None:
        """Raises OSError: then its frozen view has ended all the same, so that its space comes back (B2)."""
        async with held.lock:
            if held.record.state == "preparing":
                raise Refused(f"checkpoint {held.record.checkpoint} is still beginning")
            try:
                if held.record.state != "ending" or held.record.outcome != outcome:
                    await self.persist(held, checkpoint.advance(held.record, "end", outcome))
            except OSError:
                with trio.move_on_after(_UNDO_SECONDS, shield=True):
                    await self._flag(held)
                raise
            finally:
                if held.invalid or not held.record.is_standing:
                    self.start_merging(held, "the checkpoint has ended")
        await self.settle_points(held)

    async def settle(self, vm: str, point: str, *, committed: bool) -> None:
        """FrozenVm.settle. Raises Refused for a point that is not pending."""
        for held in self.held.values():
            if held.record.point == point and held.record.vm == vm and held.record.is_pending:
                break
        else:
            raise Refused(f"point {point} of VM {vm} is not pending")
        outcome: Outcome = "keep" if committed else "discard"
        try:
            async with held.lock:
                await self.persist(held, checkpoint.advance(held.record, "settle", outcome))
            await self.insist(held, partial(self.settle_points, held))
        except OSError as error:
            raise Refused(f"the word on point {point} cannot be recorded: {error}") from error

    async def insist(self, held: Held, action: Action) -> None:
        def is_hopeless() -> bool:
            return held.lost is not None or any(
                image.image.failure is not None for image in held.images.values()
            )

        await self._insistence.do(held.record.checkpoint, action, is_hopeless)

    async def settle_points(self, held: Held) -> None:
        """Carry the outcome out on every image's points; done again after a crash."""
        record = held.record
        if held.incomplete:
            return
        for image in held.images.values():
            with contextlib.suppress(NoSuchPoint):  # deleted by hand, or of a generation that has ended
                if record.outcome == "keep":
                    await image.image.validate_point(record.point)
                elif record.outcome == "discard":
                    await image.image.delete_point(record.point)
        async with held.lock:
            if held.record.state == "ending":
                await self.persist(held, checkpoint.advance(held.record, "points_settled"))
                log.info("checkpoint.ended", checkpoint=record.checkpoint, outcome=record.outcome)
        with contextlib.suppress(OSError):
            await self.insist(held, partial(self.finish, held))

    async def finish(self, held: Held) -> None:
        """Where nothing is left to merge, the record is: gone, or pending."""
        async with held.lock:
            if held.record.state != "merging" or held.merging or held.incomplete or held.lost is not None:
                return
            merged = checkpoint.advance(held.record, "merged")
            await self.persist(held, merged)
            if merged.state == "gone":
                held.files.close()
                del self.held[held.record.checkpoint]
                with contextlib.suppress(OSError):
                    (self.directory / held.record.checkpoint).rmdir()
        self._notify()

    async def persist(self, held: Held, record: Record) -> None:
        """Raises OSError. Nobody but this and ``finish`` changes a record."""
        held.require_ours()
        with trio.CancelScope(shield=True):  # one small file: a half-told change is worse than the wait
            await held.files.run(checkpoint.persist(record))
        held.record = record

    # --- start and stop --------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of the records' files; the last thing at a stop."""
        for held in self.held.values():
            held.files.close()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

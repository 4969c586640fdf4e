"""An open image: its files, its tracking, and the gate that every writer passes.

``layer`` is where I/O goes: the raw file, or while a checkpoint stands an overlay. What a write does, in
which order, is told in writer.py; what tracking does in core/tracker.py; how a point is cut in cut.py.

Turns, always taken in this order: flush (RCT), catalogue (points), commit (MRT). A failed sync is final: the
image answers EIO until it is reopened, and its regions stay open.
"""

import contextlib
import errno
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final, TypeAlias, TypeVar
from uuid import UUID, uuid4

import numpy as np
import structlog
import trio
from numpy.typing import NDArray

from daemonkit.errors import InvariantBroken
from daemonkit.units import SECOND
from diskd.core import interval, mrt, points
from diskd.core.changes import report
from diskd.core.extents import copy_pages
from diskd.core.geometry import BLOCK_BYTES_DEFAULT, REGION_BYTES_DEFAULT, Geometry, Identity
from diskd.core.points import Catalogue, Point, Segment, Span
from diskd.core.ports import ChangeReport, Layer
from diskd.core.statistics import IoCounts
from diskd.core.steps import Script
from diskd.core.tracker import Tracker, commit, flush, next_header, remove_segment, replace_catalogue
from diskd.core.tracker import join_segments as join_script
from diskd.errors import Damaged, Refused
from diskd.shell.cut import Cut
from diskd.shell.image_files import (
    OpenFiles,
    create_blocking,
    open_blocking,
    read_interval_blocking,
    settled_facts,
)
from diskd.shell.image_settings import ImageSettings
from diskd.shell.raw_layer import RawLayer, now_ns
from diskd.shell.writer import Writer

__all__ = ["Image", "ImageSettings", "Writer"]

T = TypeVar("T")
_Used: TypeAlias = tuple[memoryview, NDArray[np.int64]]  # a bitmap, and the pages of it that count
log = structlog.get_logger("image")

# A close flushes until every region is closed; one round per flush that was on its way, and one more.
_CLOSE_ROUNDS_MAX: Final = 4
_CLOSE_SECONDS_MAX: Final = 60


class Image:
    """Everything about one open image. Use it from the loop's thread; ``*_blocking`` from a worker thread."""

    def __init__(self, opened: OpenFiles) -> None:
        identity, recovered, settings = opened.identity, opened.recovered, opened.settings
        self.name = opened.directory.name
        self.directory = opened.directory
        self.identity = identity
        self.uuid = identity.uuid
        self.size_bytes = identity.geometry.size_bytes
        self.block_bytes = identity.geometry.block_bytes
        self.settings = settings
        self.files = opened.files
        self.clock: Callable[[], int] = now_ns  # by which the MRT is stamped
        self.shared = opened.shared
        self.opened_how = recovered.how
        self.opened_reason = recovered.reason
        self.tracker = Tracker(
            identity,
            recovered,
            max_open_bytes=settings.max_open_bytes,
            mark_ahead_bytes_max=settings.mark_ahead_bytes_max,
        )
        # Recovery compares the stamp with the file's times, give or take one interval.
        slack_ns = settings.tracking_flush_interval_ns // 4
        self.raw = RawLayer(self.files, self.size_bytes, self._note_write, slack_ns=slack_ns)
        self.layer: Layer = self.raw
        self.failure: str | None = None
        self.is_closed = False
        self.is_held = False
        self.last_io: float | None = None
        self.counts = IoCounts()
        self.writes = 0
        self.flush_turn = trio.Lock()
        self.catalogue_turn = trio.Lock()
        self.commit_turn = trio.Lock()
        self._room_turn = trio.Lock()
        self._holds = 0
        self.zeroes_are_held = False
        self.zeroings = 0
        self._zero_holds = 0
        self._zeroes_unheld = trio.Event()
        self._zeroes_quiet = trio.Event()
        self._unheld = trio.Event()
        self._quiet = trio.Event()
        self._cut = Cut(self)

    # --- life --------------------------------------------------------------------------------------

    @classmethod
    async def create(
        cls,
        directory: Path,
        size_bytes: int,
        *,
        block_bytes: int = BLOCK_BYTES_DEFAULT,
        region_bytes: int = REGION_BYTES_DEFAULT,
        uuid: UUID | None = None,
    ) -> UUID:
        """Make the files of a new, empty image in ``directory`` (created; must not exist). ``image.toml`` is
        written last: without it there is no image. Raises Refused for impossible sizes, OSError."""
        geometry = Geometry.check(size_bytes, block_bytes, region_bytes)
        identity = Identity(uuid or uuid4(), geometry)
        await trio.to_thread.run_sync(create_blocking, directory, identity)
        return identity.uuid

    @classmethod
    async def open(cls, directory: Path, settings: ImageSettings) -> "Image":
        """Lock, recover tracking, and be ready. Raises Refused (in use, no shared memory) or Damaged.

        The image's name is the directory's. ``layer`` is ``raw``: whoever finds a checkpoint replaces it
        before the first writer opens. Start ``run`` in a nursery afterwards.
        """
        image = cls(await trio.to_thread.run_sync(open_blocking, directory, settings))
        log.info("image.opened", image=image.name, how=image.opened_how, reason=image.opened_reason)
        return image

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Flush tracking every ``tracking_flush_interval`` until cancelled, closed or failed."""
        task_status.started()
        while True:
            await trio.sleep(self.settings.tracking_flush_interval_ns / SECOND)
            if self.is_closed or self.failure is not None:
                return
            try:
                await self.flush_tracking()
            except OSError as error:
                if not self.is_closed:
                    log.warning("image.tracking_flush_failed", image=self.name, reason=str(error))
                return

    async def close(self) -> None:
        """A clean stop: everything durable, every region closed, the shared bitmap removed (T3).

        After a failure nothing is recorded: the next opening recovers as after a crash of the daemon.
        Idempotent. Raises OSError where the last sync fails; the files are closed all the same.
        """
        if self.is_closed:
            return
        self.is_closed = True
        with trio.CancelScope(shield=True):
            try:
                if self.failure is None:
                    async with self.held():
                        await self._close_cleanly()
                        # A write that the hold kept waiting finds this, and nothing is open any more (T1).
                        self.failure = "the image is closed"
            finally:
                with trio.move_on_after(_CLOSE_SECONDS_MAX, shield=True):
                    await self.layer.close()
                with trio.move_on_after(_CLOSE_SECONDS_MAX, shield=True) as scope:
                    await self.abandon_in_turn(self.abandon)
            if scope.cancelled_caught:
                raise OSError(errno.ETIMEDOUT, "a change of the image's files does not end")

    async def _close_cleanly(self) -> None:
        await self._cut.cancel()
        await self.sync_layer()
        for _ in range(_CLOSE_ROUNDS_MAX):
            await self.flush_tracking()
            if self.tracker.is_settled:
                break
        facts = await trio.to_thread.run_sync(settled_facts, self.files)
        nonce = self.tracker.area.nonce
        async with self.commit_turn:
            header = next_header(
                self.tracker,
                clean=self.tracker.is_settled,
                nonce=mrt.NO_NONCE,
                next_nonce=mrt.NO_NONCE,
                root_sequence=self.tracker.root.sequence,
                time_ns=now_ns(),
                raw=facts,
            )
            await self.perform(mrt.write_header(self.identity, header, now_ns()))
            self.tracker.header = header
        self.shared.remove(nonce)

    async def abandon_in_turn(self, abandon: Callable[[], None]) -> None:
        """Call ``abandon`` when no change of the image's files is under way. Those that waited for their turn
        find the files closed: from here on they may be another daemon's."""
        async with contextlib.AsyncExitStack() as stack:
            try:
                for turn in (self.flush_turn, self.catalogue_turn, self.commit_turn):
                    await stack.enter_async_context(turn)
            finally:
                abandon()

    def abandon(self) -> None:
        """Let go of files and memory as a killed daemon does: nothing is recorded."""
        self.is_closed = True
        self.failure = self.failure or "the image is closed"
        self.tracker.release()
        self.shared.close()
        self.files.close()

    # --- access ------------------------------------------------------------------------------------

    def open_writer(self, check: Callable[[], None]) -> Writer:
        """Access under one epoch. ``check`` raises Fenced."""
        return Writer(self, check)

    async def drain(self, writer: Writer) -> None:
        """Return when no call of ``writer`` is submitted any more."""
        while writer.submitted:
            # Several may wait: an event that somebody waits on already is never replaced.
            if writer.idle is None or writer.idle.is_set():
                writer.idle = trio.Event()
            await writer.idle.wait()

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """New writes of every writer wait; entered when those submitted are done. Keep it short.

        Punching a large range can take seconds, so first of all no further range is zeroed, and writes go on
        until those under way are: then what is waited for while writes are held is short.
        """
        async with self._zeroes_held():
            self._holds += 1
            if not self.is_held:
                self.is_held, self._unheld = True, trio.Event()
            try:
                while self.writes:
                    if self._quiet.is_set():
                        self._quiet = trio.Event()
                    await self._quiet.wait()
                yield
            finally:
                self._holds -= 1
                if not self._holds:
                    self.is_held = False
                    self._unheld.set()

    @contextlib.asynccontextmanager
    async def _zeroes_held(self) -> AsyncIterator[None]:
        self._zero_holds += 1
        if not self.zeroes_are_held:
            self.zeroes_are_held, self._zeroes_unheld = True, trio.Event()
        try:
            while self.zeroings:
                if self._zeroes_quiet.is_set():
                    self._zeroes_quiet = trio.Event()
                await self._zeroes_quiet.wait()
            yield
        finally:
            self._zero_holds -= 1
            if not self._zero_holds:
                self.zeroes_are_held = False
                self._zeroes_unheld.set()

    async def wait_zeroes_unheld(self) -> None:
        """As ``wait_unheld``, for whoever zeroes a range."""
        await self._zeroes_unheld.wait()

    def zeroing_done(self) -> None:
        """A part of a range has been zeroed."""
        if not self.zeroings:
            self._zeroes_quiet.set()

    async def wait_unheld(self) -> None:
        """Return when no hold is in force, or was not a moment ago: look again."""
        await self._unheld.wait()

    def write_done(self) -> None:
        """A submitted write has ended."""
        if not self.writes:
            self._quiet.set()

    def last_io_ns(self) -> int | None:
        """trio's clock (ns) at the last call of any writer, or None: evidence of life."""
        return None if self.last_io is None else int(self.last_io * SECOND)

    async def flush(self) -> None:
        """As a guest's FLUSH; a failure is final."""
        self.require_working()
        await self.sync_layer()

    async def sync_layer(self) -> None:
        """``layer.flush()``; a failure is final."""
        try:
            await self.layer.flush()
        except OSError as error:
            self.fail(f"a flush failed: {error.strerror or error}")
            raise
        self.require_working()

    def resized(self, identity: Identity) -> None:
        """Its files have this size now (shell.resizing). Connected clients keep the size they were told."""
        self.identity = identity
        self.size_bytes = self.raw.size_bytes = identity.geometry.size_bytes

    def fail(self, reason: str) -> None:
        """A sync failed: everything answers EIO until the image is reopened."""
        if self.failure is None:
            self.failure = reason
            log.error("image.failed", image=self.name, reason=reason)

    def require_working(self) -> None:
        """Raises EIO after a failure."""
        if self.failure is not None:
            raise OSError(errno.EIO, f"{self.name}: {self.failure}; reopen the image")

    # --- tracking ----------------------------------------------------------------------------------

    async def perform(self, script: Script[T], *, refusable: bool = False) -> T:
        """Run a script on the image's files, to its end. A failure is final, except, where ``refusable``, a
        lack of space (nothing was changed then)."""
        began_ns = self.clock()
        try:
            with trio.CancelScope(shield=True):
                result = await self.files.run(script)
                if mrt.has_outlived_stamp(began_ns, self.clock()):
                    await self.files.run(mrt.stamp(self.identity, self.clock()))
                return result
        except OSError as error:
            if not (refusable and error.errno in (errno.ENOSPC, errno.EDQUOT)):
                self.fail(f"tracking could not be made durable: {error.strerror or error}")
            raise
        raise InvariantBroken("a shielded script was cancelled")

    async def open_regions(self, offset: int, length: int) -> None:
        """Make every region of a range durably open, together with whoever else waits for that (T1).

        Returns in the step in which they are; look again, another step may have closed them.
        """
        while closed := self.tracker.closed_regions(offset, length):
            self.tracker.want(closed)
            if not self.tracker.has_room(len(closed)):
                await self._make_room(len(closed))
                continue
            async with self.commit_turn:
                self.require_working()
                if closed := self.tracker.closed_regions(offset, length):
                    self.tracker.want(closed)
                    await self._commit()
            return

    async def _make_room(self, count: int) -> None:
        """At the bound on open regions: close what nobody marked lately. One flush serves all who wait."""
        async with self._room_turn:
            if not self.tracker.has_room(count):
                await self.flush_tracking()

    async def flush_tracking(self) -> None:
        """Make the active bitmap durable and close what can be closed (also done by ``run``). While a cut is
        between freeze and persist, it waits for that."""
        while True:
            await self._cut.wait_thawed()
            async with self.flush_turn:
                self.require_working()
                begun = self.tracker.begin_flush()
                if begun is None:
                    continue
                root = await self.perform(flush(self.tracker, begun))
                self.tracker.end_flush(begun, root)
                async with self.commit_turn:
                    await self._commit()
                return

    async def _commit(self) -> None:
        begun = self.tracker.begin_commit(self.clock(), may_be_written=self.layer is not self.raw)
        if begun is not None:
            await self.perform(commit(self.tracker, begun))
            self.tracker.end_commit(begun)
            self.counts.marks += 1
            self.counts.regions_opened += len(begun.opening)

    def _note_write(self) -> None:
        self.tracker.area.time_ns = now_ns()

    # --- points ------------------------------------------------------------------------------------

    # Cutting a point: prepare_cut (before the hold), freeze (under the hold, memory only), persist_cut (after
    # the hold), then validate_point or delete_point. A cut that was not persisted never happened.

    async def prepare_cut(self) -> None:
        """Allocate and register the next bitmap. Raises Refused (no shared memory, too many points)."""
        await self._cut.prepare()

    def freeze(self, point: str) -> None:
        """Under ``held()``, after prepare_cut: the active bitmap becomes the interval before ``point``."""
        if not self.is_held or self.writes:
            raise Refused(f"{self.name}: a point is cut only while writes are held")
        self._cut.freeze(point)

    async def cancel_cut(self) -> None:
        """After prepare_cut, frozen or not: as if the cut had not been tried. Idempotent. (Once persisted, it
        is a point like any other: delete_point.)"""
        await self._cut.cancel()

    async def persist_cut(self) -> None:
        """Make the frozen interval durable, fdatasync the raw file, record the point as pending (T2).

        Raises OSError (ENOSPC: cancel_cut then takes everything back; anything else fails the image)."""
        await self._cut.persist()
        await self.join_segments()

    async def validate_point(self, point: str) -> None:
        """pending -> valid, durably. Raises NoSuchPoint."""
        async with self.catalogue_turn:
            catalogue = points.validate(self.tracker.catalogue, point)
            await self.perform(replace_catalogue(self.identity, catalogue), refusable=True)
            self.tracker.catalogue = catalogue

    async def delete_point(self, point: str) -> None:
        """Forget a point in any state, durably; the intervals on both sides join. Unknown is fine."""
        async with self.catalogue_turn:
            before = self.tracker.catalogue
            catalogue = points.delete(before, point)
            if catalogue == before:
                return
            await self.perform(replace_catalogue(self.identity, catalogue), refusable=True)
            self.tracker.catalogue = catalogue
            for segment in before.segments:
                if segment not in catalogue.segments:
                    await self.perform(remove_segment(segment))
        await self.join_segments()

    async def join_segments(self) -> None:
        """Join interval files that no point separates any more. Only saves space: done later if it fails."""
        tracker, damaged = self.tracker, list[tuple[Segment, Segment]]()
        async with self.catalogue_turn:
            while (pair := points.joinable(tracker.catalogue, but_not=damaged)) is not None:
                try:
                    script = join_script(self.identity, tracker.generation, tracker.catalogue, pair)
                    tracker.catalogue = await self.perform(script, refusable=True)
                    await self.perform(remove_segment(pair[1]), refusable=True)
                except Damaged as error:
                    damaged.append(pair)
                    log.warning("image.interval_damaged", image=self.name, reason=str(error))
                except OSError as error:
                    log.warning("image.join_failed", image=self.name, reason=str(error))
                    self.require_working()
                    return

    def points(self) -> list[Point]:
        """All points, oldest first: id, rct_id, state (pending, valid, invalid), reason, size_bytes."""
        return list(self.tracker.catalogue.points)

    async def changes(self, point: str) -> ChangeReport:
        """``changes_since`` up to now, for the loop: reading and uniting large bitmaps goes by thread."""
        while True:
            catalogue = self.tracker.catalogue
            span = points.span(catalogue, point)
            active, over = self._active()
            try:
                # Blocks marked meanwhile may be in the answer or not: they changed after the question.
                return await trio.to_thread.run_sync(self._report, span, active, over)
            except Damaged as error:
                self._raise_unless_moved(point, catalogue, error)

    def changes_since(self, point: str, *, until: str | None = None) -> ChangeReport:
        """The changes between two points, or (from the loop's thread only) between a point and now.

        Reads side files. Raises NoSuchPoint with the reason and the remedy (T4). ``until`` may be pending,
        ``point`` must be valid."""
        while True:
            catalogue = self.tracker.catalogue
            span = points.span(catalogue, point, until)
            active, over = self._active() if span.with_active else ([], 0)
            try:
                return self._report(span, active, over)
            except Damaged as error:
                self._raise_unless_moved(point, catalogue, error)

    def _active(self) -> tuple[list[_Used], int]:
        """What has no file yet, to be copied, and its over-report. The views keep the memory there."""
        used = self.tracker.used_pages()
        over = sum(area.over_report_bytes for area, _ in used)
        return [(area.bits[:], pages) for area, pages in used], over

    def _report(self, span: Span, active: list[_Used], over: int) -> ChangeReport:
        page_bytes = self.identity.geometry.page_bytes
        mine = self.directory, self.identity, self.tracker.generation
        found = [read_interval_blocking(*mine, segment) for segment in span.segments]
        found += [copy_pages(bits, page_bytes, pages) for bits, pages in active]
        return report(self.identity.geometry, span, interval.unite(found), active_over_report_bytes=over)

    def _raise_unless_moved(self, point: str, catalogue: Catalogue, error: Damaged) -> None:
        """Joined or deleted while we read: then the new catalogue knows where the bits are now."""
        if self.tracker.catalogue is catalogue:
            raise points.damaged(point, str(error)) from error

"""The tracking of one open image, in memory: marks, open regions, and what must become durable when.

A region's life (T1; ``open`` in memory implies ``open`` in the MRT on disk):

    closed --want, commit--> open --mark--> changed --flush copies its page--> open --end_flush--> closing
       ^                                                                                              |
       +------------------------------------------ commit --------------------------------------------+

``admit`` is the only way to mark: it refuses while a region is not open, and marks where all are. So the
caller that submits data right after it can not get the order wrong. A region closes only if no new mark was
made in it since its page was copied; it is closed in memory before the closing record is submitted. There
is one commit (MRT) and one flush (RCT) at a time; a wish joins only a commit that has not begun.

Between ``freeze`` and the end of the cut no flush begins: the RCT still holds the frozen interval.
Whatever is marked meanwhile lies in regions that stay open.
"""

import itertools
from typing import Any, Final
from uuid import UUID

import attrs
import numpy as np
from numpy.typing import NDArray

from daemonkit.errors import InvariantBroken
from diskd.core import interval as interval_file
from diskd.core import mrt, points, rct
from diskd.core.extents import PageMap, copy_pages, page_map, set_range, union_in_place
from diskd.core.geometry import Identity
from diskd.core.mark_ahead import MarkAhead
from diskd.core.points import Catalogue, Segment
from diskd.core.recovery import Recovered
from diskd.core.shared import SharedArea
from diskd.core.steps import Remove, Replace, Script

# How far regions are opened ahead of a sequential stream: so much more may a power loss then over-report.
MARK_AHEAD_BYTES_MAX: Final = 64 << 20
# One request touches at most this much, so that it fits below any allowed bound on open regions.
REQUEST_BYTES_MAX: Final = 64 << 20


@attrs.frozen
class Commit:
    """One write of MRT records: what it opens, and the records over all that is open or closed by then.
    ``stamp_ns``: the time to stamp it with first, where the last stamp does not hold any more."""

    opening: list[int]
    records: list[mrt.Record]
    stamp_ns: int | None


@attrs.frozen(eq=False)
class Flush:
    """Pages of the active bitmap as copied, and the regions that were open at that moment."""

    pages: PageMap
    root: rct.Root
    open_regions: bytes
    is_needed: bool


@attrs.frozen(eq=False)
class Frozen:
    """The interval that a cut has ended, until it has been persisted."""

    point: str
    area: SharedArea
    dirty: bytearray


class Tracker:
    """Made from what recovery found. Everything here is synchronous and happens in one step of the loop."""

    def __init__(
        self,
        identity: Identity,
        recovered: Recovered,
        *,
        max_open_bytes: int,
        mark_ahead_bytes_max: int = MARK_AHEAD_BYTES_MAX,
    ) -> None:
        self._max_open_bytes = max_open_bytes
        self._mark_ahead_bytes_max = mark_ahead_bytes_max
        self._begin(identity, recovered)

    def _begin(self, identity: Identity, recovered: Recovered) -> None:
        geometry = identity.geometry
        self.identity = identity
        self.generation: UUID = recovered.header.generation
        self.area = recovered.area
        self.root = recovered.root
        self.header = recovered.header
        self.catalogue = recovered.catalogue
        self.frozen: Frozen | None = None
        self.prepared: SharedArea | None = None
        self._limit = self._max_open_bytes // geometry.region_bytes
        self._region_shift = geometry.region_shift
        self._block_shift = geometry.block_shift
        self._page_shift = geometry.block_shift + (8 * geometry.page_bytes).bit_length() - 1
        self._open = bytearray(recovered.open_regions)
        self._durable_open = bytearray(recovered.open_regions)
        self._durable_count = sum(recovered.open_regions)
        self._changed = bytearray(geometry.region_count)
        self._dirty = bytearray(recovered.dirty)
        # In the order of asking, so that at the bound the first to wait is the first to go on.
        self._wanted: dict[int, None] = {}
        self._ahead: dict[int, None] = {}
        self._mark_ahead = MarkAhead(geometry.region_count, self._mark_ahead_bytes_max >> self._region_shift)
        self._closing: set[int] = set()
        self._committing: Commit | None = None
        self._flushing: Flush | None = None
        self._stamped_ns = recovered.header.time_ns
        self._mrt_stamped_ns = 0

    # --- marks (T1) --------------------------------------------------------------------------------

    def admit(self, offset: int, length: int) -> bool:
        """Mark a range that is about to be written: True, and only then submit it, in the same step.

        False: some region of it is closed; ``want`` it, commit, and ask again.
        """
        block, end = offset >> self._block_shift, offset + length - 1
        first = offset >> self._region_shift
        if (
            self._open[first]
            and self.area.bits[block >> 3] >> (block & 7) & 1
            and block == end >> self._block_shift
        ):
            return True  # what most writes find: one block, marked already
        last = end >> self._region_shift
        if self._open.find(0, first, last + 1) >= 0:
            return False
        if set_range(self.area.bits, block, (end >> self._block_shift) + 1):
            for region in range(first, last + 1):
                self._changed[region] = 1
            for page in range(offset >> self._page_shift, (end >> self._page_shift) + 1):
                self._dirty[page] = 1
        return True

    def closed_regions(self, offset: int, length: int) -> list[int]:
        """The regions of a range that must be opened before it is admitted."""
        first, last = offset >> self._region_shift, (offset + length - 1) >> self._region_shift
        return [region for region in range(first, last + 1) if not self._open[region]]

    def has_room(self, count: int) -> bool:
        """Whether so many more regions may be open. If not, flush first."""
        return self.open_count + count <= self._limit

    @property
    def open_count(self) -> int:
        """Regions that are, or after the next commit will be, open on disk."""
        return self._durable_count - len(self._closing)

    @property
    def open_bytes(self) -> int:
        return self.open_count * self.identity.geometry.region_bytes

    # --- MRT ---------------------------------------------------------------------------------------

    def want(self, regions: list[int]) -> None:
        """Let the next commit open these (those for which there is no room, one after the next flush),
        and what a sequential stream will touch next."""
        self._wanted.update(dict.fromkeys(regions))
        ahead = self._mark_ahead.touched(regions[0], regions[-1])
        self._ahead.update(dict.fromkeys(ahead))

    def begin_commit(self, now_ns: int, *, may_be_written: bool = False) -> Commit | None:
        """The records to write now, or None where nothing is left to do. Then ``end_commit``.

        What it closes makes room for the next commit, not for itself: a power loss may keep of its records
        those that open and lose those that close, and the bound holds then, too (T3).

        ``may_be_written``: the raw file may be written at any moment without a region being opened first, as
        a merge does. So it is said now, or the write would be taken for one from outside (T4).
        """
        if self._committing is not None:
            raise InvariantBroken("two commits of the MRT at once")
        opening = self._choose()
        touched = {region // mrt.REGIONS_PER_RECORD for region in itertools.chain(self._closing, opening)}
        is_announced = bool(opening) or may_be_written
        time_ns = max(now_ns, self.area.time_ns) if is_announced else self.area.time_ns
        if time_ns > self._stamped_ns and not touched:
            touched.add(0)
        if not touched:
            return None
        for region in self._closing:
            self._durable_open[region] = 0
        for region in opening:
            self._durable_open[region] = 1
        self._durable_count += len(opening) - len(self._closing)
        self._closing.clear()
        self._stamped_ns = time_ns
        records = [
            mrt.pack_record(index, self._durable_open, self.root.sequence, time_ns)
            for index in sorted(touched)
        ]
        stamp_ns = None
        if not self._mrt_stamped_ns <= now_ns <= self._mrt_stamped_ns + mrt.STAMP_NS // 2:
            stamp_ns = self._mrt_stamped_ns = now_ns
        self._committing = Commit(opening, records, stamp_ns)
        return self._committing

    def _choose(self) -> list[int]:
        """What the next commit opens, within the bound. What is open on disk still is open again at once."""
        opening: dict[int, None] = {}
        waiting: dict[int, None] = {}
        for region in self._wanted:
            if self._durable_open[region]:
                # Its closing record was not submitted, and now never will be.
                self._closing.discard(region)
                self._open[region] = 1
            elif self._durable_count + len(opening) < self._limit:
                opening[region] = None
            else:
                waiting[region] = None
        # What nobody needs yet leaves half of the room to those who do.
        for region in self._ahead:
            if self._durable_count + len(opening) >= self._limit // 2:
                break
            if not self._durable_open[region]:
                opening[region] = None
        self._wanted, self._ahead = waiting, {}
        return list(opening)

    def end_commit(self, commit: Commit) -> None:
        """The records are durable: what they open is open."""
        if commit is not self._committing:
            raise InvariantBroken("the end of a commit that did not begin")
        self._committing = None
        for region in commit.opening:
            self._open[region] = 1

    # --- RCT ---------------------------------------------------------------------------------------

    def begin_flush(self) -> Flush | None:
        """Copy the dirty pages; None while a cut is being made. Then store them, and ``end_flush``."""
        if self._flushing is not None:
            raise InvariantBroken("two flushes of the RCT at once")
        if self.frozen is not None:
            return None
        page_bytes = self.identity.geometry.page_bytes
        dirty = np.flatnonzero(np.frombuffer(self._dirty, np.uint8))
        pages = copy_pages(self.area.bits[:], page_bytes, dirty)
        self._dirty = bytearray(len(self._dirty))
        self._changed = bytearray(len(self._changed))
        over = self.area.over_report_bytes
        root = attrs.evolve(
            self.root,
            interval=self.area.interval,
            over_report_bytes=over,
            header_sequence=self.header.sequence,
        )
        needed = bool(pages) or root.interval != self.root.interval or over != self.root.over_report_bytes
        self._flushing = Flush(pages, root, bytes(self._open), needed)
        return self._flushing

    def end_flush(self, flush: Flush, root: rct.Root) -> None:
        """The copied pages are durable under ``root``: close, in memory, what got no new mark since."""
        if flush is not self._flushing:
            raise InvariantBroken("the end of a flush that did not begin")
        self._flushing = None
        self.root = root
        region = flush.open_regions.find(1)
        while region >= 0:
            if self._open[region] and not self._changed[region]:
                self._open[region] = 0
                self._closing.add(region)
            region = flush.open_regions.find(1, region + 1)

    def used_pages(self) -> list[tuple[SharedArea, NDArray[np.int64]]]:
        """Every bitmap that has no file yet, with the pages of it in which a bit may be set. Answering costs
        what was changed, not what the image's size is."""
        areas = [(self.area, self._dirty)]
        if self.frozen is not None:
            areas.append((self.frozen.area, self.frozen.dirty))
        found: list[tuple[SharedArea, NDArray[np.int64]]] = []
        for area, dirty in areas:
            used = np.frombuffer(bytes(dirty), np.bool_).copy()
            if self.root.interval == area.interval:
                used |= np.frombuffer(self.root.slots, np.uint8) != rct.ZERO
            if self._flushing is not None and self._flushing.root.interval == area.interval:
                used[list(self._flushing.pages)] = True
            found.append((area, np.flatnonzero(used)))
        return found

    @property
    def is_settled(self) -> bool:
        """Every mark is durable and every region closed on disk: a clean close may be recorded."""
        return not self._durable_count and not any(self._dirty) and self.frozen is None

    # --- cuts --------------------------------------------------------------------------------------

    def prepare(self, area: SharedArea, header: mrt.Header) -> None:
        """``area`` is registered durably (``header``): the next freeze may switch to it."""
        self.prepared, self.header = area, header

    def freeze(self, point: str) -> None:
        """In memory only: the active interval ends here, the prepared one begins (B1)."""
        if self.prepared is None or self.frozen is not None:
            raise InvariantBroken("a freeze without a prepared bitmap")
        points.check_cut(self.catalogue, point)
        self.frozen = Frozen(point, self.area, self._dirty)
        self.prepared.time_ns = self.area.time_ns
        self.area, self.prepared = self.prepared, None
        # ``changed`` stays as it is: what is not yet durable of the frozen interval keeps its region open.
        self._dirty = bytearray(len(self._dirty))

    def unfreeze(self) -> SharedArea:
        """As if there had been no freeze: both bitmaps joined in the older one. Returns the other one."""
        if self.frozen is None:
            raise InvariantBroken("nothing is frozen")
        area, frozen, page_bytes = self.area, self.frozen, self.identity.geometry.page_bytes
        union_in_place(frozen.area.bits, area.bits)
        for page in page_map(area.bits, page_bytes):
            frozen.dirty[page] = 1
        frozen.area.time_ns = area.time_ns
        self.area, self._dirty, self.frozen = frozen.area, frozen.dirty, None
        return area

    def persisted(self, catalogue: Catalogue, root: rct.Root, header: mrt.Header) -> SharedArea:
        """The cut is durable. Returns the area of the frozen interval, which is no longer needed."""
        if self.frozen is None:
            raise InvariantBroken("nothing is frozen")
        area, self.frozen = self.frozen.area, None
        self.catalogue, self.root, self.header = catalogue, root, header
        return area

    def resized(self, identity: Identity, recovered: Recovered) -> SharedArea:
        """The image has grown, durably, with nothing under way. Returns the area of the ended interval."""
        if self.frozen is not None or self.prepared is not None or self._committing or self._flushing:
            raise InvariantBroken("a resize in the middle of a cut, a commit or a flush")
        area = self.area
        self._begin(identity, recovered)
        return area

    def release(self) -> None:
        """Let go of the shared memory: nothing can be admitted any more."""
        for area in (self.area, self.prepared, self.frozen.area if self.frozen else None):
            if area is not None:
                area.release()


def flush(tracker: Tracker, begun: Flush) -> Script[rct.Root]:
    """Store a begun flush; the root that is durable afterwards."""
    if not begun.is_needed:
        return tracker.root
    return (yield from rct.store(tracker.identity, begun.root, begun.pages))


def commit(tracker: Tracker, begun: Commit) -> Script[None]:
    """Write a begun commit."""
    if begun.stamp_ns is not None:
        yield from mrt.stamp(tracker.identity, begun.stamp_ns)
    yield from mrt.write_records(tracker.generation, begun.records)


def next_header(tracker: Tracker, **changes: Any) -> mrt.Header:
    """The header that follows the tracker's."""
    header = tracker.header
    return attrs.evolve(header, sequence=header.sequence + 1, **changes)


def store_interval(tracker: Tracker, area: SharedArea, catalogue: Catalogue) -> Script[None]:
    """Make an ended interval durable in a file of its own, if ``catalogue`` (from after its end) needs it."""
    number = area.interval
    if any(segment.interval == number for segment in catalogue.segments):
        pages = page_map(area.bits, tracker.identity.geometry.page_bytes)
        data = interval_file.encode(tracker.identity, tracker.generation, number, pages, through=number)
        yield Replace(interval_file.file_name(number), data)


def switch_interval(
    tracker: Tracker, catalogue: Catalogue, header: mrt.Header, now_ns: int
) -> Script[rct.Root]:
    """After the catalogue with the cut was replaced, which is the cut's durable instant: begin the next
    interval in the RCT and name its bitmap in the MRT. Recovery does the same where a crash comes between."""
    stored = yield from rct.restart(
        tracker.identity,
        tracker.root,
        interval=catalogue.active,
        header_sequence=tracker.header.sequence,
    )
    yield from mrt.write_header(tracker.identity, header, now_ns)
    return stored


def replace_catalogue(identity: Identity, catalogue: Catalogue) -> Script[None]:
    """Durable; the old one or the new one after a crash."""
    yield Replace(points.FILE, points.encode_catalogue(identity, catalogue))


def join_segments(
    identity: Identity, generation: UUID, catalogue: Catalogue, pair: tuple[Segment, Segment]
) -> Script[Catalogue]:
    """Join one pair (``points.joinable``) of interval files; any crash on the way is harmless.

    The left file takes the right one's bits first: until the catalogue forgets the right one, both are
    united anyway, since no point separates them. The right one's file is removed by the caller, once it has
    taken over the catalogue: a failure there must not leave it with an older one than the disk's.
    """
    left, right = pair
    pages = interval_file.unite(
        [
            (yield from interval_file.load(identity, generation, left)),
            (yield from interval_file.load(identity, generation, right)),
        ]
    )
    name = interval_file.file_name(left.interval)
    data = interval_file.encode(identity, generation, left.interval, pages, through=right.through)
    yield Replace(name, data)
    catalogue = points.joined(catalogue, left, right)
    yield from replace_catalogue(identity, catalogue)
    return catalogue


def remove_segment(segment: Segment) -> Script[None]:
    """The file of a closed interval that no catalogue knows any more."""
    yield Remove(interval_file.file_name(segment.interval))

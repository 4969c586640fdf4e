"""Opening an image: what the side files, the raw file and the shared bitmap say about the changes.

    clean          the header says so and the raw file looks as it did then: exact
    daemon_crash   same boot, and the shared bitmap of the header's nonce is there: exact
    power_loss     the durable bitmap plus every open region: a superset, bounded (T3)
    resized        a resize was finished (core.resize), nobody had it open since: exact
    new_generation continuity is in doubt (T4): a side file is damaged, missing or foreign, or the raw file
                   was changed outside: every point becomes invalid, the reason is kept with it

Every path is one script that may be interrupted anywhere and run again: nothing that a second run needs
is given up before what replaces it is durable.
"""

from collections.abc import Mapping
from typing import Final, Literal
from uuid import UUID

import attrs

from diskd.core import mrt, points, rct
from diskd.core.extents import PageMap, page_map, set_range, union_in_place
from diskd.core.geometry import Geometry, Identity
from diskd.core.points import Catalogue
from diskd.core.shared import SharedArea, SharedMemory, create_area, open_area
from diskd.core.steps import Read, Replace, Script, Size, Sync
from diskd.errors import Damaged

# How much later than its stamp allows a write of the MRT may reach the file, at worst.
WRITE_NS_MAX: Final = 10 * 10**9

How = Literal["clean", "daemon_crash", "power_loss", "resized", "new_generation"]


@attrs.frozen
class Surroundings:
    """What the shell knows at the opening. ``interval_ns`` is tracking_flush_interval; ``mrt_changed_ns``
    when disk.mrt was changed last as the file system says (its ctime), 0 where it is missing."""

    memory: SharedMemory
    boot_id: UUID
    raw: mrt.RawFacts
    mrt_changed_ns: int
    now_ns: int
    interval_ns: int
    fresh_nonce: bytes
    fresh_generation: UUID


@attrs.frozen(eq=False)
class Recovered:
    """Where tracking goes on. ``dirty``: pages of the area that the RCT does not hold; one byte each."""

    how: How
    reason: str | None
    area: SharedArea
    root: rct.Root
    header: mrt.Header
    catalogue: Catalogue
    open_regions: bytearray
    dirty: bytearray


@attrs.frozen(eq=False)
class _Found:
    """``pages`` are those of the active interval; ``root`` may be one interval behind (a cut was recorded,
    the RCT not yet switched): then the active interval has no durable page so far."""

    header: mrt.Header
    table: mrt.Table
    root: rct.Root
    pages: PageMap
    catalogue: Catalogue


def recover(identity: Identity, around: Surroundings) -> Script[Recovered]:
    """Open an image's tracking. Raises OSError (a file that cannot be read or written, no shared memory)."""
    header: mrt.Header | None = None
    yield from _settle()
    try:
        header = yield from mrt.load_header(identity)
        found = yield from _load(identity, around, header)
        area = _shared(identity, around, found)
        reason = _outside_change(around, found, area)
    except Damaged as error:
        return (yield from _new_generation(identity, around, header, str(error)))
    if reason is not None:
        if area is not None:
            area.release()
        return (yield from _new_generation(identity, around, header, reason))
    if area is not None:
        return (yield from _resume(identity, around, found, area))
    return (yield from _from_disk(identity, around, found))


def _settle() -> Script[None]:
    """Make durable what a crashed daemon left in the page cache. Whatever is read below is relied upon (a
    page is not written again, a region may close), so a later power loss must not take it back."""
    for name in (rct.FILE, mrt.FILE, mrt.STAMP_FILE):
        if (yield Size(name)) is not None:
            yield Sync(name)


def _write_again(identity: Identity, around: Surroundings, found: _Found) -> Script[None]:
    """Where the last opening did not end well, a sync may have failed. Then the system reads back what it was
    to write, and the disk has something older: no further sync mends that, only writing it once more. So it
    goes with the table here, and with the root and the header at both callers. What a root names need not be
    written again: it was synced before the root was written."""
    yield from mrt.stamp(identity, around.now_ns)
    yield from mrt.write_table(found.header.generation, found.table)


def _load(identity: Identity, around: Surroundings, header: mrt.Header) -> Script[_Found]:
    catalogue = yield from load_catalogue(identity)
    root, pages = yield from rct.load(identity)
    if not str(root.generation) == catalogue.generation == str(header.generation):
        raise Damaged("the side files are of different generations")
    table = yield from mrt.load_table(identity, header.generation)
    if root.sequence < max(table.root_sequence, header.root_sequence):
        raise Damaged(f"{rct.FILE} is older than {mrt.FILE} knows it")
    if header.sequence < root.header_sequence:
        raise Damaged(f"{mrt.FILE} is older than {rct.FILE} knows it")
    # Open regions that it does not know are changes that nobody else does after a power loss. Whoever puts an
    # older copy back cannot set the file's ctime back with it.
    stamped_ns = yield from mrt.load_stamp(identity)
    if not header.clean and around.mrt_changed_ns > stamped_ns + WRITE_NS_MAX:
        raise Damaged(f"{mrt.FILE} was put back from an older time, or changed outside diskd")
    behind = catalogue.active - root.interval
    if behind not in (0, 1) or (behind and header.clean):
        raise Damaged(f"{rct.FILE} holds another interval than {points.FILE} says")
    return _Found(header, table, root, {} if behind else pages, catalogue)


def load_catalogue(identity: Identity) -> Script[Catalogue]:
    """Raises Damaged, also where it is missing."""
    size = yield Size(points.FILE)
    if size is None:
        raise Damaged(f"{points.FILE} is missing")
    data = yield Read(points.FILE, 0, points.FILE_BYTES_MAX + 1)
    return points.decode_catalogue(identity, data)


def _shared(identity: Identity, around: Surroundings, found: _Found) -> SharedArea | None:
    """The shared bitmap that holds every mark since the last clean state, both halves of a cut joined."""
    header, active = found.header, found.catalogue.active
    if header.clean or header.boot_id != around.boot_id:
        return None
    areas: dict[int, SharedArea] = {}
    wanted = [nonce for nonce in (header.nonce, header.next_nonce) if nonce != mrt.NO_NONCE]
    for nonce in wanted:
        area = open_area(around.memory, identity, header.generation, header.boot_id, nonce)
        if area is not None:
            areas[area.interval] = area
    # A cut whose catalogue was not written never happened: its second half belongs to the first.
    base, later = areas.pop(active, None), areas.pop(active + 1, None)
    for stale in areas.values():
        stale.release()
    complete = base is not None and (len(wanted) == 1 or later is not None or header.nonce != base.nonce)
    if base is None or not complete:
        for area in (base, later):
            if area is not None:
                area.release()
        return None
    if later is not None:
        union_in_place(base.bits, later.bits)
        base.time_ns = max(base.time_ns, later.time_ns)
        later.release()
    return base


def _outside_change(around: Surroundings, found: _Found, area: SharedArea | None) -> str | None:
    """T4: why the raw file cannot be what was left behind, or None."""
    raw, was = around.raw, found.header.raw
    if raw.inode != was.inode:
        return "disk.raw is not the file that it was (another inode)"
    if raw.size_bytes != was.size_bytes:
        return "disk.raw has another size than it had"
    if found.header.clean:
        if raw != was:
            return "disk.raw was changed outside diskd since the image was closed"
        return None
    if area is not None:
        latest = area.time_ns + around.interval_ns
    else:
        latest = max(found.header.time_ns, found.table.time_ns) + 2 * around.interval_ns
    # Setting mtime back moves ctime forward, so the later of both cannot be faked by a copy.
    if max(raw.mtime_ns, raw.ctime_ns) > latest:
        return "disk.raw was changed outside diskd since its last write"
    return None


def _catch_up(identity: Identity, found: _Found) -> Script[rct.Root]:
    """Switch the RCT to the active interval where a crash came between the cut and this. Before any page:
    the root that is there must stay whole until the next one is durable."""
    if found.root.interval == found.catalogue.active:
        return found.root
    active, known = found.catalogue.active, found.header.sequence
    return (yield from rct.restart(identity, found.root, interval=active, header_sequence=known))


def _next_header(around: Surroundings, found: _Found, root: rct.Root, nonce: bytes) -> mrt.Header:
    return mrt.Header(
        clean=False,
        generation=found.header.generation,
        boot_id=around.boot_id,
        nonce=nonce,
        next_nonce=mrt.NO_NONCE,
        sequence=found.header.sequence + 1,
        root_sequence=root.sequence,
        time_ns=_latest(around, found.header.time_ns, found.table.time_ns),
        raw=around.raw,
    )


def _latest(around: Surroundings, *known_ns: int) -> int:
    """The time from which on writes are possible: writes to regions that are open already, and those of a
    merge, reach the raw file before any record of the MRT says so."""
    return max(around.now_ns, around.raw.mtime_ns, around.raw.ctime_ns, *known_ns)


def _differing(geometry: Geometry, bits: memoryview, pages: Mapping[int, bytes]) -> PageMap:
    """Pages of the whole bitmap that are not what ``pages`` (the RCT) holds."""
    now = page_map(bits, geometry.page_bytes)
    changed = {index: page for index, page in now.items() if pages.get(index) != page}
    changed.update({index: bytes(geometry.page_bytes) for index in pages if index not in now})
    return changed


def _resume(identity: Identity, around: Surroundings, found: _Found, area: SharedArea) -> Script[Recovered]:
    """The daemon died alone: everything is in shared memory and goes on there."""
    geometry = identity.geometry
    dirty = bytearray(geometry.page_count)
    for index in _differing(geometry, area.bits, found.pages):
        dirty[index] = 1
    root = yield from _catch_up(identity, found)
    yield from _write_again(identity, around, found)
    root = yield from rct.store(identity, root, {})
    header = _next_header(around, found, root, area.nonce)
    yield from mrt.write_header(identity, header, around.now_ns)
    for nonce in (found.header.nonce, found.header.next_nonce):
        if nonce not in (area.nonce, mrt.NO_NONCE):
            around.memory.remove(nonce)
    return Recovered(
        "daemon_crash", None, area, root, header, found.catalogue, found.table.open_regions, dirty
    )


def _from_disk(identity: Identity, around: Surroundings, found: _Found) -> Script[Recovered]:
    """Clean, or a power loss: the durable bitmap, and where regions were open, all of their blocks."""
    geometry = identity.geometry
    area = create_area(
        around.memory,
        identity,
        found.header.generation,
        around.boot_id,
        around.fresh_nonce,
        found.catalogue.active,
    )
    for index, page in found.pages.items():
        area.bits[index * geometry.page_bytes : (index + 1) * geometry.page_bytes] = page
    added = _add_open_regions(geometry, area.bits, found.table.open_regions)
    root = yield from _catch_up(identity, found)
    area.over_report_bytes = root.over_report_bytes + added
    if not found.header.clean:
        yield from _write_again(identity, around, found)
    if not found.header.clean or added:
        changed = _differing(geometry, area.bits, found.pages)
        over = attrs.evolve(root, over_report_bytes=area.over_report_bytes)
        root = yield from rct.store(identity, over, changed)
    header = _next_header(around, found, root, around.fresh_nonce)
    area.time_ns = header.time_ns
    yield from mrt.write_header(identity, header, around.now_ns)
    # From here on no older header can be believed, even where nothing is flushed for a long time.
    root = yield from rct.store(identity, attrs.evolve(root, header_sequence=header.sequence), {})
    for nonce in (found.header.nonce, found.header.next_nonce):
        if nonce != mrt.NO_NONCE:
            around.memory.remove(nonce)
    return Recovered(
        _how(found),
        None,
        area,
        root,
        header,
        found.catalogue,
        found.table.open_regions,
        bytearray(geometry.page_count),
    )


def _how(found: _Found) -> How:
    if any(found.table.open_regions):
        return "power_loss"
    if found.header.clean:
        return "clean"
    return "resized" if found.header.nonce == mrt.NO_NONCE else "power_loss"


def _add_open_regions(geometry: Geometry, bits: memoryview, open_regions: bytearray) -> int:
    """Mark all blocks of every open region; how many bytes that adds at most."""
    blocks = geometry.region_bytes // geometry.block_bytes
    width = geometry.region_bitmap_bytes
    added = 0
    region = open_regions.find(1)
    while region >= 0:
        first, end = region * blocks, min((region + 1) * blocks, geometry.block_count)
        before = int.from_bytes(bits[region * width : (region + 1) * width], "little").bit_count()
        set_range(bits, first, end)
        added += end - first - before
        region = open_regions.find(1, region + 1)
    return added * geometry.block_bytes


def _new_generation(
    identity: Identity, around: Surroundings, old: mrt.Header | None, reason: str
) -> Script[Recovered]:
    """Start over (T4). The catalogue goes first: from then on no point can be believed."""
    generation = around.fresh_generation
    try:
        known = yield from load_catalogue(identity)
    except Damaged:
        known = points.empty(generation)
    catalogue = points.new_generation(known, generation, reason)
    yield Replace(points.FILE, points.encode_catalogue(identity, catalogue))
    active = catalogue.active
    area = create_area(around.memory, identity, generation, around.boot_id, around.fresh_nonce, active)
    root = rct.empty_root(identity, generation, sequence=1, interval=active)
    yield from rct.create(identity, root)
    header = mrt.Header(
        clean=False,
        generation=generation,
        boot_id=around.boot_id,
        nonce=around.fresh_nonce,
        next_nonce=mrt.NO_NONCE,
        sequence=1,
        root_sequence=root.sequence,
        time_ns=_latest(around),
        raw=around.raw,
    )
    area.time_ns = header.time_ns
    yield from mrt.create(identity, header, around.now_ns)
    for nonce in (old.nonce, old.next_nonce) if old is not None else ():
        if nonce != mrt.NO_NONCE:
            around.memory.remove(nonce)
    closed = bytearray(identity.geometry.region_count)
    dirty = bytearray(identity.geometry.page_count)
    return Recovered("new_generation", reason, area, root, header, catalogue, closed, dirty)


def create(identity: Identity, generation: UUID, raw: mrt.RawFacts) -> Script[None]:
    """The side files of a new image whose raw file exists and is durable; as after a clean close."""
    root = rct.empty_root(identity, generation, sequence=1, interval=1)
    yield from rct.create(identity, root)
    yield Replace(points.FILE, points.encode_catalogue(identity, points.empty(generation)))
    header = mrt.Header(
        clean=True,
        generation=generation,
        boot_id=UUID(int=0),
        nonce=mrt.NO_NONCE,
        next_nonce=mrt.NO_NONCE,
        sequence=1,
        root_sequence=1,
        time_ns=max(raw.mtime_ns, raw.ctime_ns),
        raw=raw,
    )
    yield from mrt.create(identity, header, header.time_ns)

"""Growing an image: an intent record, then everything anew for the new size, finished at the reopening.

The side files are laid out for one size, so a resize ends the active interval, as a cut does, but without a
point: its bitmap goes into a file of its own, and a new, empty RCT and MRT begin. Points stay valid: each has
recorded its size, and what lies beyond counts as changed (core.changes).

    reserve     side files grow in place: the only thing that needs space, and nobody sees it
    record      under the hold: the interval's file, then the intent          <- from here on it happens
    carry_out   raw file, points, RCT, MRT, then image.toml                   <- from here on it has happened
                the intent goes

Everything after the intent only needs the intent, and may be done again any number of times. An intent beside
an image.toml of its new size is left over. One that was put back from an older time is told by the MRT, which
knows more than it does, and is refused: it would take back what was tracked since.

Byte layout in docs/formats/image.md.
"""

import zlib
from typing import Final
from uuid import UUID

import attrs

from daemonkit.codec import CodecError, decode, encode
from daemonkit.schema import SchemaError, structure, unstructure
from daemonkit.units import format_size
from diskd.core import mrt, points, rct
from diskd.core.geometry import IMAGE_TOML, RAW, Geometry, Identity, encode_identity
from diskd.core.points import Catalogue
from diskd.core.recovery import WRITE_NS_MAX, Recovered
from diskd.core.shared import SharedArea
from diskd.core.steps import Allocate, Read, Remove, Replace, Script, Size, Sync, Truncate
from diskd.core.tracker import Tracker, next_header, store_interval
from diskd.errors import Damaged, Refused

FILE: Final = "resize"
MAGIC: Final = b"HFRSZ001"
# The catalogue, and a few numbers around it.
FILE_BYTES_MAX: Final = points.FILE_BYTES_MAX + 4096


@attrs.frozen
class Intent:
    """All that carrying a resize out needs. ``header_sequence`` and ``root_sequence``: of the first header
    and root of the new size. ``raw`` and ``time_ns``: the raw file and the wall clock at the intent."""

    from_bytes: int
    to_bytes: int
    generation: str
    header_sequence: int
    root_sequence: int
    time_ns: int
    raw: mrt.RawFacts
    catalogue: Catalogue


def grown(identity: Identity, size_bytes: int) -> Identity:
    """The same image at another size. Raises Refused for one that cannot be, or is smaller."""
    now = identity.geometry
    geometry = Geometry.check(size_bytes, now.block_bytes, now.region_bytes, now.page_bytes)
    if size_bytes < now.size_bytes:
        raise Refused(
            f"it has {format_size(now.size_bytes)} and cannot shrink to {format_size(size_bytes)}:"
            " create a smaller image and copy what is needed"
        )
    return Identity(identity.uuid, geometry)


def encode_intent(identity: Identity, intent: Intent) -> bytes:
    """The whole file: magic, CRC of the rest, image, msgpack."""
    body = identity.uuid.bytes + encode(unstructure(intent))
    return MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


def decode_intent(identity: Identity, data: bytes) -> Intent:
    """Raises Damaged for anything but an intent of this image."""
    body = data[12:]
    if (
        len(data) > FILE_BYTES_MAX
        or data[:8] != MAGIC
        or zlib.crc32(body).to_bytes(4, "little") != data[8:12]
        or body[:16] != identity.uuid.bytes
    ):
        raise Damaged(f"{FILE}: its checksum does not match, or it belongs to another image")
    try:
        intent = structure(Intent, decode(body[16:]), where=FILE)
        UUID(intent.generation)
        grown(identity, intent.to_bytes)
    except (CodecError, SchemaError, ValueError, Refused) as error:
        raise Damaged(f"{FILE}: {error}") from error
    return intent


def plan(tracker: Tracker, raw: mrt.RawFacts, to_bytes: int, now_ns: int) -> Intent:
    """What a resize of this image, with its writes held, will do. Raises Refused."""
    area = tracker.area
    return Intent(
        tracker.identity.geometry.size_bytes,
        to_bytes,
        str(tracker.generation),
        tracker.header.sequence + 1,
        tracker.root.sequence + 1,
        max(now_ns, area.time_ns, raw.mtime_ns, raw.ctime_ns),
        raw,
        points.end_interval(tracker.catalogue, area.over_report_bytes),
    )


def reserve(identity: Identity, now_ns: int) -> Script[None]:
    """Room for the side files at this, larger size. A failure changes nothing. No other write of the MRT or
    of the RCT may be under way: posix_fallocate(3) writes to both where the file system has no such call."""
    yield from mrt.stamp(identity, now_ns)
    yield Allocate(mrt.FILE, mrt.file_bytes(identity))
    yield Allocate(rct.FILE, rct.file_bytes(identity))


def record(tracker: Tracker, intent: Intent) -> Script[None]:
    """Make the ended interval durable, then the intent. Until that one is, nothing has happened."""
    yield from store_interval(tracker, tracker.area, intent.catalogue)
    yield Replace(FILE, encode_intent(tracker.identity, intent))


def new_root(identity: Identity, intent: Intent) -> rct.Root:
    """The empty root with which the grown image begins."""
    generation, active = UUID(intent.generation), intent.catalogue.active
    return rct.empty_root(identity, generation, sequence=intent.root_sequence, interval=active)


def live_header(tracker: Tracker, intent: Intent, nonce: bytes) -> mrt.Header:
    """The header under which an image that is open goes on, with the bitmap of this nonce."""
    return next_header(
        tracker,
        nonce=nonce,
        next_nonce=mrt.NO_NONCE,
        root_sequence=intent.root_sequence,
        time_ns=intent.time_ns,
        raw=attrs.evolve(intent.raw, size_bytes=intent.to_bytes),
    )


def _left_header(intent: Intent) -> mrt.Header:
    """The header for an image that nobody had open since. Whether somebody changed the raw file meanwhile is
    for recovery to judge: it knows when the intent was recorded."""
    return mrt.Header(
        clean=False,
        generation=UUID(intent.generation),
        boot_id=UUID(int=0),
        nonce=mrt.NO_NONCE,
        next_nonce=mrt.NO_NONCE,
        sequence=intent.header_sequence,
        root_sequence=intent.root_sequence,
        time_ns=intent.time_ns,
        raw=attrs.evolve(intent.raw, size_bytes=intent.to_bytes),
    )


def carry_out(identity: Identity, intent: Intent, header: mrt.Header, now_ns: int) -> Script[None]:
    """Do what the recorded intent says; ``identity`` has the new size. May be repeated at any time."""
    if (yield Size(RAW)) != intent.to_bytes:
        yield Truncate(RAW, intent.to_bytes)
    yield Sync(RAW)
    yield Replace(points.FILE, points.encode_catalogue(identity, intent.catalogue))
    yield from rct.create(identity, new_root(identity, intent))
    yield from mrt.create(identity, header, now_ns)
    yield Replace(IMAGE_TOML, encode_identity(identity))
    yield Remove(FILE)


def recovered(identity: Identity, intent: Intent, header: mrt.Header, area: SharedArea) -> Recovered:
    """Where the tracking of an open image goes on, once its resize was carried out."""
    geometry, root = identity.geometry, new_root(identity, intent)
    closed, dirty = bytearray(geometry.region_count), bytearray(geometry.page_count)
    return Recovered("resized", None, area, root, header, intent.catalogue, closed, dirty)


def resume(
    identity: Identity, raw: mrt.RawFacts, *, mrt_changed_ns: int, now_ns: int, interval_ns: int
) -> Script[Identity]:
    """At the opening, before anything else is read: finish a resize. What the image is afterwards.
    ``mrt_changed_ns`` as in recovery.Surroundings.

    Raises Damaged where the intent cannot be the last word about this image.
    """
    if (yield Size(FILE)) is None:
        return identity
    size = identity.geometry.size_bytes
    try:
        intent = decode_intent(identity, (yield Read(FILE, 0, FILE_BYTES_MAX + 1)))
    except Damaged:
        if raw.size_bytes != size:
            raise
        # Not begun, or over: in both cases everything else is whole and of one size.
        yield Remove(FILE)
        return identity
    if size != intent.from_bytes:
        yield Remove(FILE)
        return identity
    if raw.size_bytes not in (size, intent.to_bytes):
        return identity  # which opening refuses, with both sizes
    target = grown(identity, intent.to_bytes)
    if (yield from _is_outdated(identity, target, intent, mrt_changed_ns)):
        raise Damaged(f"{FILE} and {IMAGE_TOML} are older than {mrt.FILE} knows them: restore all files")
    untouched = max(raw.mtime_ns, raw.ctime_ns) <= intent.time_ns + 2 * interval_ns
    if untouched and raw.inode == intent.raw.inode and raw.size_bytes == size:
        # The raw file is about to change once more, and must not be taken for changed outside.
        intent = attrs.evolve(intent, time_ns=max(now_ns, intent.time_ns))
        yield Replace(FILE, encode_intent(identity, intent))
    yield from carry_out(target, intent, _left_header(intent), now_ns)
    return target


def _is_outdated(before: Identity, target: Identity, intent: Intent, mrt_changed_ns: int) -> Script[bool]:
    """Whether tracking went on after this intent: then it was put back from an older time."""
    try:
        if mrt_changed_ns > (yield from mrt.load_stamp(before)) + WRITE_NS_MAX:
            return True
    except Damaged:
        return True
    old = yield from _sequence(before)
    new = yield from _sequence(target)
    if old >= intent.header_sequence or new not in (0, intent.header_sequence):
        return True
    if not new:
        return False
    # Its header was the last thing but one, so all before it is durable, and nothing may have come after.
    table = yield from mrt.load_table(target, UUID(intent.generation))
    if any(table.open_regions):
        return True
    root, _ = yield from rct.load(target)
    return root.sequence != intent.root_sequence


def _sequence(identity: Identity) -> Script[int]:
    """That of the newest whole header for this size, or 0."""
    try:
        header = yield from mrt.load_header(identity)
    except Damaged:
        return 0
    return header.sequence

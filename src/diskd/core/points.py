"""``points``: the catalogue of reference points of one image, and which interval files lie between them.

    time ->    P1        P2       (deleted)      P3
    intervals  |---- 1 ---|--- 2 ---|----- 3 ----|---- active = 4 ...

A point's *sequence* is the number of the interval that begins at it, so changes since P2 are the union of
2, 3 and 4. Deleting a point only removes it from the catalogue, in one atomic replacement; its two
intervals are joined afterwards (``joinable``), which changes no answer. Intervals before the oldest point
are of no use and are dropped. A new generation (continuity was lost, T4) makes every point invalid.

States of a point:
    pending   cut, and its boundary is kept, but nobody knows (yet) that a target holds the backup
    valid     a target holds the backup: changes since it may be asked for
    invalid   with the reason; the remedy is always a full backup
"""

import re
import zlib
from collections.abc import Collection
from typing import Any, Final, Literal
from uuid import UUID

import attrs

from daemonkit.codec import CodecError, decode, encode
from daemonkit.schema import SchemaError, structure, unstructure
from diskd.core.geometry import Identity
from diskd.errors import Damaged, NoSuchPoint, Refused

FILE: Final = "points"
MAGIC: Final = b"HFPTS001"
POINTS_MAX: Final = 511
REASON_LENGTH_MAX: Final = 500
FILE_BYTES_MAX: Final = 1 << 20
REMEDY: Final = "take a full backup"
_POINT: Final = re.compile(r"^rp-[0-9a-f]{16}$", re.ASCII)

PointState = Literal["pending", "valid", "invalid"]


@attrs.frozen
class Point:
    """``sequence``: the interval that begins at the point; ``size_bytes``: of the image when it was cut."""

    id: str
    generation: str
    sequence: int
    size_bytes: int
    state: PointState
    reason: str | None = None

    @property
    def rct_id(self) -> str:
        """``GENERATION-UUID:SEQ``."""
        return f"{self.generation}:{self.sequence}"


@attrs.frozen
class Segment:
    """A closed interval with a file of its own. Over-report is 0 where it is exact. ``through``: the last
    interval whose changes that file must hold, or else it was put back from before the two were joined."""

    interval: int
    over_report_bytes: int
    through: int


@attrs.frozen
class Catalogue:
    """Immutable: every change is a new value, replaced on disk as a whole.

    ``active``: the number of the interval that the active bitmap records.
    """

    generation: str
    active: int
    points: list[Point]
    segments: list[Segment]

    def find(self, point: str) -> Point:
        """Raises NoSuchPoint for an unknown or foreign id."""
        for known in self.points:
            if known.id == point:
                return known
        raise NoSuchPoint(f"point {point} is not known to this image: {REMEDY}")


@attrs.frozen
class Span:
    """The intervals between two points: files, and whether the active bitmap belongs to it. ``end_bytes``:
    the image's size at the later one, or None for its present size."""

    base: Point
    segments: list[Segment]
    with_active: bool
    end_bytes: int | None = None


def empty(generation: UUID, *, active: int = 1) -> Catalogue:
    """No points."""
    return Catalogue(str(generation), active, [], [])


def is_point_id(text: str) -> bool:
    """``rp-`` and 16 hex digits."""
    return _POINT.match(text) is not None


def check_cut(catalogue: Catalogue, point: str | None = None) -> None:
    """Raises Refused where no further point can be cut."""
    live = [known for known in catalogue.points if known.state != "invalid"]
    if len(live) >= POINTS_MAX:
        raise Refused(f"the image has {POINTS_MAX} reference points: delete one with diskctl point delete")
    if len(catalogue.segments) > POINTS_MAX:
        # Such as could not be joined. One more would be a catalogue that nobody believes (``_check``).
        raise Refused(
            f"the image has more than {POINTS_MAX} intervals between its points, some of them damaged or not"
            " joined for want of space: delete its oldest points with diskctl point delete"
        )
    if point is not None and not is_point_id(point):
        raise Refused(f"{point!r} is not a point id: rp- and 16 hex digits")
    if point is not None and any(known.id == point for known in catalogue.points):
        raise Refused(f"point {point} exists already")


def cut(catalogue: Catalogue, point: str, size_bytes: int, over_report_bytes: int) -> Catalogue:
    """The active interval ends at the new, pending point, and the next begins."""
    check_cut(catalogue, point)
    sequence = catalogue.active + 1
    points = list(catalogue.points)
    while len(points) >= POINTS_MAX:
        # Only invalid ones can be left in excess; the oldest of them has been said long enough.
        points.remove(next(known for known in points if known.state == "invalid"))
    points.append(Point(point, catalogue.generation, sequence, size_bytes, "pending"))
    segments = [*catalogue.segments, Segment(catalogue.active, over_report_bytes, catalogue.active)]
    return _useful(attrs.evolve(catalogue, active=sequence, points=points, segments=segments))


def end_interval(catalogue: Catalogue, over_report_bytes: int) -> Catalogue:
    """The active interval ends without a point, and the next begins (a resize). Raises Refused."""
    if len(catalogue.segments) >= POINTS_MAX:
        raise Refused(f"the image has {POINTS_MAX} intervals: delete a point with diskctl point delete")
    segments = [*catalogue.segments, Segment(catalogue.active, over_report_bytes, catalogue.active)]
    return _useful(attrs.evolve(catalogue, active=catalogue.active + 1, segments=segments))


def validate(catalogue: Catalogue, point: str) -> Catalogue:
    """pending -> valid. Valid already is fine; raises NoSuchPoint for invalid and unknown ones."""
    known = catalogue.find(point)
    if known.state == "invalid":
        raise NoSuchPoint(f"point {point} is invalid: {known.reason}")
    return _with(catalogue, attrs.evolve(known, state="valid"))


def delete(catalogue: Catalogue, point: str) -> Catalogue:
    """Without the point; unknown is fine."""
    points = [known for known in catalogue.points if known.id != point]
    return _useful(attrs.evolve(catalogue, points=points))


def new_generation(catalogue: Catalogue, generation: UUID, reason: str) -> Catalogue:
    """Continuity is lost: every point becomes invalid with the reason; what was so before keeps its own."""
    points = [
        known
        if known.state == "invalid"
        else attrs.evolve(known, state="invalid", reason=f"{reason}: {REMEDY}"[:REASON_LENGTH_MAX])
        for known in catalogue.points
    ]
    return Catalogue(str(generation), catalogue.active + 1, points, [])


def _with(catalogue: Catalogue, point: Point) -> Catalogue:
    points = [point if known.id == point.id else known for known in catalogue.points]
    return attrs.evolve(catalogue, points=points)


def _useful(catalogue: Catalogue) -> Catalogue:
    """Without the segments that lie before the oldest point that can still be asked for."""
    starts = [known.sequence for known in catalogue.points if known.state != "invalid"]
    first = min(starts, default=catalogue.active)
    kept = [segment for segment in catalogue.segments if segment.interval >= first]
    return attrs.evolve(catalogue, segments=kept)


def joinable(
    catalogue: Catalogue, *, but_not: Collection[tuple[Segment, Segment]] = ()
) -> tuple[Segment, Segment] | None:
    """The oldest two neighbouring segments without a live point between them."""
    starts = {known.sequence for known in catalogue.points if known.state != "invalid"}
    for left, right in zip(catalogue.segments, catalogue.segments[1:], strict=False):
        if right.interval not in starts and (left, right) not in but_not:
            return left, right
    return None


def joined(catalogue: Catalogue, left: Segment, right: Segment) -> Catalogue:
    """``left`` now holds both; the number of ``right`` is gone."""
    both = Segment(left.interval, left.over_report_bytes + right.over_report_bytes, right.through)
    segments = [both if one == left else one for one in catalogue.segments if one != right]
    return attrs.evolve(catalogue, segments=segments)


def span(catalogue: Catalogue, point: str, until: str | None = None) -> Span:
    """What to unite for the changes between ``point`` (valid) and ``until`` (valid or pending), or now.

    Raises NoSuchPoint with the reason and the remedy (T4).
    """
    base = catalogue.find(point)
    if base.state == "invalid":
        raise NoSuchPoint(f"point {point} is invalid: {base.reason}")
    if base.state == "pending":
        raise NoSuchPoint(f"point {point} is pending: its backup was never confirmed; settle it, or {REMEDY}")
    end, end_bytes = catalogue.active + 1, None
    if until is not None:
        last = catalogue.find(until)
        if last.state == "invalid":
            raise NoSuchPoint(f"point {until} is invalid: {last.reason}")
        if last.sequence < base.sequence:
            raise NoSuchPoint(f"point {point} is newer than {until}: {REMEDY}")
        end, end_bytes = last.sequence, last.size_bytes
    segments = [one for one in catalogue.segments if base.sequence <= one.interval < end]
    return Span(base, segments, until is None, end_bytes)


def damaged(point: str, reason: str) -> NoSuchPoint:
    """T4: an interval after the point cannot be read back."""
    return NoSuchPoint(f"point {point}: {reason}: {REMEDY}")


def encode_catalogue(identity: Identity, catalogue: Catalogue) -> bytes:
    """The whole file: magic, CRC of the rest, image, msgpack."""
    body = identity.uuid.bytes + encode(unstructure(catalogue))
    return MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


def decode_catalogue(identity: Identity, data: bytes) -> Catalogue:
    """Raises Damaged for anything but a consistent catalogue of this image."""
    body = data[12:]
    if (
        len(data) > FILE_BYTES_MAX
        or data[:8] != MAGIC
        or zlib.crc32(body).to_bytes(4, "little") != data[8:12]
    ):
        raise Damaged(f"{FILE}: its checksum does not match")
    if body[:16] != identity.uuid.bytes:
        raise Damaged(f"{FILE}: it belongs to another image")
    try:
        catalogue = structure(Catalogue, decode(body[16:]), where=FILE)
    except (CodecError, SchemaError) as error:
        raise Damaged(f"{FILE}: {error}") from error
    _check(catalogue)
    return catalogue


def _check(catalogue: Catalogue) -> None:
    points, intervals = catalogue.points, [segment.interval for segment in catalogue.segments]
    sequences = [point.sequence for point in points]
    facts: list[Any] = [
        len(points) <= POINTS_MAX,
        len(intervals) <= POINTS_MAX + 1,
        intervals == sorted(set(intervals)),
        sequences == sorted(set(sequences)),
        all(0 < sequence <= catalogue.active for sequence in sequences),
        all(0 < interval < catalogue.active for interval in intervals),
        all(is_point_id(point.id) for point in points),
        len({point.id for point in points}) == len(points),
        all(len(point.reason or "") <= REASON_LENGTH_MAX for point in points),
        # A live point whose first closed interval has no segment would lose changes silently.
        all(
            point.state == "invalid" or point.sequence == catalogue.active or point.sequence in intervals
            for point in points
        ),
        all(segment.over_report_bytes >= 0 for segment in catalogue.segments),
        all(
            segment.interval <= segment.through < following
            for segment, following in zip(
                catalogue.segments, [*intervals[1:], catalogue.active], strict=False
            )
        ),
    ]
    if not all(facts):
        raise Damaged(f"{FILE}: it contradicts itself")

"""What a backup copies: from a base and a change map to runs, from runs to frames.

A full sends the allocated data and nothing else: what is not sent reads as zeroes. A differential sends
every changed block: where it is data now, the data; where it was zeroed or trimmed, a zero or hole run,
since the base may hold data there. Runs are coalesced as far as they touch.

Frames of data end at multiples of the frame size, so that those of a later differential fall onto the
same borders as those of its base.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, Literal, TypeAlias

import attrs

from daemonkit.units import MiB
from diskd.core.ports import Allocation, AllocationKind
from diskd.core.stream import DATA_BYTES_MAX, FrameKind
from diskd.errors import NoSuchPoint, Refused

# One question about allocation covers this much, so that a fragmented file's answer stays small.
QUERY_BYTES_MAX: Final = 256 * MiB

ChosenMode: TypeAlias = Literal["auto", "full", "since"]
_KINDS: Final[dict[AllocationKind, FrameKind]] = {
    "data": FrameKind.DATA,
    "zero": FrameKind.ZERO,
    "hole": FrameKind.HOLE,
}


@attrs.frozen
class Run:
    """A stretch of one kind; any length."""

    kind: FrameKind
    offset: int
    length: int

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.length


@attrs.frozen
class TargetPoint:
    """A point that the target holds and could restore; ``disks``: of which image each disk was."""

    point: str
    disks: Mapping[str, str]


@attrs.frozen
class SourceDisk:
    """A disk as it is now: its image here, and that image's valid points, oldest first."""

    image: str
    points: Sequence[str]


def choose_base(
    mode: ChosenMode,
    since: str | None,
    *,
    at_target: Sequence[TargetPoint],
    at_source: Mapping[str, SourceDisk],
) -> str | None:
    """The base point, or None for a full.

    Raises NoSuchPoint with the reason and the remedy: never a silent full (T4).
    """
    if mode == "full":
        return None
    held = {point.point: point for point in at_target}
    if mode == "since":
        if since is None:
            raise Refused("name the point: --since POINT")
        reason = _why_not(since, held, at_source)
        if reason:
            raise NoSuchPoint(f"{since}: {reason}; take a full backup: use --full")
        return since
    if not at_target:
        return None
    first = next(iter(at_source.values()), None)
    for point in reversed(first.points if first else ()):
        if not _why_not(point, held, at_source):
            return point
    raise NoSuchPoint(
        "no reference point is valid both here and at the target; take a full backup: use --full"
    )


def _why_not(point: str, held: Mapping[str, TargetPoint], at_source: Mapping[str, SourceDisk]) -> str | None:
    if point not in held:
        return "the target has no such point of this VM"
    for name, disk in at_source.items():
        if point not in disk.points:
            return f"it is not a valid point of disk {name}"
        before = held[point].disks.get(name)
        if before is None:
            return f"the target's backup of it has no disk {name}"
        # Two disks of a VM may have exchanged their names: the changes of one are no changes of the other.
        if before != disk.image:
            return f"in the target's backup of it disk {name} was the image {before}, now it is {disk.image}"
    return None


def walk(
    extents: Iterable[tuple[int, int]], query: Callable[[int, int], list[Allocation]]
) -> Iterator[Allocation]:
    """The allocation of all extents, asked for in bounded portions. Raises ValueError for a bad answer."""
    for start, length in extents:
        offset, end = start, start + length
        while offset < end:
            portion = min(QUERY_BYTES_MAX, end - offset)
            position = offset
            for piece in query(offset, portion):
                if piece.offset != position or piece.length <= 0:
                    raise ValueError(f"allocation at {position} is answered with a gap")
                position += piece.length
                yield piece
            if not offset < position <= offset + portion:
                raise ValueError(f"allocation of {offset}+{portion} is answered up to {position}")
            offset = position


def plan_full(allocations: Iterable[Allocation]) -> list[Run]:
    """Only what holds data, coalesced."""
    return _coalesce(piece for piece in allocations if piece.kind == "data")


def plan_differential(allocations: Iterable[Allocation]) -> list[Run]:
    """Everything, by kind, coalesced; ``allocations`` cover exactly the changed extents."""
    return _coalesce(allocations)


def _coalesce(allocations: Iterable[Allocation]) -> list[Run]:
    runs: list[Run] = []
    for piece in allocations:
        kind = _KINDS[piece.kind]
        if runs and runs[-1].kind is kind and runs[-1].end == piece.offset:
            runs[-1] = Run(kind, runs[-1].offset, runs[-1].length + piece.length)
        else:
            runs.append(Run(kind, piece.offset, piece.length))
    return runs


def frames_of(runs: Iterable[Run]) -> Iterator[Run]:
    """The runs, data cut at multiples of the largest frame."""
    for run in runs:
        if run.kind is not FrameKind.DATA:
            yield run
            continue
        offset = run.offset
        while offset < run.end:
            end = min(run.end, (offset // DATA_BYTES_MAX + 1) * DATA_BYTES_MAX)
            yield Run(run.kind, offset, end - offset)
            offset = end


def data_bytes(runs: Iterable[Run]) -> int:
    """How many bytes of payload the runs carry."""
    return sum(run.length for run in runs if run.kind is FrameKind.DATA)

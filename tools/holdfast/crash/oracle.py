"""What an image may hold, and what its points must report, known from the outside alone: a naive witness.

Every write has a number of its own, with which it fills its sectors (512 bytes: the number, over and over);
zero and trim are number 0. No two requests in flight share a sector, so that each sector has one history: a
list of writes, each sent at a time and perhaps acknowledged at a later one. "Time" counts events.

    may hold after a kill         the newest acknowledged write, or the one in flight
    ... after a power loss        anything not older than the newest that a FLUSH (sent after it was
                                  acknowledged) or its own FUA has covered
    a frozen view                 nothing sent after the cut was answered, nothing older than the newest
                                  that was acknowledged before the cut was asked for

After a crash the image is read back and the histories go on from there: what was found is what there is.
"""

from collections.abc import Iterable, Iterator
from typing import Final

import attrs
import numpy as np
import numpy.typing as npt

from holdfast.crash.journal import SECTOR

BLOCK: Final = 4096
_SECTORS_PER_BLOCK: Final = BLOCK // SECTOR
Numbers = npt.NDArray[np.uint64]


class Violation(AssertionError):
    """A rule of DESIGN.md section 4 is broken; the text says which and where."""


@attrs.define(eq=False)
class Write:
    """A request that changes ``first`` to ``end``, in sectors."""

    number: int
    first: int
    end: int
    sent: int
    is_fua: bool = False
    acked: int | None = None

    def blocks(self) -> range:
        return range(self.first // _SECTORS_PER_BLOCK, -(-self.end // _SECTORS_PER_BLOCK))

    def data(self) -> bytes:
        """What a write with this number carries."""
        return self.number.to_bytes(8, "little") * ((self.end - self.first) * SECTOR // 8)


@attrs.define(eq=False)
class Point:
    """A cut, from the moment it is asked for. ``content``: what its frozen view showed.

    ``certain`` changed since, ``maybe`` may have. ``is_exact``: no power was lost since the cut.
    """

    asked: int
    size_sectors: int
    answered: int | None = None
    name: str | None = None
    state: str = "cut"  # cut, ending, valid, deleting
    content: Numbers | None = None
    window: tuple[int, int] = (0, 0)
    certain: set[int] = attrs.Factory(set)
    maybe: set[int] = attrs.Factory(set)
    is_exact: bool = True


@attrs.define
class Clock:
    """Counts events, for all images of a story."""

    now: int = 1

    def tick(self) -> int:
        self.now += 1
        return self.now


class Image:
    """One image's histories and points."""

    def __init__(self, name: str, size_bytes: int, clock: Clock) -> None:
        self.name = name
        self.sectors = size_bytes // SECTOR
        self._clock = clock
        self.points: list[Point] = []
        self._number = 0
        self._flushed = 0
        self._base = np.zeros(self.sectors, np.uint64)
        self._history: dict[int, list[Write]] = {}
        self._in_flight: set[Write] = set()

    def tick(self) -> int:
        return self._clock.tick()

    # --- requests

    def is_free(self, first: int, end: int) -> bool:
        """Whether no request in flight touches these sectors."""
        return all(write.end <= first or end <= write.first for write in self._in_flight)

    def send(self, first: int, end: int, *, is_zero: bool, is_fua: bool) -> Write:
        self._number += 1
        write = Write(0 if is_zero else self._number, first, end, self.tick(), is_fua)
        self._in_flight.add(write)
        for sector in range(first, end):
            self._history.setdefault(sector, []).append(write)
        blocks = write.blocks()
        for point in self.points:
            point.maybe.update(blocks)
        return write

    def ack(self, write: Write) -> None:
        write.acked = self.tick()
        self._in_flight.discard(write)
        for point in self.points:
            if point.answered is not None and write.sent > point.answered:
                point.certain.update(write.blocks())

    def flushed(self, sent: int) -> None:
        """A FLUSH sent at ``sent`` was acknowledged."""
        self._flushed = max(self._flushed, sent)

    # --- points

    def ask_cut(self) -> Point:
        point = Point(self.tick(), self.sectors)
        for write in self._in_flight:
            point.maybe.update(write.blocks())
        self.points.append(point)
        return point

    def see_frozen(self, point: Point, data: bytes) -> tuple[int, int]:
        """A frozen view was read: it must be the image at the cut, and stay that. Between which times the
        cut must have been, for what was read."""
        content = self.numbers(data, f"the frozen view of {point.name}")
        if point.content is None:
            point.content, point.window = content, self._check_frozen(point, content)
        else:
            different = np.flatnonzero(point.content != content)
            if len(different):
                raise Violation(f"{self.name}: the frozen view of {point.name} changed in {_some(different)}")
        return point.window

    def _check_frozen(self, point: Point, content: Numbers) -> tuple[int, int]:
        low = point.asked
        high = until = point.answered if point.answered is not None else self._clock.now
        if len(content) != point.size_sectors:
            raise Violation(f"{self.name}: the frozen view of {point.name} has {len(content)} sectors")
        changed = np.flatnonzero(content != self._base[: len(content)]).tolist()
        for sector in sorted(set(changed) | {sector for sector in self._history if sector < len(content)}):
            found = int(content[sector])
            history = self._history.get(sector, [])
            allowed = {int(self._base[sector])}
            for write in history:
                if write.acked is not None and write.acked < point.asked:
                    allowed = {write.number}
                elif write.sent < until:
                    allowed.add(write.number)
            if found not in allowed:
                raise Violation(
                    f"{self.name}: the frozen view of {point.name} holds write {found} in"
                    f" sector {sector}, may hold {sorted(allowed)} (B1)"
                )
            since, before = self._shown(sector, found, history)
            low, high = max(low, since), min(high, before)
        return low, high

    def _shown(self, sector: int, found: int, history: list[Write]) -> tuple[int, int]:
        """From when until when the sector showed this number at most; it may have been zero several times."""
        if found == 0 and any(write.number == 0 for write in history):
            return 0, self._clock.now
        since, is_shown = 0, found == int(self._base[sector])
        for write in history:
            if is_shown:
                return since, write.acked if write.acked is not None else self._clock.now
            if write.number == found:
                since, is_shown = write.sent, True
        return since, self._clock.now

    def grow(self, size_bytes: int) -> None:
        """What is new reads as zeroes, and counts as changed since every point before."""
        old, self.sectors = self.sectors, size_bytes // SECTOR
        self._base = np.concatenate([self._base, np.zeros(self.sectors - old, np.uint64)])

    def certain(self, point: Point) -> set[int]:
        """Blocks that have changed since, whatever happens from here on."""
        return point.certain | self._beyond(point)

    def _beyond(self, point: Point) -> set[int]:
        return set(range(point.size_sectors // _SECTORS_PER_BLOCK, -(-self.sectors // _SECTORS_PER_BLOCK)))

    # --- after a crash

    def settle(self, data: bytes, *, power_lost: bool) -> None:
        """The image as read after a crash: every sector must be one that it may be; go on from there."""
        content = self.numbers(data, "the image")
        rule = "a power loss (FLUSH)" if power_lost else "a kill"
        for sector in sorted(set(self._history) | set(np.flatnonzero(content != self._base).tolist())):
            found = int(content[sector])
            allowed = self._allowed(sector, power_lost=power_lost)
            if found not in allowed:
                raise Violation(
                    f"{self.name}: sector {sector} holds write {found} after {rule},"
                    f" may hold {sorted(allowed)}"
                )
            self._prune(sector, found, power_lost=power_lost)
        if power_lost:
            self._history.clear()
            self._base = content
            for point in self.points:
                point.is_exact = False
                point.certain.clear()
        for write in list(self._in_flight):
            write.acked = self.tick()
        self._in_flight.clear()

    def _allowed(self, sector: int, *, power_lost: bool) -> set[int]:
        allowed = {int(self._base[sector])}
        for write in self._history.get(sector, ()):
            covers = write.acked is not None and (
                not power_lost or write.is_fua or write.acked < self._flushed
            )
            if covers:
                allowed = set()
            allowed.add(write.number)
        return allowed

    def _prune(self, sector: int, found: int, *, power_lost: bool) -> None:
        """After a kill: a write that was in flight either came to be or never will."""
        history = self._history.get(sector)
        if power_lost or not history or history[-1].acked is not None:
            return
        if found != history[-1].number:
            history.pop()

    def check_changes(
        self,
        point: Point,
        extents: Iterable[tuple[int, int]],
        *,
        exact: bool,
        over_bytes: int,
        certain: set[int],
        content: bytes | None,
    ) -> None:
        """The answer to "changes since": T2 always, T3 unless power was lost since. ``certain``: what had
        changed when it was asked for; ``content``: the image now, at rest; None with requests under way."""
        reported = set(_blocks(extents))
        missed = certain - reported
        if content is not None and point.content is not None:
            now = self.numbers(content, "the image")[: point.size_sectors]
            differing = np.flatnonzero(now != point.content) // _SECTORS_PER_BLOCK
            missed |= set(differing.tolist()) - reported
        if missed:
            raise Violation(f"{self.name}: changes since {point.name} miss blocks {_some(missed)} (T2)")
        extra = reported - point.maybe - self._beyond(point)
        if point.is_exact and (extra or not exact):
            raise Violation(
                f"{self.name}: changes since {point.name} are not exact after no power loss: exact={exact},"
                f" {over_bytes} bytes said, too many: {_some(extra)} (T3)"
            )
        if len(extra) * BLOCK > over_bytes:
            raise Violation(
                f"{self.name}: changes since {point.name}: {len(extra) * BLOCK} bytes too many,"
                f" {over_bytes} said (T3)"
            )
        if exact != (over_bytes == 0):
            raise Violation(f"{self.name}: exact={exact} with {over_bytes} bytes over-reported (T3)")

    def numbers(self, data: bytes, what: str) -> Numbers:
        """The number of the write that each sector holds."""
        words = np.frombuffer(data, np.uint64).reshape(-1, SECTOR // 8)
        mixed = np.flatnonzero((words != words[:, :1]).any(axis=1))
        if len(mixed):
            first = words[mixed[0]]
            at = int(np.flatnonzero(first != first[0])[0])
            raise Violation(
                f"{self.name}: {what}: torn inside sectors {_some(mixed)}: the first holds write"
                f" {int(first[0])}, from byte {at * 8} on {int(first[at])}, and {int(first[-1])} at its end"
            )
        numbers: Numbers = words[:, 0].copy()
        return numbers


def check_instant(what: str, windows: Iterable[tuple[int, int]]) -> None:
    """All disks of a checkpoint show one instant: there is a time at which all of it was so (B1)."""
    lows, highs = zip(*windows, strict=True)
    if max(lows) > min(highs):
        raise Violation(f"{what} shows no one instant: after {max(lows)} and before {min(highs)} (B1)")


def _blocks(extents: Iterable[tuple[int, int]]) -> Iterator[int]:
    for offset, length in extents:
        yield from range(offset // BLOCK, -(-(offset + length) // BLOCK))


def _some(numbers: Iterable[int]) -> str:
    found = sorted(int(number) for number in numbers)
    return f"{found[:8]}{' ...' if len(found) > 8 else ''} ({len(found)})"

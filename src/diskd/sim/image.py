"""The crash-anywhere harness of tracking: one image on a simulated disk, driven by interleaved tasks.

The tasks mirror shell/image.py and shell/cut.py turn for turn; the decisions and the durable sequences are
the very same core code. A task yields the step that it wants executed, or None where it waits for another;
a seeded scheduler picks who goes on. Beside it runs a naive oracle: the raw content at every cut, and the set
of blocks that were admitted since. ``check`` compares every answer with both.
"""

import contextlib
import itertools
from collections.abc import Generator, Iterator
from random import Random
from typing import Any, Final, TypeAlias
from uuid import UUID

import attrs

from diskd.core import interval, mrt, points, recovery, resize
from diskd.core.changes import report
from diskd.core.extents import copy_pages, page_map
from diskd.core.geometry import IMAGE_TOML, RAW, Geometry, Identity, decode_identity, encode_identity
from diskd.core.points import Catalogue
from diskd.core.ports import ChangeReport
from diskd.core.shared import create_area
from diskd.core.steps import Allocate, Punch, Replace, Script, Step, Sync, Truncate, Write
from diskd.core.tracker import (
    Tracker,
    commit,
    flush,
    join_segments,
    next_header,
    remove_segment,
    replace_catalogue,
    store_interval,
    switch_interval,
)
from diskd.errors import Damaged
from diskd.sim.disk import SimDisk

Task: TypeAlias = Generator[Step | None, Any, None]

# Small pages and regions, so that a short run crosses many of their borders: several bitmap pages, two MRT
# records, a last region and a last page that are not full.
BLOCK_BYTES: Final = 512
GEOMETRY: Final = Geometry.check(32_005 * BLOCK_BYTES, BLOCK_BYTES, 8 * BLOCK_BYTES, 512)
_HOT_BLOCKS: Final = (0, 6, 17, 4090, 4097, 8 * 3839, 8 * 3840 - 1, 8 * 3840 + 3, 31_990, 32_001)
_STEP_NS: Final = 1_000_000
_INTERVAL_NS: Final = 5_000_000_000
OPEN_REGIONS_MAX: Final = 6
_ROUNDS_MAX: Final = 20_000


class OracleMismatch(AssertionError):
    """An answer that is not a superset of the truth, or not as exact as it claims."""


@attrs.define
class _Cut:
    """What the oracle knows of a point: content at its cut, blocks admitted since, up to which size."""

    content: dict[int, bytes]
    size_bytes: int
    admitted: set[int] = attrs.Factory(set)


class SimImage:
    """An image that can crash anywhere. ``power_on`` opens it; ``spawn`` and ``settle`` run tasks."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.disk = SimDisk(rng)
        self.identity = Identity(UUID(int=rng.getrandbits(128)), GEOMETRY)
        self.oracle: dict[str, _Cut] = {}
        self.confirmed: set[str] = set()
        self.deleting: set[str] = set()
        self.now_ns = 1_000_000_000_000
        self.raw_time_ns = self.mrt_time_ns = self.now_ns
        self._version = 0
        self._point = 0
        self.disk.run(self._create())
        self.power_on()

    def _create(self) -> Script[None]:
        yield Truncate(RAW, GEOMETRY.size_bytes)
        yield Sync(RAW)
        yield from recovery.create(self.identity, self._uuid(), self._facts())
        yield Replace(IMAGE_TOML, encode_identity(self.identity))

    def _uuid(self) -> UUID:
        return UUID(int=self.rng.getrandbits(128))

    def _facts(self) -> mrt.RawFacts:
        return mrt.RawFacts(self.disk.size(RAW), self.raw_time_ns, self.raw_time_ns, 1)

    def power_on(self) -> recovery.Recovered:
        """Recover and be ready. Raises Crashed in the middle where the disk is told so."""
        identity = decode_identity(self.disk.peek(IMAGE_TOML))
        script = resize.resume(
            identity,
            self._facts(),
            mrt_changed_ns=self.mrt_time_ns,
            now_ns=self.now_ns,
            interval_ns=_INTERVAL_NS,
        )
        was = self.disk.size(RAW)
        with self._noting_mrt():
            try:
                self.identity = self.disk.run(script)
            finally:
                if self.disk.size(RAW) != was:
                    self.raw_time_ns = self.now_ns
        if self.disk.size(RAW) != self.size_bytes:
            raise Damaged("the raw file has another size than image.toml says")
        self._oracle_grows()
        around = recovery.Surroundings(
            memory=self.disk.shared,
            boot_id=UUID(int=self.disk.boot),
            raw=self._facts(),
            mrt_changed_ns=self.mrt_time_ns,
            now_ns=self.now_ns,
            interval_ns=_INTERVAL_NS,
            fresh_nonce=self.rng.randbytes(16),
            fresh_generation=self._uuid(),
        )
        with self._noting_mrt():
            recovered = self.disk.run(recovery.recover(self.identity, around))
        bound = OPEN_REGIONS_MAX * self.identity.geometry.region_bytes
        self.tracker = Tracker(self.identity, recovered, max_open_bytes=bound)
        self._tasks: list[tuple[Task, Any]] = []
        self._busy: set[str] = set()
        self._held = False
        self._writes = 0
        return recovered

    @contextlib.contextmanager
    def _noting_mrt(self) -> Iterator[None]:
        """The time of disk.mrt is that of whatever changes it."""
        before = self.disk.peek(mrt.FILE) if mrt.FILE in self.disk.names() else b""
        try:
            yield
        finally:
            if mrt.FILE in self.disk.names() and self.disk.peek(mrt.FILE) != before:
                self.mrt_time_ns = self.now_ns

    @property
    def size_bytes(self) -> int:
        return self.identity.geometry.size_bytes

    # --- scheduling --------------------------------------------------------------------------------

    def spawn(self, task: Task) -> None:
        """Let a task take part."""
        self._tasks.append((task, None))

    def settle(self) -> None:
        """Run until every task has ended. Raises Crashed where the disk does."""
        for _ in range(_ROUNDS_MAX):
            if not self._tasks:
                return
            index = self.rng.randrange(len(self._tasks))
            task, result = self._tasks.pop(index)
            try:
                step = task.send(result)
            except StopIteration:
                continue
            self.now_ns += _STEP_NS
            self._tasks.append((task, self._execute(step)))
        raise OracleMismatch("the tasks do not come to an end")

    def _execute(self, step: Step | None) -> Any:
        if step is None:
            return None
        result = self.disk.execute(step)
        if step.file == RAW and isinstance(step, Write | Punch | Truncate):
            self.raw_time_ns = self.now_ns
        elif step.file == mrt.FILE and isinstance(step, Write | Allocate):
            self.mrt_time_ns = self.now_ns
        return result

    def _turn(self, name: str) -> Iterator[None]:
        while name in self._busy:
            yield None
        self._busy.add(name)

    # --- tasks -------------------------------------------------------------------------------------

    def write(self, block: int, count: int) -> Task:
        """One guest write."""
        offset, length = block * BLOCK_BYTES, count * BLOCK_BYTES
        while self.is_held or not self.tracker.admit(offset, length):
            if self.is_held:
                yield None
            else:
                yield from self._open_regions(offset, length)
        for cut in self.oracle.values():
            cut.admitted.update(range(block, block + count))
        self._version += 1
        data = self._version.to_bytes(8, "little") * (length // 8)
        self.tracker.area.time_ns = self.now_ns
        self._writes += 1
        yield from self.submit(offset, data)
        self._writes -= 1

    @property
    def is_held(self) -> bool:
        """Whether a new write waits."""
        return self._held

    def submit(self, offset: int, data: bytes) -> Task:
        """Where the layer puts a write that was marked."""
        yield Write(RAW, offset, data)

    def _open_regions(self, offset: int, length: int) -> Task:
        closed = self.tracker.closed_regions(offset, length)
        self.tracker.want(closed)
        if not self.tracker.has_room(len(closed)):
            yield from self._turn("room")
            if not self.tracker.has_room(len(closed)):
                yield from self.flush()
            self._busy.remove("room")
            return
        yield from self._turn("commit")
        closed = self.tracker.closed_regions(offset, length)
        if closed:
            self.tracker.want(closed)
            yield from self._commit()
        self._busy.remove("commit")

    def _commit(self) -> Task:
        begun = self.tracker.begin_commit(self.now_ns)
        if begun is not None:
            yield from commit(self.tracker, begun)
            self.tracker.end_commit(begun)

    def sync(self) -> Task:
        """A guest's flush."""
        yield Sync(RAW)

    def flush(self) -> Task:
        """Image.flush_tracking."""
        begun = None
        while begun is None:
            yield from self._turn("flush")
            begun = self.tracker.begin_flush()
            if begun is None:
                self._busy.remove("flush")
                yield None
        root = yield from flush(self.tracker, begun)
        self.tracker.end_flush(begun, root)
        yield from self._turn("commit")
        yield from self._commit()
        self._busy.difference_update(("commit", "flush"))

    def cut(self, *, cancel: bool = False, confirm: bool = True) -> Task:
        """Prepare, hold, freeze, persist (or cancel), validate."""
        yield from self._turn("cut")
        yield from self._turn("flush")
        nonce = self.rng.randbytes(16)
        active = self.tracker.catalogue.active + 1
        boot = self.tracker.header.boot_id
        area = create_area(self.disk.shared, self.identity, self.tracker.generation, boot, nonce, active)
        yield from self._turn("commit")
        header = next_header(self.tracker, next_nonce=nonce)
        yield from mrt.write_header(self.identity, header, self.now_ns)
        self.tracker.prepare(area, header)
        self._busy.difference_update(("commit", "flush"))
        yield None
        self._held = True
        while self._writes:
            yield None
        self._point += 1
        point = f"rp-{self._point:016x}"
        self.tracker.freeze(point)
        self.switch_layer()
        self.oracle[point] = _Cut(self.disk.content(RAW), self.size_bytes)
        self._held = False
        yield None
        yield from self._cancel() if cancel else self._persist(point, confirm=confirm)
        self._busy.remove("cut")

    def switch_layer(self) -> None:
        """In the step of the freeze."""

    def _cancel(self) -> Task:
        yield from self._turn("flush")
        unused = self.tracker.unfreeze()
        yield from self._turn("commit")
        header = next_header(self.tracker, nonce=self.tracker.area.nonce, next_nonce=mrt.NO_NONCE)
        yield from mrt.write_header(self.identity, header, self.now_ns)
        self.tracker.header = header
        self.disk.shared.remove(unused.nonce)
        self._busy.difference_update(("commit", "flush"))

    def _persist(self, point: str, *, confirm: bool) -> Task:
        tracker = self.tracker
        yield from self._turn("flush")
        yield from self._turn("catalogue")
        frozen = tracker.frozen
        assert frozen is not None
        over = frozen.area.over_report_bytes
        catalogue = points.cut(tracker.catalogue, frozen.point, self.size_bytes, over)
        yield from store_interval(tracker, frozen.area, catalogue)
        yield Sync(RAW)
        yield from self._turn("commit")
        header = next_header(tracker, nonce=tracker.area.nonce, next_nonce=mrt.NO_NONCE)
        yield from replace_catalogue(self.identity, catalogue)
        root = yield from switch_interval(tracker, catalogue, header, self.now_ns)
        done = tracker.persisted(catalogue, root, header)
        self.disk.shared.remove(done.nonce)
        if confirm:
            yield from self._replace(points.validate(tracker.catalogue, point))
            self.confirmed.add(point)
        self._busy.difference_update(("commit", "catalogue", "flush"))

    def delete(self, point: str) -> Task:
        """Image.delete_point."""
        yield from self._turn("catalogue")
        self.deleting.add(point)
        before = self.tracker.catalogue
        yield from self._replace(points.delete(before, point))
        for segment in before.segments:
            if segment not in self.tracker.catalogue.segments:
                yield from remove_segment(segment)
        self._busy.remove("catalogue")
        yield from self._join()

    def _join(self) -> Task:
        yield from self._turn("catalogue")
        while (pair := points.joinable(self.tracker.catalogue)) is not None:
            tracker = self.tracker
            script = join_segments(self.identity, tracker.generation, tracker.catalogue, pair)
            tracker.catalogue = yield from script
            yield from remove_segment(pair[1])
        self._busy.remove("catalogue")

    def _replace(self, catalogue: Catalogue) -> Task:
        yield from replace_catalogue(self.identity, catalogue)
        self.tracker.catalogue = catalogue

    def resize(self, size_bytes: int) -> Task:
        """shell.resize.grow: reserve, hold, record, carry out."""
        yield from self._turn("cut")
        identity = resize.grown(self.identity, size_bytes)
        if identity != self.identity:
            yield from self._grow(identity)
            yield from self._join()
        self._busy.remove("cut")

    def _grow(self, identity: Identity) -> Task:
        tracker = self.tracker
        nonce, active = self.rng.randbytes(16), tracker.catalogue.active + 1
        generation, boot = tracker.generation, tracker.header.boot_id
        area = create_area(self.disk.shared, identity, generation, boot, nonce, active)
        yield from self._turn("commit")
        yield from resize.reserve(identity, self.now_ns)
        self._busy.remove("commit")
        self._held = True
        while self._writes:
            yield None
        for turn in ("flush", "catalogue", "commit"):
            yield from self._turn(turn)
        intent = resize.plan(tracker, self._facts(), identity.geometry.size_bytes, self.now_ns)
        yield from resize.record(tracker, intent)
        area.time_ns = self.now_ns + _INTERVAL_NS // 5
        header = resize.live_header(tracker, intent, nonce)
        yield from resize.carry_out(identity, intent, header, self.now_ns)
        old = tracker.resized(identity, resize.recovered(identity, intent, header, area))
        self.identity = identity
        self._oracle_grows()
        self.disk.shared.remove(old.nonce)
        self._held = False
        self._busy.difference_update(("commit", "catalogue", "flush"))

    def close(self) -> Task:
        """Image.close, with no other task about."""
        yield Sync(RAW)
        while not self.tracker.is_settled:
            yield from self.flush()
        nonce = self.tracker.area.nonce
        header = next_header(
            self.tracker,
            clean=True,
            nonce=mrt.NO_NONCE,
            next_nonce=mrt.NO_NONCE,
            root_sequence=self.tracker.root.sequence,
            time_ns=self.now_ns,
            raw=self._facts(),
        )
        yield from mrt.write_header(self.identity, header, self.now_ns)
        self.disk.shared.remove(nonce)

    def random_write(self) -> Task:
        """A few blocks, mostly near the borders of regions, pages and records."""
        block = self.rng.choice(_HOT_BLOCKS) + self.rng.randrange(3)
        count = self.rng.choice((1, 1, 2, 9)) if block < 32_001 - 9 else 1
        added = self.size_bytes // BLOCK_BYTES - 32_006
        if added > 0 and self.rng.random() < 0.4:
            block, count = 32_004 + self.rng.randrange(added), self.rng.choice((1, 2))
        return self.write(block, count)

    def random_resize(self) -> Task:
        """A little or a lot larger, so that pages and records of the side files are added, or none."""
        return self.resize(self.size_bytes + self.rng.choice((1, 9, 700, 5_000, 40_000)) * BLOCK_BYTES)

    # --- the oracle --------------------------------------------------------------------------------

    def changes_since(self, point: str, until: str | None = None) -> ChangeReport:
        """Image.changes_since."""
        span = points.span(self.tracker.catalogue, point, until)
        generation = self.tracker.generation
        closed = [
            self.disk.run(interval.load(self.identity, generation, segment)) for segment in span.segments
        ]
        over = 0
        if span.with_active:
            for area, used in self.tracker.used_pages():
                pages = copy_pages(area.bits[:], GEOMETRY.page_bytes, used)
                if pages.keys() < page_map(area.bits, GEOMETRY.page_bytes).keys():
                    raise OracleMismatch("a page of the active bitmap is overlooked")
                closed.append(pages)
                over += area.over_report_bytes
        return report(self.identity.geometry, span, interval.unite(closed), active_over_report_bytes=over)

    def _oracle_grows(self) -> None:
        """What lies beyond a point's size counts as changed since."""
        blocks = -(-self.size_bytes // BLOCK_BYTES)
        for cut in self.oracle.values():
            cut.admitted.update(range(cut.size_bytes // BLOCK_BYTES, blocks))
            cut.size_bytes = self.size_bytes

    def check(self) -> None:
        """T2, T3 and B3 against the oracle. Raises OracleMismatch."""
        known = {point.id: point for point in self.tracker.catalogue.points}
        if gone := self.confirmed - self.deleting - known.keys():
            raise OracleMismatch(f"{sorted(gone)} were valid and are gone")
        for point in known.values():
            if point.state == "invalid":
                raise OracleMismatch(f"{point.id} became invalid: {point.reason}")
            if point.state == "valid":
                self.check_point(point.id)
        valid = [point.id for point in known.values() if point.state == "valid"]
        for older, newer in itertools.pairwise(valid):
            _require_superset(
                self.oracle[older].content,
                self.oracle[newer].content,
                _blocks(self.changes_since(older, newer)),
                f"{older}..{newer}",
            )

    def check_point(self, point: str) -> None:
        """The answer for one point. Raises OracleMismatch, or whatever the asking raises (T4)."""
        cut, answer = self.oracle[point], self.check_superset(point)
        reported = _blocks(answer)
        excess = reported - cut.admitted
        if len(excess) * BLOCK_BYTES > answer.over_report_bytes:
            raise OracleMismatch(f"since {point}: blocks {sorted(excess)[:9]} are reported without reason")

    def check_superset(self, point: str) -> ChangeReport:
        """The answer for one point, which lacks nothing (T2). Raises as ``check_point``."""
        answer = self.changes_since(point)
        _require_superset(self.oracle[point].content, self.disk.content(RAW), _blocks(answer), point)
        return answer

    def check_complete(self) -> None:
        """Where no power was lost: exactly the admitted blocks, since every point (T3)."""
        for point in self.tracker.catalogue.points:
            if point.state == "valid":
                answer = self.changes_since(point.id)
                if not answer.exact or _blocks(answer) != self.oracle[point.id].admitted:
                    raise OracleMismatch(f"since {point.id}: not exact")


def _blocks(answer: ChangeReport) -> set[int]:
    found: set[int] = set()
    for offset, length in answer.extents:
        found.update(range(offset // BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES)))
    return found


def _require_superset(then: dict[int, bytes], now: dict[int, bytes], reported: set[int], what: str) -> None:
    changed = {block for block in then.keys() | now.keys() if then.get(block) != now.get(block)}
    if missed := changed - reported:
        raise OracleMismatch(f"since {what}: blocks {sorted(missed)[:9]} changed and are not reported")

"""Histories of one checkpoint that end in a crash: shared by the tests and by `make hunt` (B1, B2, B6).

Fork, writes, flush, invalidation and merge: the same plans and scripts that the shell runs are interleaved
here by a seeded scheduler, step by step, on a disk that loses, tears and reorders what was not synced. After
each crash the disk is recovered (crashing again meanwhile, sometimes), merged, and compared with a naive
oracle: no flushed write may be lost, a crash of the daemon alone may lose nothing that was acknowledged, and
a sealed frozen view is the image at the cut, byte for byte.
"""

from collections.abc import Callable, Generator
from random import Random
from typing import Any, Final, TypeAlias

from diskd.core import avhd, checkpoint, merge, overlay
from diskd.core.avhd import AvhdMap, Head
from diskd.core.checkpoint import Record, RecordDisk
from diskd.core.inventory import Outcome
from diskd.core.steps import Punch, Step, Sync, Truncate, Write
from diskd.sim.disk import Crashed, SimDisk
from diskd.sim.image import OracleMismatch

SECTOR: Final = 512
BLOCK: Final = 1024
SECTORS: Final = 23  # eleven blocks and a half
SIZE: Final = SECTORS * SECTOR
SHARED: Final = (5, 7, 17)  # second sectors of blocks, which only the second guest writes
HEAD: Final = Head("cp-0123456789abcdef", "uuid", SIZE, BLOCK, "0011223344556677", "live")
RECORD: Final = Record(
    HEAD.checkpoint, "web", "rp-0123456789abcdef", "hand", "crash", 1, "", [RecordDisk("d", "a", "uuid")]
)

Task: TypeAlias = Generator[Step | None, Any, None]  # None: nothing to do until something changes


class Oracle:
    """Per sector: what has been written since the value that a flush has promised."""

    def __init__(self) -> None:
        self.history: list[list[bytes]] = [[bytes(SECTOR)] for _ in range(SECTORS)]
        self.acknowledged = [0] * SECTORS  # indexes into history
        self.promised = [0] * SECTORS
        self.in_flight: dict[int, int] = {}

    def submit(self, sector: int, value: bytes) -> None:
        self.history[sector].append(value)
        self.in_flight[sector] = len(self.history[sector]) - 1

    def acknowledge(self, sector: int) -> None:
        self.acknowledged[sector] = self.in_flight.pop(sector)

    def flush(self) -> Callable[[], None]:
        """Call the result when the flush has been answered."""
        promised = list(self.acknowledged)

        def done() -> None:
            self.promised = [max(pair) for pair in zip(self.promised, promised, strict=True)]

        return done

    def content(self) -> bytes:
        return b"".join(self.history[s][self.acknowledged[s]] for s in range(SECTORS))

    def check(self, content: bytes, *, power_loss: bool) -> None:
        for sector in range(SECTORS):
            found = content[sector * SECTOR : (sector + 1) * SECTOR]
            oldest = self.promised[sector] if power_loss else self.acknowledged[sector]
            allowed = self.history[sector][oldest:]
            if found not in allowed:
                raise OracleMismatch(
                    f"sector {sector}: {found[:8]!r} is none of {[value[:8] for value in allowed]}"
                )


class System:
    """One image and its checkpoint, as the shell drives them: tasks interleaved step by step."""

    def __init__(self, disk: SimDisk, rng: Random, oracle: Oracle) -> None:
        self.disk, self.rng, self.oracle = disk, rng, oracle
        self.map: AvhdMap | None = None
        self.merge: merge.Merge | None = None
        self.layered = False  # the overlay is the image's layer
        self.held = False
        self.writes = 0
        self.busy: set[int] = set()
        self.map_locked = False
        self.frozen: bytes | None = None
        self.cut: bytes | None = None
        self.record: Record | None = None
        self.parent_is_synced = False
        self.late = ""  # whether the seal's rename fails late, "once" or "twice"
        self.serial = 0
        self.idle_guests = 0
        self.guests = 0

    # --- the guest -------------------------------------------------------------------------------------

    def guest(self, count: int, sectors: list[int], *, single: bool, fail_at: int | None = None) -> Task:
        self.guests += 1
        for number in range(count):
            kind = self.rng.choice(("write", "write", "write", "zero", "flush"))
            if fail_at == number:
                yield from self.invalidate()
            if kind == "flush":
                yield from self.flush()
                continue
            first = self.rng.randrange(len(sectors))
            length = 1 if single else self.rng.randrange(1, 7)
            chosen = [sectors[first]]
            for sector in sectors[first + 1 : first + length]:
                if sector != chosen[-1] + 1:
                    break
                chosen.append(sector)
            if kind == "write":
                yield from self.write(chosen)
            else:
                yield from self.zero(chosen)
        self.idle_guests += 1

    def write(self, sectors: list[int]) -> Task:
        yield from self.admitted()
        data = b""
        for sector in sectors:
            self.serial += 1
            value = f"{sector}:{self.serial}".encode().ljust(SECTOR, b".")
            self.oracle.submit(sector, value)
            data += value
        yield from self.submit(sectors[0] * SECTOR, data)
        self.acknowledge(sectors)

    def admitted(self) -> Task:
        """As shell.image does: a write waits for the hold, and the hold for it (B1)."""
        while self.held:
            yield None
        self.writes += 1

    def acknowledge(self, sectors: list[int]) -> None:
        self.writes -= 1
        for sector in sectors:
            self.oracle.acknowledge(sector)

    def submit(self, offset: int, data: bytes) -> Task:
        if not self.layered:
            yield Write(avhd.PARENT_FILE, offset, data)
            return
        assert self.map is not None
        first, count = overlay.block_span(self.map, offset, len(data))
        blocks = set(range(first, first + count))
        while True:
            pieces = None
            if not self.busy & blocks:
                pieces = overlay.plan_write(self.map, self.merge, offset, len(data))
            if pieces is not None:
                break
            yield None
        self.busy |= blocks
        yield from overlay.write_avhd(self.map, pieces, offset, data)
        overlay.commit(self.map, pieces)
        yield from overlay.write_parent(pieces, offset, data)
        self.busy -= blocks

    def zero(self, sectors: list[int]) -> Task:
        yield from self.admitted()
        offset, length = sectors[0] * SECTOR, len(sectors) * SECTOR
        for sector in sectors:
            self.oracle.submit(sector, bytes(SECTOR))
        if not self.layered:
            yield Punch(avhd.PARENT_FILE, offset, length)
        else:
            yield from self.zero_layered(offset, length)
        self.acknowledge(sectors)

    def zero_layered(self, offset: int, length: int) -> Task:
        assert self.map is not None
        first, count = overlay.block_span(self.map, offset, length)
        while True:
            plan = None
            if not self.busy & set(range(first, first + count)):
                plan = overlay.plan_zeroes(self.map, self.merge, offset, length)
            if plan is not None:
                break
            yield None
        overlay.commit_zeroes(self.map, plan)
        for start, size in plan.parent:
            yield Punch(avhd.PARENT_FILE, start, size)
        for start, size in plan.edges:
            yield from self.submit(start, bytes(size))

    def flush(self) -> Task:
        done = self.oracle.flush()
        layered = self.layered
        if layered:
            yield from self.flush_overlay()
        else:
            yield Sync(avhd.PARENT_FILE)
        done()

    def flush_overlay(self) -> Task:
        while self.map_locked:
            yield None
        if not self.layered:  # disposed of meanwhile
            yield Sync(avhd.PARENT_FILE)
            return
        assert self.map is not None
        self.map_locked = True
        parent = self.merge is not None or not self.parent_is_synced
        yield from avhd.flush(self.map.take_dirty(), parent=parent)
        self.map_locked = False

    # --- the checkpoint --------------------------------------------------------------------------------

    def life(self, outcome: Outcome) -> Task:
        yield from checkpoint.reserve()
        self.record = RECORD
        yield from checkpoint.persist(RECORD)
        yield from avhd.create(HEAD)
        new = AvhdMap.empty(HEAD)
        self.held = True
        while self.writes:
            yield None
        self.map, self.layered, self.parent_is_synced = new, True, False
        self.cut = self.oracle.content()
        self.held = False
        yield Sync(avhd.PARENT_FILE)
        self.parent_is_synced = True
        if self.merge is None:
            sealed = checkpoint.advance(RECORD, "sealed")
            yield from checkpoint.persist(sealed)
            if self.late:
                yield from self.undo()
                return
            self.record = sealed
            self.frozen = self.cut if self.merge is None else None
        for _ in range(self.rng.randrange(5, 60)):
            yield None
        ended = checkpoint.advance(
            self.record, "end", outcome if self.record.state == "sealed" else "discard"
        )
        yield from checkpoint.persist(ended)
        self.record = ended
        self.frozen = None
        yield from self.finish(ended)

    def undo(self) -> Task:
        """The seal's rename took effect, and then its directory could not be synced: the shell takes it for a
        begin that failed. Its next record may meet the same, and then the flag has to do."""
        ended = checkpoint.advance(RECORD, "end", "discard")
        if self.late == "once":
            yield from checkpoint.persist(ended)
        else:
            yield from checkpoint.invalidate(RECORD)
        self.record = ended
        yield from self.finish(ended)

    def finish(self, ended: Record) -> Task:
        assert self.map is not None
        if self.merge is None:
            self.merge = merge.Merge(self.map, 3)
        settled = checkpoint.advance(ended, "points_settled")
        if self.late != "twice":  # then nothing can be recorded before the merge is through
            yield from checkpoint.persist(settled)
        yield from self.run_merge()
        yield from checkpoint.persist(checkpoint.advance(settled, "merged"))

    def invalidate(self) -> Task:
        """An AVHD could not take a write: first the flag, durably, then the parent may change (B2)."""
        if self.layered and self.record is not None and self.record.is_standing and self.merge is None:
            yield from checkpoint.invalidate(self.record)
            self.frozen = None
            if self.merge is None and self.map is not None:
                self.merge = merge.Merge(self.map, 3)

    def run_merge(self) -> Task:
        while True:
            assert self.map is not None
            assert self.merge is not None
            if self.map.entries == 0:
                self.held = True
                while self.writes:
                    yield None
                if self.map.entries == 0:
                    self.layered = False
                    self.held = False
                    break
                self.held = False
            yield from self.merge_batch(self.map, self.merge)
        while self.map_locked:
            yield None
        self.map_locked = True
        yield from avhd.remove()
        self.map_locked = False

    def merge_batch(self, states: AvhdMap, running: merge.Merge) -> Task:
        runs = running.start_batch(self.busy)
        if not runs:
            running.claim()
            yield None
            return
        yield from running.copy(runs)
        while self.map_locked:
            yield None
        self.map_locked = True
        blocks = running.submit_clear()
        yield from running.clear(blocks)
        ranges = running.forget()
        running.abandon_batch()
        self.map_locked = False
        yield from merge.punch(ranges)

    # --- scheduling ------------------------------------------------------------------------------------

    def run(self, tasks: list[Task]) -> None:
        """Until all are done. Raises Crashed."""
        ready: list[tuple[Task, Step | None]] = []
        for task in tasks:
            self._advance(task, None, ready)
        while ready:
            task, step = ready.pop(self.rng.randrange(len(ready)))
            result = self.disk.execute(step) if step is not None else None
            self._advance(task, result, ready)
            if self.frozen is not None:
                _require(self.disk.peek(avhd.PARENT_FILE) == self.frozen, "the frozen view changed")

    @staticmethod
    def _advance(task: Task, result: Any, ready: list[tuple[Task, Step | None]]) -> None:
        try:
            ready.append((task, task.send(result)))
        except StopIteration:
            return


def read_all(system: System) -> bytes:
    if not system.layered or system.map is None:
        return system.disk.peek(avhd.PARENT_FILE)
    runs = system.map.runs(0, HEAD.blocks)
    return system.disk.run(overlay.read(BLOCK, runs, 0, SIZE))


def recover(disk: SimDisk, lives: dict[str, Any], rng: Random, cut: bytes | None) -> bytes:
    """What the start does: take up the record and the AVHD, then merge. Returns the image's content.

    ``lives`` is the shared memory: the mapped copies of the map by nonce, which a power loss clears.
    """
    loaded = disk.run(checkpoint.load())
    head = disk.run(avhd.load_head())
    record: Record | None = None
    if loaded is not None:
        record, invalid = loaded
        decision = checkpoint.recover(record, invalid=invalid)
        if decision.standing:
            # The frozen view survived: it is the image at the cut, whatever kind of crash this was.
            _require(disk.peek(avhd.PARENT_FILE) == cut, "the frozen view did not survive")
            decision = checkpoint.Recovery("discard", standing=False)
        if decision.end is not None:
            record = checkpoint.advance(record, "end", decision.end)
            disk.run(checkpoint.persist(record))
    if head is not None:
        cells = disk.run(avhd.load_cells(head))
        live = lives.get(head.live_nonce)
        nonce = f"live{len(head.live_nonce)}{rng.random()}"
        states = AvhdMap.over(head, bytearray(cells if live is None else live.tobytes()))
        lives[nonce] = states.cells
        if live is not None:
            states.mark_all_dirty()
            disk.run(avhd.flush(states.take_dirty(), parent=True))
        states.head = disk.run(avhd.renew(head, nonce))
        system = System(disk, rng, Oracle())
        system.map, system.layered = states, True
        system.merge = merge.Merge(states, 3)
        before = read_all(system)
        system.run([system.run_merge()])
        _require(disk.peek(avhd.PARENT_FILE) == before, "merging changed the content")
    else:
        disk.run(avhd.remove())
    if record is not None:
        if record.state == "ending":
            record = checkpoint.advance(record, "points_settled")
        if record.state == "merging":
            record = checkpoint.advance(record, "merged")
        disk.run(checkpoint.persist(record))
    return disk.peek(avhd.PARENT_FILE)


def play(seed: int, crash_at: int | None, kind: str) -> int:
    """One run; returns how many steps it had."""
    rng = Random(seed)
    disk = SimDisk(Random(seed * 7919 + (crash_at or 0)))
    oracle = Oracle()
    disk.run(iter_steps([Truncate(avhd.PARENT_FILE, SIZE), Sync(avhd.PARENT_FILE)]))
    system = System(disk, rng, oracle)
    system.late = {3: "once", 5: "twice"}.get(seed % 8, "")
    own = [sector for sector in range(SECTORS) if sector not in SHARED]
    tasks = [
        system.guest(20, own, single=False, fail_at=rng.randrange(4, 18) if seed % 3 == 0 else None),
        system.guest(10, list(SHARED), single=True),
        system.life("keep" if seed % 2 else "pending"),
    ]
    disk.crash_in = crash_at
    start = disk.steps
    try:
        system.run(tasks)
    except Crashed:
        pass
    else:
        _require(disk.peek(avhd.PARENT_FILE) == oracle.content(), "a write got lost")
        _require(avhd.HEAD_FILE not in disk.names(), "the AVHD is left behind")
        return disk.steps - start
    again = Random(seed + (crash_at or 0))
    lives = {} if system.map is None else {HEAD.live_nonce: system.map.cells}
    power_loss = crash_one(disk, lives, kind, again)
    content: bytes | None = None
    while content is None:
        disk.crash_in = again.randrange(60) if again.random() < 0.5 else None
        try:
            content = recover(disk, lives, again, system.cut)
        except Crashed:
            power_loss |= crash_one(disk, lives, kind, again)
    oracle.check(content, power_loss=power_loss)
    return disk.steps - start


def crash_one(disk: SimDisk, lives: dict[str, Any], kind: str, rng: Random) -> bool:
    chosen = rng.choice(("power", "daemon")) if kind == "mixed" else kind
    if chosen == "power":
        disk.power_loss()
        lives.clear()
    else:
        disk.daemon_crash()
    return chosen == "power"


def iter_steps(steps: list[Step]) -> Generator[Step, Any, None]:
    yield from steps


def run_seed(seed: int) -> int:
    """One random history, fixed by ``seed``. Raises OracleMismatch."""
    rng = Random(f"overlay {seed}")
    return play(seed, rng.randrange(200), rng.choice(("power", "daemon", "mixed")))


def _require(truth: bool, otherwise: str) -> None:
    if not truth:
        raise OracleMismatch(otherwise)

"""Histories of a tracked image that is forked and merged while it is written: T2 and T3 where B6 is at work.

sim.image has the tracking, sim.overlay_story the fork and its merge; here both run on one disk, as in
shell/checkpoints.py: the freeze of the bitmap and the switch of the layer are one step, what is merged was
marked long ago, and a crash anywhere is followed by the recovery of both, which may crash as well.
"""

import contextlib
from random import Random
from typing import Any, Final

import attrs

from diskd.core import avhd, merge, recovery
from diskd.core.avhd import AvhdMap, Head
from diskd.core.geometry import RAW
from diskd.core.steps import Punch, Step, Sync, Write
from diskd.sim.disk import Crashed
from diskd.sim.image import BLOCK_BYTES, GEOMETRY, OracleMismatch, SimImage, Task
from diskd.sim.overlay_story import Oracle, System
from diskd.sim.tracking_story import KINDS, crash

# A history has about this many steps; a crash is chosen among them.
STEPS_TYPICAL: Final = 150
_BATCH_BLOCKS: Final = 3


class ForkedImage(SimImage):
    """An image whose cuts put an AVHD over it, which is merged again afterwards."""

    def __init__(self, rng: Random) -> None:
        self._lives: dict[tuple[int, str], Any] = {}  # mapped copies of the map, by boot and nonce
        self._next: AvhdMap | None = None
        super().__init__(rng)

    def power_on(self) -> recovery.Recovered:
        """Recover tracking, then put a left-behind AVHD over the image again, to be merged."""
        recovered = super().power_on()
        self.fork = System(self.disk, self.rng, Oracle())
        self._next = None
        head = self.disk.run(avhd.load_head())
        if head is None:
            self.disk.run(avhd.remove())
            return recovered
        live = self._lives.get((self.disk.boot, head.live_nonce))
        cells = self.disk.run(avhd.load_cells(head))
        states = AvhdMap.over(head, bytearray(cells if live is None else live.tobytes()))
        nonce = self._live(states)
        if live is not None:
            states.mark_all_dirty()
            self.disk.run(avhd.flush(states.take_dirty(), parent=True))
        states.head = self.disk.run(avhd.renew(head, nonce))
        self.fork.map, self.fork.layered = states, True
        self.fork.merge = merge.Merge(states, _BATCH_BLOCKS)
        self.spawn(self._merged())
        return recovered

    def _live(self, states: AvhdMap) -> str:
        nonce = f"{self.rng.getrandbits(64):016x}"
        self._lives[self.disk.boot, nonce] = states.cells
        return nonce

    # --- the layer ---------------------------------------------------------------------------------

    @property
    def is_held(self) -> bool:
        """Also while the end of a merge holds the writes."""
        return super().is_held or self.fork.held

    def submit(self, offset: int, data: bytes) -> Task:
        """To the raw file, to the AVHD, or to both."""
        self.fork.writes += 1
        yield from self.fork.submit(offset, data)
        self.fork.writes -= 1

    def switch_layer(self) -> None:
        """The AVHD takes what is written from here on."""
        if self._next is not None:
            self.fork.map, self.fork.merge, self._next = self._next, None, None
            self.fork.layered, self.fork.parent_is_synced = True, False

    def sync(self) -> Task:
        """A guest's flush."""
        yield from self.fork.flush_overlay() if self.fork.layered else iter((Sync(RAW),))

    def _execute(self, step: Step | None) -> Any:
        if isinstance(step, Write | Punch) and step.file == RAW:
            if self.fork.layered and self.fork.merge is None:
                raise OracleMismatch("a write reached the frozen parent")
            self.tracker.area.time_ns = self.now_ns  # as shell.overlay notes it for a merge
        return super()._execute(step)

    # --- tasks -------------------------------------------------------------------------------------

    def checkpoint(self, *, cancel: bool, confirm: bool) -> Task:
        """Fork, cut, and merge: Checkpoints._begin and _merge."""
        yield from self._turn("fork")
        nonce = f"{self.rng.getrandbits(64):016x}"
        blank = Head("cp-0123456789abcdef", "uuid", GEOMETRY.size_bytes, BLOCK_BYTES, nonce, "")
        states = AvhdMap.empty(blank)
        states.head = attrs.evolve(blank, live_nonce=self._live(states))
        yield from avhd.create(states.head)
        self._next = states
        yield from self.cut(cancel=cancel, confirm=confirm)
        self.fork.parent_is_synced = not cancel
        for _ in range(self.rng.randrange(30)):
            yield None
        yield from self._merged()
        self._busy.remove("fork")

    def give_up(self) -> Task:
        """The AVHD could not take a write (B2): merging starts, wherever the checkpoint is."""
        for _ in range(self.rng.randrange(60)):
            yield None
        if self.fork.layered and self.fork.merge is None and self.fork.map is not None:
            self.fork.merge = merge.Merge(self.fork.map, _BATCH_BLOCKS)

    def _merged(self) -> Task:
        if self.fork.merge is None and self.fork.map is not None:
            self.fork.merge = merge.Merge(self.fork.map, _BATCH_BLOCKS)
        yield from self.fork.run_merge()


def _begin(image: ForkedImage) -> None:
    """Everything at once."""
    rng = image.rng
    for _ in range(14):
        image.spawn(image.random_write())
    for _ in range(rng.randrange(3)):
        image.spawn(image.flush())
        image.spawn(image.sync())
    for _ in range(rng.randint(1, 2)):
        image.spawn(image.checkpoint(cancel=rng.random() < 0.2, confirm=rng.random() < 0.7))
    if rng.random() < 0.3:
        image.spawn(image.give_up())
    if image.confirmed and rng.random() < 0.3:
        image.spawn(image.delete(rng.choice(sorted(image.confirmed))))


def _recover(image: ForkedImage, kind: str) -> None:
    """Recover and merge to the end, crashing on the way now and then."""
    for _ in range(image.rng.randrange(3)):
        image.disk.crash_in = image.rng.randrange(60)
        with contextlib.suppress(Crashed):
            image.power_on()
            image.spawn(image.random_write())
            image.settle()
        crash(image, kind)
    image.power_on()
    image.settle()


def play(seed: int, crash_at: int | None, kind: str) -> int:
    """One history with a crash before step ``crash_at``; how many steps it had. Raises OracleMismatch."""
    image = ForkedImage(Random(seed))
    for _ in range(2):
        for _ in range(3):
            image.spawn(image.random_write())
        image.spawn(image.checkpoint(cancel=False, confirm=True))
        image.settle()
    before = image.disk.steps
    image.disk.crash_in = crash_at
    try:
        _begin(image)
        image.settle()
    except Crashed:
        pass
    steps = image.disk.steps - before
    crash(image, kind)
    _recover(image, kind)
    image.check()
    if kind == "daemon":
        image.check_complete()
    # Life goes on, and the next crash finds everything again.
    _begin(image)
    image.settle()
    image.check()
    other = image.rng.choice(KINDS)
    crash(image, other)
    _recover(image, other)
    image.check()
    return steps


def run_seed(seed: int) -> int:
    """One random history, fixed by ``seed``. Raises OracleMismatch."""
    rng = Random(f"fork {seed}")
    return play(seed, rng.randrange(STEPS_TYPICAL), rng.choice(KINDS))

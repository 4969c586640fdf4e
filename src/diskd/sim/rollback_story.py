"""Histories after which somebody puts back an older copy of a side file, the others being as they are.

Copies of all side files are taken before every step of a history. It ends in a clean close, a crash of the
daemon or a power loss; an hour later one copy, or some of them, take the place of what is there. Then
every answer must still be a superset of the truth, or be refused (T4): at once, and after more life and a
power loss.
"""

from collections.abc import Sequence
from random import Random
from typing import Final

from diskd.core.geometry import RAW
from diskd.core.steps import Remove, Replace, Script, Step
from diskd.errors import Damaged, NoSuchPoint
from diskd.sim.disk import Crashed
from diskd.sim.image import OracleMismatch, SimImage
from diskd.sim.tracking_story import STEPS_TYPICAL, begin_story, crash, prepared

ENDS: Final = ("clean", "daemon", "power")
_MINUTE_NS: Final = 60 * 10**9

Copies = dict[str, bytes]


class Copier:
    """Remembers the side files as they were before every step. Half of one being replaced is no copy."""

    def __init__(self, image: SimImage) -> None:
        self.image = image
        self.taken: list[Copies] = []
        self._known: Copies = {}

    def __call__(self, step: Step) -> None:
        disk = self.image.disk
        self._known = {name: disk.peek(name) for name in disk.names() if name != RAW}
        self.taken.append(self._known)


def _put_back(names: Sequence[str], copies: Copies) -> Script[None]:
    for name in names:
        yield Replace(name, copies[name]) if name in copies else Remove(name)


def history(seed: int, crash_at: int | None, end: str) -> tuple[SimImage, list[Copies]]:
    """A few rounds of everything, ended in one of the three ways; the copies, oldest first."""
    image = prepared(seed)
    copier = Copier(image)
    image.disk.before_step = copier
    try:
        for _ in range(image.rng.randint(1, 2)):
            begin_story(image)
            image.settle()
            if image.rng.random() < 0.5:
                image.spawn(image.close())
                image.settle()
                image.now_ns += _MINUTE_NS
                image.power_on()
            image.now_ns += _MINUTE_NS
        begin_story(image)
        image.disk.crash_in = crash_at
        image.settle()
        if end == "clean":
            image.disk.crash_in = None
            image.spawn(image.close())
            image.settle()
    except Crashed:
        pass
    image.disk.before_step = None
    crash(image, "power" if end == "power" else "daemon")
    return image, copier.taken


def superset_or_refused(image: SimImage) -> int:
    """How many points were answered. Raises OracleMismatch where an answer lacks a change."""
    answered = 0
    for point in image.tracker.catalogue.points:
        if point.state != "valid":
            continue
        try:
            image.check_superset(point.id)
            answered += 1
        except (Damaged, NoSuchPoint):
            continue
    return answered


def run_rollback(seed: int, crash_at: int | None, end: str) -> tuple[int, str]:
    """One history and one thing put back; how many points were answered, and how it was opened or refused."""
    image, copies = history(seed, crash_at, end)
    rng = Random(f"rollback {seed} {crash_at} {end}")
    older = rng.choice(copies)
    names = sorted(older.keys() | {name for name in image.disk.names() if name != RAW})
    # One alone most of the time, else any of them, all from the same time.
    chosen = [rng.choice(names)] if rng.random() < 0.6 else rng.sample(names, rng.randint(1, len(names)))
    image.disk.run(_put_back(chosen, older))
    image.mrt_time_ns = image.now_ns if "disk.mrt" in chosen else image.mrt_time_ns
    try:
        how = image.power_on().how
    except Damaged:
        return 0, "refused"
    answered = superset_or_refused(image)
    for _ in range(4):
        image.spawn(image.random_write())
    image.settle()
    superset_or_refused(image)
    crash(image, "power")
    try:
        image.power_on()
    except Damaged as error:
        raise OracleMismatch(f"{chosen} were put back and believed, and then: {error}") from error
    superset_or_refused(image)
    return answered, how


def run_seed(seed: int) -> None:
    """One random history, fixed by ``seed``. Raises OracleMismatch."""
    rng = Random(f"rollback seed {seed}")
    run_rollback(seed, rng.choice([None, rng.randrange(STEPS_TYPICAL)]), rng.choice(ENDS))

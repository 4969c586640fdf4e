"""Histories of one tracked image that end in a crash: shared by the tests and by `make hunt`.

A history is everything at once (writes, flushes, cuts, a deletion), a crash before a chosen step, a recovery
that crashes too on its way, and life going on. T2 and T3 are checked after each part (sim.image).
"""

import contextlib
from random import Random
from typing import Final

from diskd.sim.disk import Crashed
from diskd.sim.image import OracleMismatch, SimImage

# A history has about this many steps; a crash is chosen among them.
STEPS_TYPICAL: Final = 110
# So has a recovery; one that finishes a resize has more.
RECOVERY_STEPS_TYPICAL: Final = 36

KINDS: Final = ("daemon", "power")
_HOUR_NS: Final = 3600 * 10**9


def prepared(seed: int) -> SimImage:
    """An image with some history: four valid points and writes around them."""
    image = SimImage(Random(seed))
    for _ in range(4):
        for _ in range(3):
            image.spawn(image.random_write())
        image.settle()
        image.spawn(image.cut())
        image.settle()
    return image


def begin_story(image: SimImage) -> None:
    """Everything at once: writes, flushes of both kinds, a cut, a cancelled cut, the deletion of a point, a
    resize."""
    rng = image.rng
    for _ in range(10):
        image.spawn(image.random_write())
    tasks = [
        image.flush(),
        image.flush(),
        image.sync(),
        image.cut(),
        image.cut(cancel=True),
        image.cut(confirm=rng.random() < 0.5),
        image.delete(rng.choice(sorted(image.confirmed))),
        image.random_resize(),
    ]
    for task in rng.sample(tasks, rng.randint(3, len(tasks))):
        image.spawn(task)


def crash(image: SimImage, kind: str) -> None:
    """``kind``: the daemon alone, or the whole machine. Somebody comes to look after an hour."""
    image.now_ns += _HOUR_NS
    if kind == "power":
        image.disk.power_loss()
    else:
        image.disk.daemon_crash()


def recovered(image: SimImage, kind: str, crashes: list[int]) -> str:
    """Recover, crashing before these steps of it on the way; how the last recovery went."""
    for crash_at in crashes:
        image.disk.crash_in = crash_at
        with contextlib.suppress(Crashed):
            image.power_on()
        crash(image, kind)
    return image.power_on().how


def run_story(seed: int, crash_at: int | None, kind: str, crashes: list[int] | None = None) -> int:
    """One history with a crash before step ``crash_at``, and crashes of the recovery (default: random ones).
    The number of steps it had."""
    image = prepared(seed)
    before = image.disk.steps
    image.disk.crash_in = crash_at
    try:
        begin_story(image)
        image.settle()
        image.spawn(image.close())
        image.settle()
    except Crashed:
        pass
    steps = image.disk.steps - before
    crash(image, kind)
    if crashes is None:
        crashes = [image.rng.randrange(RECOVERY_STEPS_TYPICAL) for _ in range(image.rng.randrange(3))]
    how = recovered(image, kind, crashes)
    if how not in ("clean", "resized", "daemon_crash" if kind == "daemon" else "power_loss"):
        raise OracleMismatch(f"after a crash of kind {kind} the image was opened as after: {how}")
    image.check()
    if kind == "daemon":
        image.check_complete()
    # Life goes on, and the next crash finds everything again.
    for _ in range(4):
        image.spawn(image.random_write())
    image.spawn(image.flush())
    image.settle()
    image.check()
    crash(image, image.rng.choice(KINDS))
    image.power_on()
    image.check()
    return steps


def run_seed(seed: int) -> int:
    """One random history, fixed by ``seed``. Raises OracleMismatch."""
    rng = Random(f"tracking {seed}")
    return run_story(seed, rng.randrange(STEPS_TYPICAL), rng.choice(KINDS))

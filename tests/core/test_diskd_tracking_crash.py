"""T1, T2, T3 in the simulator: a crash at every step of everything, and again during recovery."""

import errno
import itertools

import pytest
from step_contract import steps

from diskd.core import mrt
from diskd.core.steps import Sync, Truncate
from diskd.errors import Damaged, NoSuchPoint
from diskd.sim.image import SimImage
from diskd.sim.tracking_story import KINDS, begin_story, crash, prepared, run_seed, run_story


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(1, 4))
def test_a_crash_at_every_step(seed: int, kind: str) -> None:
    steps = run_story(seed, None, kind)
    assert steps > 30
    for crash_at in range(steps):
        run_story(seed, crash_at, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_crash_at_every_step_and_at_every_step_of_the_recovery(kind: str) -> None:
    for crash_at in range(run_story(7, None, kind)):
        for again_at in range(12, 24, 4):
            run_story(7, crash_at, kind, [again_at])


@pytest.mark.slow
def test_crashes_in_many_histories() -> None:
    for seed in range(100):
        run_seed(seed)


@pytest.mark.slow
def test_without_a_crash_every_answer_is_exact() -> None:
    for seed in range(200, 215):
        image = prepared(seed)
        begin_story(image)
        image.settle()
        image.check_complete()
        image.spawn(image.close())
        image.settle()
        assert image.power_on().how == "clean"
        image.check_complete()


def after_a_failed_sync(seed: int, fails_at: int) -> SimImage | None:
    """Everything at once until a sync fails, which is the end of the image as it was opened; None where there
    were not so many."""
    image = prepared(seed)
    syncs = itertools.count()
    image.disk.fail_when = lambda step: (
        errno.EIO if isinstance(step, Sync) and next(syncs) == fails_at else None
    )
    begin_story(image)
    try:
        image.settle()
    except OSError:
        image.disk.fail_when = lambda step: None
        crash(image, "daemon")
        return image
    return None


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 10])  # the last one missed a change
def test_what_a_failed_sync_left_in_the_page_cache_is_not_relied_upon(seed: int) -> None:
    """Reopened, the image reads what the disk does not have. Then power is lost, before anything of it is
    written again."""
    for fails_at in itertools.count():
        image = after_a_failed_sync(seed, fails_at)
        if image is None:
            break
        assert image.power_on().how in ("daemon_crash", "resized")
        image.check_complete()
        for _ in range(6):
            image.spawn(image.random_write())
        image.settle()
        image.spawn(image.sync())
        image.settle()
        crash(image, "power")
        assert image.power_on().how == "power_loss"
        image.check()
    assert fails_at > 10


def damage(image: SimImage) -> None:
    """Bits flipped, a stretch zeroed, or the end cut off, in one of the side files."""
    rng = image.rng
    name = rng.choice([name for name in image.disk.names() if name != "disk.raw"])
    content = image.disk.peek(name)
    # Most bytes are unused pages; the first ones and those that are not zero matter.
    used = [index for index in range(0, len(content), 64) if any(content[index : index + 64])]
    position = min(rng.choice(used) + rng.randrange(64), len(content) - 1)
    if rng.random() < 0.7:
        image.disk.poke(name, position, bytes([content[position] ^ 1 << rng.randrange(8)]))
    elif rng.random() < 0.5:
        image.disk.poke(name, position, bytes(min(600, len(content) - position)))
    else:
        image.disk.run(steps(Truncate(name, position), Sync(name)))


def check_or_refused(image: SimImage) -> bool:
    """T4: every answer is still a superset, or is refused. True where all were answered."""
    answered = True
    for point in image.tracker.catalogue.points:
        try:
            if point.state != "pending":
                image.check_point(point.id)
        except (Damaged, NoSuchPoint):
            answered = False
    return answered


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "clean"])
def test_damage_is_refused_and_never_a_silent_gap(kind: str) -> None:
    answers = set()
    for seed in range(300, 420):
        image = prepared(seed)
        begin_story(image)
        image.settle()
        if kind == "clean":
            image.spawn(image.close())
            image.settle()
        crash(image, "daemon" if kind == "clean" else kind)
        damage(image)
        try:
            image.power_on()
        except Damaged:  # image.toml: the image as a whole is refused until that is restored
            continue
        answers.add(check_or_refused(image))
        # And it can be used again: a new point is exact.
        image.spawn(image.random_write())
        image.spawn(image.cut())
        image.spawn(image.random_write())
        image.settle()
        check_or_refused(image)
        assert image.changes_since(image.tracker.catalogue.points[-1].id).exact
    assert answers == {True, False}


@pytest.mark.parametrize(("kind", "grace_ns"), [("daemon", 5 * 10**9), ("power", 10 * 10**9)])
def test_how_much_later_than_it_was_said_the_raw_file_may_have_changed(kind: str, grace_ns: int) -> None:
    """T4: by one flush interval (5 s in the simulator) after a daemon's crash, by two after a power loss."""
    for late_ns in (0, 1):
        image = prepared(1)
        image.spawn(image.random_write())
        image.settle()
        header = image.disk.run(mrt.load_header(image.identity))
        table = image.disk.run(mrt.load_table(image.identity, image.tracker.generation))
        said_ns = image.tracker.area.time_ns if kind == "daemon" else max(header.time_ns, table.time_ns)
        crash(image, kind)
        image.raw_time_ns = said_ns + grace_ns + late_ns
        assert (image.power_on().how == "new_generation") == bool(late_ns)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_root_on_which_closed_regions_rely_is_noticed(kind: str) -> None:
    image = prepared(1)
    for _ in range(2):
        image.spawn(image.random_write())
        image.settle()
        image.spawn(image.flush())
        image.settle()
    assert not image.tracker.open_count
    image.disk.poke("disk.rct", image.tracker.root.sequence % 2 * 4096 + 130, b"rot")
    crash(image, kind)
    recovered_as = image.power_on()
    assert recovered_as.how == "new_generation"
    assert "older than" in (recovered_as.reason or "")
    assert all(point.state == "invalid" for point in image.tracker.catalogue.points)

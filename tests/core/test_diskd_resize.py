"""Growing an image: a crash at every step of it, and of every recovery after that; intents that are not to be
believed; what a resize does to points and answers."""

from random import Random
from uuid import UUID

import pytest
from step_contract import steps

from diskd.core import mrt, points, resize
from diskd.core.changes import report
from diskd.core.geometry import IMAGE_TOML, Geometry, Identity
from diskd.core.steps import Remove, Replace, Step
from diskd.errors import Damaged, Refused
from diskd.sim.disk import Crashed
from diskd.sim.image import BLOCK_BYTES, SimImage
from diskd.sim.tracking_story import KINDS, crash, prepared, recovered, run_seed

MiB = 1 << 20


def resized(seed: int, crash_at: int | None) -> tuple[SimImage, int]:
    """Writes and a resize at once; the number of steps that were done, and the image as it was left."""
    image = prepared(seed)
    before = image.disk.steps
    image.disk.crash_in = crash_at
    try:
        for _ in range(3):
            image.spawn(image.random_write())
        image.spawn(image.random_resize())
        image.settle()
    except Crashed:
        pass
    return image, image.disk.steps - before


def goes_on(image: SimImage) -> None:
    """Answers are right, the image can be resized again, and the next crash loses nothing either."""
    image.check()
    for _ in range(3):
        image.spawn(image.random_write())
    image.spawn(image.random_resize())
    image.spawn(image.cut())
    image.settle()
    image.check()
    crash(image, image.rng.choice(KINDS))
    image.power_on()
    image.check()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [2, 5])
def test_a_crash_at_every_step_of_a_resize(seed: int, kind: str) -> None:
    found = set()
    for crash_at in range(resized(seed, None)[1] + 1):
        image, _ = resized(seed, crash_at)
        crash(image, kind)
        found.add(recovered(image, kind, []))
        image.check()
        if kind == "daemon":
            image.check_complete()
        goes_on(image)
    assert "resized" in found
    assert "new_generation" not in found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_crash_at_every_step_of_the_recovery_that_finishes_a_resize(kind: str) -> None:
    for crash_at in range(resized(3, None)[1] + 1):
        for again_at in range(0, 40, 3):
            image, _ = resized(3, crash_at)
            crash(image, kind)
            how = recovered(image, kind, [again_at, (again_at * 7 + crash_at) % 40])
            assert how != "new_generation"
            image.check()
            if kind == "daemon":
                image.check_complete()


@pytest.mark.slow
def test_many_histories_with_resizes() -> None:
    for seed in range(5000, 5060):
        run_seed(seed)


def left_in_the_middle(seed: int) -> SimImage:
    """Crashed right after the intent became durable."""
    for crash_at in range(resized(seed, None)[1]):
        image, _ = resized(seed, crash_at)
        if resize.FILE in image.disk.names():
            crash(image, "daemon")
            return image
    raise AssertionError("no crash left an intent")


def test_a_raw_file_changed_outside_before_the_resize_is_finished_is_noticed() -> None:
    image = left_in_the_middle(4)
    image.raw_time_ns = image.now_ns - 1000
    found = image.power_on()
    assert found.how == "new_generation"
    assert "outside" in (found.reason or "")


def test_the_raw_file_may_be_grown_long_after_the_intent() -> None:
    image = left_in_the_middle(4)
    crash_after_growing(image)
    assert image.power_on().how == "resized"


def crash_after_growing(image: SimImage) -> None:
    """In the recovery, once the raw file has its new size."""
    size = image.disk.size("disk.raw")
    for crash_at in range(40):
        image.disk.crash_in = crash_at
        with pytest.raises(Crashed):
            image.power_on()
        crash(image, "daemon")
        if image.disk.size("disk.raw") > size:
            return
    raise AssertionError("the raw file did not grow")


def test_a_damaged_intent_is_dropped_where_the_image_is_whole_and_refused_where_it_is_not() -> None:
    image = left_in_the_middle(4)
    image.disk.poke(resize.FILE, 40, b"rot")
    assert image.power_on().how == "daemon_crash"
    assert resize.FILE not in image.disk.names()
    image.check_complete()

    image = left_in_the_middle(4)
    crash_after_growing(image)
    intact = image.disk.peek(resize.FILE)
    image.disk.poke(resize.FILE, 40, b"rot")
    with pytest.raises(Damaged, match="resize"):
        image.power_on()
    image.disk.run(steps(Replace(resize.FILE, intact)))
    assert image.power_on().how == "resized"
    image.check_complete()


def test_an_intent_put_back_from_an_older_time_takes_nothing_back() -> None:
    image = left_in_the_middle(4)
    older = {name: image.disk.peek(name) for name in (resize.FILE, "image.toml")}
    image.power_on()
    image.spawn(image.random_write())
    image.settle()
    crash(image, "daemon")
    image.disk.run(steps(Replace(resize.FILE, older[resize.FILE])))
    assert image.power_on().how == "daemon_crash"
    image.check_complete()
    crash(image, "daemon")
    for name, content in older.items():
        image.disk.run(steps(Replace(name, content)))
    with pytest.raises(Damaged, match="older"):
        image.power_on()


def grown_alive(seed: int) -> tuple[SimImage, dict[str, bytes]]:
    """Resized while it is served; and its files as they were when the intent had just become durable."""
    image = prepared(seed)
    taken: list[dict[str, bytes]] = []

    def copy(_: Step) -> None:
        names = image.disk.names()
        if resize.FILE in names and not taken:
            taken.append({name: image.disk.peek(name) for name in names})

    image.disk.before_step = copy
    image.spawn(image.random_resize())
    image.settle()
    image.disk.before_step = None
    return image, taken[0]


@pytest.mark.parametrize("names", [(), (mrt.FILE,)], ids=["the intent", "the MRT too"])
@pytest.mark.parametrize("is_flushed", [False, True])
def test_an_intent_put_back_after_its_resize_takes_back_nothing_tracked_since(
    names: tuple[str, ...], is_flushed: bool
) -> None:
    """Of what was tracked there is only an open region, or only a newer bitmap, or nothing but a file's time:
    each of them alone tells that the intent is older."""
    image, older = grown_alive(4)
    image.spawn(image.random_write())
    image.settle()
    if is_flushed:
        image.spawn(image.flush())
        image.settle()
        assert not image.tracker.open_count
    crash(image, "power")
    for name in (resize.FILE, IMAGE_TOML, *names):
        image.disk.run(steps(Replace(name, older[name])))
        image.mrt_time_ns = image.now_ns if name == mrt.FILE else image.mrt_time_ns
    with pytest.raises(Damaged, match="older"):
        image.power_on()


def test_an_intent_put_back_after_the_image_went_on_without_it_is_refused() -> None:
    image = left_in_the_middle(4)
    intent = image.disk.peek(resize.FILE)
    image.disk.run(steps(Remove(resize.FILE)))
    image.power_on()
    image.spawn(image.random_write())
    image.settle()
    crash(image, "power")
    image.disk.run(steps(Replace(resize.FILE, intent)))
    with pytest.raises(Damaged, match="older"):
        image.power_on()


def identity(size_bytes: int) -> Identity:
    return Identity(UUID(int=5), Geometry.check(size_bytes, 4096, MiB))


def test_an_image_never_shrinks() -> None:
    with pytest.raises(Refused, match="cannot shrink to 1MiB"):
        resize.grown(identity(2 * MiB), MiB)
    with pytest.raises(Refused, match="multiple of 512"):
        resize.grown(identity(2 * MiB), 3 * MiB + 1)
    assert resize.grown(identity(2 * MiB), 2 * MiB) == identity(2 * MiB)


def test_an_intent_reads_back_and_anything_else_does_not() -> None:
    facts = mrt.RawFacts(2 * MiB, 1, 2, 3)
    catalogue = points.cut(points.empty(UUID(int=1)), "rp-0000000000000001", 2 * MiB, 0)
    intent = resize.Intent(2 * MiB, 3 * MiB, str(UUID(int=1)), 4, 5, 6, facts, catalogue)
    data = resize.encode_intent(identity(2 * MiB), intent)
    assert resize.decode_intent(identity(2 * MiB), data) == intent
    rng = Random(1)
    for _ in range(200):
        position = rng.randrange(len(data))
        for broken in (
            data[:position],
            data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1 :],
        ):
            with pytest.raises(Damaged):
                resize.decode_intent(identity(2 * MiB), broken)


def test_between_two_points_of_different_sizes_the_answer_ends_at_the_later_ones_size() -> None:
    catalogue = points.cut(points.empty(UUID(int=1)), "rp-0000000000000001", MiB, 0)
    catalogue = points.cut(catalogue, "rp-0000000000000002", 2 * MiB, 0)
    catalogue = points.validate(catalogue, "rp-0000000000000001")
    span = points.span(catalogue, "rp-0000000000000001", "rp-0000000000000002")
    grown = identity(4 * MiB).geometry
    assert report(grown, span, {}, active_over_report_bytes=0).extents == [(MiB, MiB)]
    span = points.span(catalogue, "rp-0000000000000001")
    assert report(grown, span, {}, active_over_report_bytes=0).extents == [(MiB, 3 * MiB)]


def test_segments_do_not_grow_without_a_bound() -> None:
    catalogue = points.validate(
        points.cut(points.empty(UUID(int=1)), "rp-0000000000000001", BLOCK_BYTES, 0), "rp-0000000000000001"
    )
    for _ in range(points.POINTS_MAX):
        catalogue = points.end_interval(catalogue, 0)
    with pytest.raises(Refused, match="delete a point"):
        points.end_interval(catalogue, 0)

"""T4: an older copy of a side file, put back, is refused or answers a superset; never a silent gap."""

import pytest
from step_contract import steps

from diskd.core import mrt
from diskd.core.recovery import WRITE_NS_MAX
from diskd.core.steps import Replace
from diskd.errors import Damaged
from diskd.sim.image import SimImage
from diskd.sim.rollback_story import ENDS, Copies, history, run_rollback, superset_or_refused
from diskd.sim.tracking_story import crash, prepared


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_whatever_is_put_back_from_whatever_time(end: str) -> None:
    found: dict[str, int] = {}
    for seed in range(150):
        answered, how = run_rollback(seed, seed % 97 if seed % 2 else None, end)
        found[how] = found.get(how, 0) + bool(answered)
        found["tried"] = found.get("tried", 0) + 1
    # It is not refused for refusal's sake: what has not changed is the same file, and many copies are that.
    assert sum(count for how, count in found.items() if how != "tried") > found["tried"] / 5


def side_files(image: SimImage) -> Copies:
    return {name: image.disk.peek(name) for name in image.disk.names() if name != "disk.raw"}


def put_back(image: SimImage, copies: Copies, *names: str) -> None:
    for name in names:
        image.disk.run(steps(Replace(name, copies[name])))
        if name == mrt.FILE:
            image.mrt_time_ns = image.now_ns


def written(image: SimImage, count: int = 4) -> None:
    for _ in range(count):
        image.spawn(image.random_write())
    image.settle()


def test_an_mrt_from_before_the_last_open_regions_is_refused_after_a_power_loss() -> None:
    image = prepared(3)
    copies = side_files(image)
    image.now_ns += 10 * WRITE_NS_MAX
    written(image)
    crash(image, "power")
    put_back(image, copies, mrt.FILE)
    found = image.power_on()
    assert (found.how, "older time" in (found.reason or "")) == ("new_generation", True)


def test_a_clean_mrt_from_an_earlier_session_is_refused() -> None:
    image = prepared(4)
    image.spawn(image.close())
    image.settle()
    clean = side_files(image)
    image.power_on()
    crash(image, "power")
    put_back(image, clean, mrt.FILE)
    found = image.power_on()
    assert (found.how, "older than disk.rct" in (found.reason or "")) == ("new_generation", True)


def test_an_rct_from_before_the_last_flush_is_refused() -> None:
    image = prepared(5)
    copies = side_files(image)
    written(image)
    image.spawn(image.close())
    image.settle()
    crash(image, "daemon")
    put_back(image, copies, "disk.rct")
    assert image.power_on().how == "new_generation"


def test_an_interval_from_before_a_join_is_refused_and_costs_no_other_point() -> None:
    image = prepared(6)
    copies = side_files(image)
    first, second, third, fourth = [point.id for point in image.tracker.catalogue.points]
    image.spawn(image.delete(second))
    image.settle()
    crash(image, "power")
    put_back(image, copies, "disk.rct.2")
    image.power_on()
    with pytest.raises(Damaged, match="join"):
        image.check_superset(first)
    for point in (third, fourth):
        image.check_superset(point)


def test_a_catalogue_from_before_the_last_cut_is_refused() -> None:
    image = prepared(7)
    copies = side_files(image)
    image.spawn(image.cut())
    image.settle()
    crash(image, "daemon")
    put_back(image, copies, "points")
    assert image.power_on().how == "new_generation"


def test_without_anything_put_back_an_hour_is_no_evidence() -> None:
    for end in ENDS:
        image, _ = history(11, 40, end)
        assert image.power_on().how != "new_generation"
        assert superset_or_refused(image) > 0

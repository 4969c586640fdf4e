"""Which points a prune keeps, and why: against a naive oracle, and what it does to chains on its way."""

import datetime as dt

import attrs
import pytest
from diskd_manifests import manifest, name, points
from hypothesis import given
from hypothesis import strategies as st

from diskd.core.catalog import by_commit, dependants, is_restorable
from diskd.core.retention import Keep, PrunePlan, plan_prune
from diskd.errors import Refused

CHAIN = points(manifest(1), manifest(2, 1), manifest(3, 2), manifest(4), manifest(5, 4))


def acts(plan):
    return plan.keep, plan.synthesize, plan.remove


def names(*numbers):
    return [name(number) for number in numbers]


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (1, (names(5), names(5), names(4, 3, 2, 1))),
        (2, (names(4, 5), [], names(3, 2, 1))),
        (3, (names(3, 4, 5), names(3), names(2, 1))),
        (9, (names(1, 2, 3, 4, 5), [], [])),
    ],
)
def test_the_newest_stay_and_stand_on_their_own(last, expected):
    assert acts(plan_prune(CHAIN, Keep(last=last))) == expected


@pytest.mark.parametrize("keep", [Keep(), Keep(last=-1), Keep(daily=-1), Keep(last=1, monthly=10**9)])
def test_impossible_rules_are_refused(keep):
    with pytest.raises(Refused, match="keep"):
        plan_prune(CHAIN, keep)


def history(*times):
    """Fulls committed at these times, in order."""
    return points(*(manifest(number, at=at) for number, at in enumerate(times)))


TIMES = (
    "2025-12-28T12:00:00+00:00",  # a Sunday, week 2025-W52
    "2025-12-31T23:30:00+00:00",  # 2026-W01 though it is December
    "2026-01-01T00:30:00+00:00",
    "2026-01-01T22:00:00+00:00",
    "2026-01-02T01:30:00+02:00",  # still the first of January in UTC
    "2026-02-01T00:00:00+00:00",
)


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (Keep(daily=1), [5]),
        (Keep(daily=3), [1, 4, 5]),
        (Keep(weekly=2), [4, 5]),
        (Keep(weekly=3), [0, 4, 5]),
        (Keep(monthly=3), [1, 4, 5]),
        (Keep(last=2, monthly=3), [1, 4, 5]),
        (Keep(last=3, weekly=3), [0, 3, 4, 5]),
        (Keep(daily=99), [0, 1, 4, 5]),
    ],
)
def test_each_period_keeps_its_newest_point_in_utc(keep, kept):
    assert plan_prune(history(*TIMES), keep).keep == names(*kept)


def test_every_verdict_has_its_reasons():
    plan = plan_prune(history(*TIMES), Keep(last=1, daily=2, weekly=1, monthly=2))
    said = {verdict.point: (verdict.keep, verdict.reasons) for verdict in plan.verdicts}
    assert [verdict.point for verdict in plan.verdicts] == names(0, 1, 2, 3, 4, 5)
    assert said[name(5)] == (
        True,
        [
            "number 1 of the newest 1",
            "newest of the day 2026-02-01",
            "newest of the week 2026-W05",
            "newest of the month 2026-02",
        ],
    )
    assert said[name(4)] == (True, ["newest of the day 2026-01-01", "newest of the month 2026-01"])
    assert said[name(0)] == (False, ["no rule keeps it"])


def test_what_cannot_be_restored_is_not_counted_and_stays_with_its_base():
    broken = points(manifest(1), manifest(2, 1), manifest(3, 9), manifest(4, 3), manifest(5), manifest(6, 5))
    plan = plan_prune(broken, Keep(last=1))
    assert acts(plan) == (names(3, 4, 6), names(6), names(5, 2, 1))
    assert plan.wanted == names(6)
    said = {verdict.point: verdict.reasons for verdict in plan.verdicts}
    assert "cannot be restored" in said[name(3)][0]


def test_what_a_damaged_manifest_is_known_to_build_on_stays():
    plan = plan_prune(CHAIN, Keep(last=1), damaged={name(7): name(2), name(8): None, name(9): name(6)})
    assert acts(plan) == (names(1, 2, 5), names(5), names(4, 3))
    assert plan.wanted == names(5)
    said = {verdict.point: verdict.reasons for verdict in plan.verdicts}
    assert said[name(1)] == said[name(2)] == [f"needed by {name(7)}, which cannot be restored now"]


def test_a_time_that_cannot_be_read_is_kept():
    plan = plan_prune(history("2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00", "?"), Keep(daily=1))
    assert plan.keep == names(1, 2)


def test_what_an_unfinished_backup_builds_on_stays_and_can_stand_alone():
    plan = plan_prune(CHAIN, Keep(last=1), {name(8): name(2), name(9): None})
    assert acts(plan) == (names(2, 5), names(2, 5), names(4, 3, 1))
    said = {verdict.point: verdict.reasons for verdict in plan.verdicts}
    assert said[name(2)] == [f"the unfinished backup {name(8)} builds on it"]
    # One that is gone already is no reason for anything.
    assert plan_prune(CHAIN, Keep(last=1), {name(8): name(7)}).keep == names(5)


def oracle(made, keep):
    """The rules, spelled out: the newest of each period, counted from the newest period back."""
    newest_first = sorted(made, key=lambda m: (m.committed_at, m.point), reverse=True)
    kept = {m.point for m in newest_first[: keep.last]}
    for count, form in ((keep.daily, "%Y-%m-%d"), (keep.weekly, "%G-%V"), (keep.monthly, "%Y-%m")):
        seen = []
        for m in newest_first:
            period = dt.datetime.fromisoformat(m.committed_at).strftime(form)
            if period not in seen and len(seen) < count:
                seen.append(period)
                kept.add(m.point)
    return kept


HOURS = st.lists(st.integers(0, 24 * 400), min_size=1, max_size=30, unique=True).map(sorted)
KEEPS = st.builds(Keep, *[st.integers(0, 8)] * 4).filter(lambda keep: any(attrs.astuple(keep)))


@given(HOURS, KEEPS)
def test_the_union_of_the_rules_is_what_a_naive_reading_of_them_says(hours, keep):
    begin = dt.datetime(2025, 11, 20, tzinfo=dt.UTC)
    made = [
        manifest(number, at=(begin + dt.timedelta(hours=hour)).isoformat())
        for number, hour in enumerate(hours)
    ]
    plan = plan_prune(points(*made), keep)
    assert set(plan.keep) == oracle(made, keep)
    assert set(plan.keep) | set(plan.remove) == {m.point for m in made}
    assert {v.point for v in plan.verdicts if v.keep} == set(plan.keep)


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
    KEEPS,
    st.sets(st.integers(0, 11)),
    st.lists(st.integers(1, 24 * 20), min_size=12, max_size=12),
)
def test_pruning_leaves_every_chain_whole_at_every_step(steps, keep, missing, apart):
    """``steps``: 0 is a full, else how far back the base is. Points may be missing from the start."""
    made, time = [], dt.datetime(2025, 11, 20, tzinfo=dt.UTC)
    for number, step in enumerate(steps):
        time += dt.timedelta(hours=apart[number])
        made.append(manifest(number, number - step if 0 < step <= number else None, at=time.isoformat()))
    left = {m.point: m for number, m in enumerate(made) if number not in missing}
    before = {point for point in left if is_restorable(left, point)}
    plan = plan_prune(left, keep)
    for point in plan.synthesize:
        left[point] = attrs.evolve(left[point], base=None, kind="full", synthetic=True)
    for point in plan.remove:
        assert dependants(left, point) == []
        del left[point]
        assert all(is_restorable(left, other) for other in before if other in left)
    good = [m for m in by_commit(made) if m.point in before]
    assert {point for point in left if is_restorable(left, point)} >= oracle(good, keep)
    assert set(plan.wanted) == oracle(good, keep)
    assert sorted(left) == sorted(plan.keep)
    assert isinstance(plan, PrunePlan)

"""Retention: which points may go, why, and what has to be made a full of its own before they do.

The rules are restic's. ``last`` keeps the newest points; ``daily``, ``weekly`` and ``monthly`` keep the
newest point of each of the newest so many days, weeks or months that have one. A point stays if any
rule keeps it (the union; one point may serve several rules). Days, weeks (ISO 8601: they begin on a Monday)
and months are those of UTC, by the time at which the target committed the point: the same command gives the
same answer on every host and in summer and winter.

A wanted point that builds on one that is not gets a synthetic full first; what is kept is verified; only then
do the others go, from the newest to the oldest, so that at any moment everything which is left has its
whole chain. What an unfinished backup builds on counts as wanted, since its source may go on with it.

Points that cannot be restored (damaged, or something below them is) are neither counted nor removed, and what
they build on stays too: whoever finds the missing part may still want them. A point whose commit time cannot
be read is kept, since no rule can tell whether it is old.
"""

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import attrs

from diskd.core.catalog import Manifest, Points, by_commit, is_restorable
from diskd.errors import Refused

# More than a target can hold of one VM in decades; a bound on what comes from outside.
KEEP_MAX: Final = 1_000_000


@attrs.frozen
class Keep:
    """How many of each kind are kept; 0: that rule keeps nothing."""

    last: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0


@attrs.frozen
class Verdict:
    """One point, whether it stays, and every reason for that."""

    point: str
    committed_at: str
    keep: bool
    reasons: list[str]


@attrs.frozen
class PrunePlan:
    """In the order in which it is done: ``synthesize`` oldest first, then ``remove`` newest first.

    ``wanted``: what the rules or unfinished backups keep, and thus what must be good before anything goes;
    ``keep`` has besides them what only damaged points need. ``verdicts``: all points, oldest first.
    """

    keep: list[str]
    wanted: list[str]
    synthesize: list[str]
    remove: list[str]
    verdicts: list[Verdict]


def plan_prune(
    points: Points,
    keep: Keep,
    unfinished: Mapping[str, str | None] | None = None,
    damaged: Mapping[str, str | None] | None = None,
) -> PrunePlan:
    """``unfinished``: backups that a source may still go on with, and what each builds on, which is kept.
    ``damaged``: what has no good manifest, and what it builds on as far as anybody knows, which is kept, too.
    Raises Refused where no rule keeps anything, or a number is out of bounds."""
    counts = (keep.last, keep.daily, keep.weekly, keep.monthly)
    if not any(counts):
        raise Refused("keep at least one point: --keep-last, --keep-daily, --keep-weekly or --keep-monthly")
    if any(not 0 <= count <= KEEP_MAX for count in counts):
        raise Refused(f"how many points to keep is a number from 0 to {KEEP_MAX}")
    ordered = by_commit(points.values())
    good = [manifest for manifest in ordered if is_restorable(points, manifest.point)]
    reasons = _wanted(good, keep)
    for point, base in (unfinished or {}).items():
        if base in {manifest.point for manifest in good}:
            reasons.setdefault(base, []).append(f"the unfinished backup {point} builds on it")
    wanted = [manifest.point for manifest in ordered if manifest.point in reasons]
    broken = [m for m in ordered if m not in good]
    for point, reason in _needed_by_broken(points, broken, damaged or {}).items():
        reasons.setdefault(point, []).append(reason)
    synthesize = [point for point in wanted if (base := points[point].base) and base not in reasons]
    return PrunePlan(
        [manifest.point for manifest in ordered if manifest.point in reasons],
        wanted,
        synthesize,
        [manifest.point for manifest in reversed(ordered) if manifest.point not in reasons],
        [_verdict(manifest, reasons.get(manifest.point)) for manifest in ordered],
    )


def _verdict(manifest: Manifest, reasons: list[str] | None) -> Verdict:
    return Verdict(
        manifest.point, manifest.committed_at, reasons is not None, reasons or ["no rule keeps it"]
    )


def _wanted(good: Sequence[Manifest], keep: Keep) -> dict[str, list[str]]:
    """Why each point that a rule keeps is kept. ``good``: what can be restored, oldest commit first."""
    reasons: dict[str, list[str]] = {}
    for number, manifest in enumerate(reversed(good[len(good) - min(keep.last, len(good)) :]), 1):
        reasons.setdefault(manifest.point, []).append(f"number {number} of the newest {keep.last}")
    times = [(manifest.point, _utc(manifest.committed_at)) for manifest in good]
    for point, time in times:
        if time is None:
            reasons.setdefault(point, []).append("its commit time cannot be read")
    known = [(point, time) for point, time in times if time is not None]
    for count, period, name in (
        (keep.daily, _day, "newest of the day"),
        (keep.weekly, _week, "newest of the week"),
        (keep.monthly, _month, "newest of the month"),
    ):
        for label, point in _newest_of_each(known, period)[:count]:
            reasons.setdefault(point, []).append(f"{name} {label}")
    return reasons


def _newest_of_each(
    known: Sequence[tuple[str, dt.datetime]], period: Callable[[dt.datetime], str]
) -> list[tuple[str, str]]:
    """(period, its newest point), the newest period first."""
    newest: dict[str, str] = {}
    for point, time in reversed(known):
        newest.setdefault(period(time), point)
    return list(newest.items())


def _day(time: dt.datetime) -> str:
    return time.strftime("%Y-%m-%d")


def _week(time: dt.datetime) -> str:
    year, week, _ = time.isocalendar()
    return f"{year:04d}-W{week:02d}"


def _month(time: dt.datetime) -> str:
    return time.strftime("%Y-%m")


def _utc(committed_at: str) -> dt.datetime | None:
    try:
        time = dt.datetime.fromisoformat(committed_at)
        return time.replace(tzinfo=dt.UTC) if time.tzinfo is None else time.astimezone(dt.UTC)
    except (ValueError, OverflowError):
        return None


def _needed_by_broken(
    points: Points, broken: Sequence[Manifest], damaged: Mapping[str, str | None]
) -> dict[str, str]:
    """The broken points and everything that is left of their chains, each with the reason."""
    needed = {m.point: "it cannot be restored, and is neither counted nor removed" for m in broken}
    for needing, base in [*damaged.items(), *((manifest.point, manifest.base) for manifest in broken)]:
        point = base
        while point is not None and point in points and point not in needed:
            needed[point] = f"needed by {needing}, which cannot be restored now"
            point = points[point].base
    return needed

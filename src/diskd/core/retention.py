"""Retention: which points may go, and what has to be made a full of its own before they do.

The newest points are wanted. A wanted point that builds on one that is not gets a synthetic full first; only
then do the others go, from the newest to the oldest, so that at any moment everything which is left has its
whole chain. Points that cannot be restored (damaged, or something below them is) are neither counted nor
removed, and what they build on stays too: whoever finds the missing part may still want them.
"""

import attrs

from diskd.core.catalog import Points, by_commit, is_restorable
from diskd.errors import Refused


@attrs.frozen
class PrunePlan:
    """In the order in which it is done: ``synthesize`` oldest first, then ``remove`` newest first."""

    keep: list[str]
    synthesize: list[str]
    remove: list[str]


def plan_prune(points: Points, keep_last: int) -> PrunePlan:
    """Keep the newest ``keep_last`` points that can be restored. Raises Refused for less than one."""
    if keep_last < 1:
        raise Refused("keep at least one point: --keep-last 1 or more")
    ordered = [manifest.point for manifest in by_commit(points.values())]
    good = [point for point in ordered if is_restorable(points, point)]
    wanted = set(good[-keep_last:])
    stays = wanted | _needed_by_broken(points, set(ordered) - set(good))
    synthesize = [
        point for point in ordered if point in wanted and (base := points[point].base) and base not in stays
    ]
    return PrunePlan(
        [point for point in ordered if point in stays],
        synthesize,
        [point for point in reversed(ordered) if point not in stays],
    )


def _needed_by_broken(points: Points, broken: set[str]) -> set[str]:
    """The broken points, and everything that is left of their chains."""
    needed: set[str] = set()
    for start in sorted(broken):
        point: str | None = start
        while point is not None and point in points and point not in needed:
            needed.add(point)
            point = points[point].base
    return needed

"""The mass-failure brake: where much of the cluster is lost at once, it is more likely the network than the
hosts, and to fail everything over to the few that are left would make an outage of an interruption.

Theory of operation. Members that lost contact within one isolation time of each other are a *mass failure*
if they are at least two, and at least the share ``mass_failure_brake`` of the members that count
(quarantined and leaving ones do not, but are held with the others if they were lost with them). Each node
lost in it is *held*: no failover of its VMs is recorded. Windows run on meanwhile.

    held       its failovers are held
    spared     not held (any more): enough others are back, or it was lost by itself while others are held
    proven     everything that it ran is proven to have ended: that was no cut cable
    released   an operator let it go
    expired    it was held for ``mass_failure_hold``
    back       in contact again; forgotten once its window is closed in the store

    (none) --lost in a mass failure--> held           (none) --lost while others are held--> spared
    held --enough others are back--> spared           spared --lost in another mass failure--> held
    held --proven dead--> proven   held --operator--> released   held --time over--> expired
    any --back in contact--> back --window closed--> (none)

"Enough" is by number alone, among those lost in the mass failure, whatever became of their holds: those
left are too few to be a mass failure. They come back one after the other, so the rest is spared only once
that has been so for one isolation time. Whoever is let go is not held again before it was back. While a node
is in the record, its isolation is no ungraceful exit.

A window of less than an isolation time may end before the losses that make a mass failure are all known:
``suspected`` are those that would be held if whoever is silent just now were lost as well.
"""

from collections.abc import Collection, Mapping
from typing import Final, Literal

import attrs

from clusterd.core.properties import Properties
from clusterd.core.records import BrakedNode, BrakeRecord

LET_GO: Final = ("proven", "released", "expired")
Grip = Literal["", "suspected", "held"]
"""What keeps the failovers of a node back: nothing, the chance that more nodes are being lost, the brake."""


@attrs.frozen
class Losses:
    """What the brake is judged by. ``ages_ns``: how long ago each node that is without contact was lost;
    negative while the grace of an announced restart lasts. ``counted``: the members that count, lost or not.
    ``proven``: everything that these nodes ran has ended. ``unsettled``: back, but their windows are not yet
    closed in the store."""

    ages_ns: Mapping[str, int]
    counted: Collection[str]
    proven: Collection[str] = ()
    unsettled: Collection[str] = ()


def is_mass(lost: int, members: int, properties: Properties) -> bool:
    """Whether so many lost of so many members are a mass failure."""
    # Not lost >= share * members: 0.55 * 20 is more than 11 in floating point, 11 / 20 is the float 0.55.
    return lost >= 2 and lost / max(lost, members) >= properties.mass_failure_brake


def struck(losses: Losses, properties: Properties) -> set[str]:
    """The nodes that were lost in a mass failure, those included that do not count for its size."""
    found: set[str] = set()
    lost = {name: age for name, age in losses.ages_ns.items() if age >= 0}
    for oldest in lost.values():
        together = {name for name, age in lost.items() if oldest - properties.isolation_ns <= age <= oldest}
        counting = sum(1 for name in together if name in losses.counted)
        if is_mass(counting, len(losses.counted), properties):
            found |= together
    return found


def suspected(losses: Losses, silent: Collection[str], properties: Properties) -> set[str]:
    """Of the lost, those that would be lost in a mass failure if the ``silent`` were lost now."""
    ages = {**dict.fromkeys(silent, 0), **losses.ages_ns}
    return struck(attrs.evolve(losses, ages_ns=ages), properties) & losses.ages_ns.keys()


def is_still_mass(record: BrakeRecord, counted: Collection[str], properties: Properties) -> bool:
    """Whether those of a mass failure that are away, held or let go, are still as many as makes one."""
    away = _away(record)
    return is_mass(len(away), len({*counted, *away}), properties)


def _away(record: BrakeRecord) -> set[str]:
    return {name for name, node in record.nodes.items() if node.counts and node.state in ("held", *LET_GO)}


def judged(
    record: BrakeRecord, losses: Losses, properties: Properties, enough_for_ns: int | None = None
) -> BrakeRecord:
    """What follows for a record whose elapsed times are those of now. ``enough_for_ns``: for how long it has
    been no mass failure any more; None: it still was one when it was last judged."""
    hit = struck(losses, properties)
    nodes = {}
    for name in sorted({*record.nodes, *hit}):
        after = _judged_one(name, record.nodes.get(name), losses, properties, is_hit=name in hit)
        if after is not None:
            nodes[name] = after
    is_over = enough_for_ns is not None and enough_for_ns >= properties.isolation_ns
    if is_over and not is_still_mass(BrakeRecord(nodes), losses.counted, properties):
        nodes = {
            name: attrs.evolve(braked, state="spared") if braked.state == "held" else braked
            for name, braked in nodes.items()
        }
    if any(braked.state == "held" for braked in nodes.values()):
        for name, age in sorted(losses.ages_ns.items()):
            if age >= 0 and name not in nodes:
                nodes[name] = BrakedNode("spared", counts=name in losses.counted)
    return BrakeRecord(nodes)


def _judged_one(
    name: str, before: BrakedNode | None, losses: Losses, properties: Properties, *, is_hit: bool
) -> BrakedNode | None:
    """One node by itself, or None if it is not in the record any more."""
    if name not in losses.ages_ns:
        is_kept = before is not None and name in losses.unsettled
        return attrs.evolve(before, state="back") if before is not None and is_kept else None
    fresh = BrakedNode("held", counts=name in losses.counted)
    if before is None or before.state == "back":  # lost again: what was before does not count
        if not is_hit:
            return None
        before = fresh
    elif before.state == "spared" and is_hit:
        before = fresh
    if before.state != "held":
        return before
    if name in losses.proven:
        return attrs.evolve(before, state="proven")
    limit = properties.mass_failure_hold_ns
    if limit is not None and before.elapsed_ns >= limit:
        return attrs.evolve(before, state="expired")
    return before


def returns_needed(record: BrakeRecord, counted: Collection[str], properties: Properties) -> int:
    """How many of the nodes that are away must be back before nobody is held any more."""
    away = _away(record)
    members, needed = len({*counted, *away}), 0
    while is_mass(len(away) - needed, members, properties):
        needed += 1
    return needed

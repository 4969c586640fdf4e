"""The leader's use of the mass-failure brake (brake.py): who was lost when, what is recorded and shown.

Theory of operation. When each node was lost is what this node itself has noticed, leading or not; so a new
leader that saw it all judges as the former one did. Where it did not see it (it has just begun, or was
isolated itself), it goes by the elapsed part of the node's window, and where nobody wrote that down, by
when it began to miss the node. Only nodes whose window is open count: none is opened while it may be us who
are cut off, nor for one that left.

The record is computed anew in each round from the one in the store, and is in force before it is written;
the elapsed part is rewritten once per isolation time. So a change of leader may lengthen a hold, never
shorten it. An operator lets go by changing the record itself, guarded by its revision.
"""

from collections.abc import Collection
from typing import Any, Final

import attrs

from clusterd.core import brake, records
from clusterd.core.brake import Grip
from clusterd.core.desk import Desk
from clusterd.core.membership import all_in_contact, counted_members, goodbye, in_contact, is_lost, is_recent
from clusterd.core.records import BrakeRecord, HeldItem, NodeRecord, Window
from clusterd.core.store_session import StoreSession
from clusterd.core.store_view import NOTHING_HELD
from clusterd.core.types import EventName
from daemonkit.units import format_duration

KIND: Final = "brake"
REASONS: Final = {
    "spared": "enough others are back",
    "proven": "proven dead",
    "expired": "mass_failure_hold is over",
    "back": "back in contact",
}


@attrs.define
class Braking:
    """``current``: the record as of the last round in which we led."""

    desk: Desk
    store: StoreSession
    current: BrakeRecord = NOTHING_HELD
    suspects: Collection[str] = ()
    held: list[HeldItem] = attrs.field(factory=list)
    lost_at: dict[str, int] = attrs.field(factory=dict)  # our time of it, while it is lost
    held_since: dict[str, int] = attrs.field(factory=dict)
    enough_since: int | None = None  # that it is no mass failure any more
    written_at: int = 0
    pending: tuple[BrakeRecord, BrakeRecord] | None = None

    def reset(self) -> None:
        """We have just become leader. What we noticed ourselves still counts."""
        self.held_since.clear()
        self.enough_since = None
        self.current, self.suspects = self.desk.view.brake(), ()
        self.written_at = self.desk.now

    def leave_office(self) -> None:
        """Another leads: what it has recorded is what counts."""
        self.current, self.suspects = self.desk.view.brake(), ()

    def observe(self) -> None:
        """Every round, leader or not: when was each node lost?"""
        if all_in_contact(self.desk):
            self.lost_at.clear()
            return
        for name in self.desk.view.members():
            if is_lost(self.desk, name):
                self.lost_at.setdefault(name, self.desk.now)
            else:
                self.lost_at.pop(name, None)

    def grip(self, node: str) -> Grip:
        """What keeps this node's failovers back now. Whoever is let go is so once that is recorded."""
        if self.current.holds(node) or self.desk.view.brake().holds(node):
            return "held"
        return "suspected" if node in self.suspects else ""

    def excuses(self, node: str) -> bool:
        """Whether the isolation that has just ended is no ungraceful exit: it was lost in a mass failure, or
        while one lasted. Our own was, as long as others are not back: it was they who were lost, and we who
        found ourselves alone."""
        known = self.desk.view.brake().nodes.keys() | self.current.nodes.keys()
        return bool(known) if node == self.desk.name else node in known

    def decide(self, nodes: dict[str, NodeRecord], proven: Collection[str]) -> None:
        """Judge anew, and write what differs. ``nodes``: every member's record as of now. ``proven``: those
        of the lost of which everything that they ran has ended."""
        desk, stored = self.desk, self.desk.view.brake()
        ages = {
            name: self._age_ns(name, node.window) for name, node in nodes.items() if self._is_away(name, node)
        }
        self.held, self.suspects = [], ()
        if not ages and not stored.nodes:
            self.current = NOTHING_HELD
            return
        unsettled = [name for name in stored.nodes if desk.view.node(name).window is not None]
        counted = counted_members(desk)
        losses = brake.Losses(ages, counted, proven, unsettled)
        aged = self._aged(stored)
        enough_for = None if self.enough_since is None else desk.now - self.enough_since
        self.current = brake.judged(aged, losses, desk.properties, enough_for)
        if not self.current.held() or brake.is_still_mass(self.current, counted, desk.properties):
            self.enough_since = None
        elif self.enough_since is None:
            self.enough_since = desk.now
        silent = [name for name in counted if in_contact(desk, name) and self._is_silent(name)]
        self.suspects = brake.suspected(losses, silent, desk.properties) - self.current.nodes.keys()
        self._wake()
        self._show(counted)
        self._save(stored)

    def _is_away(self, name: str, node: NodeRecord) -> bool:
        said = goodbye(self.desk, name)
        if in_contact(self.desk, name) or (said is not None and said.kind == "leave"):
            return False
        # A clusterd that has just begun does not know yet who is lost; that is nobody's return.
        is_known = name in self.desk.view.brake().nodes
        return is_known or (node.window is not None and is_lost(self.desk, name))

    def _is_silent(self, name: str) -> bool:
        return name != self.desk.name and not is_recent(self.desk, name)

    def _age_ns(self, name: str, window: Window | None) -> int:
        """How long ago it was lost. An announced restart is a loss only once its grace is over."""
        desk = self.desk
        peer, at = desk.contacts.peers.get(name), self.lost_at.get(name, desk.now)
        has_seen = peer is not None and peer.met and at > desk.back_since
        if window is None:
            return desk.now - at
        is_recorded = desk.view.node(name).window is not None
        age = window.elapsed_ns if is_recorded and not has_seen else desk.now - at
        return age - window.grace_ns

    def _aged(self, stored: BrakeRecord) -> BrakeRecord:
        """As of now: held for as long as was written, and since then by our own clock."""
        now, nodes = self.desk.now, {}
        self.held_since = {name: at for name, at in self.held_since.items() if name in stored.held()}
        for name, node in stored.nodes.items():
            if node.state == "held":
                began = min(self.held_since.get(name, now), now - node.elapsed_ns)
                self.held_since[name] = began
                node = attrs.evolve(node, elapsed_ns=now - began)
            nodes[name] = node
        return BrakeRecord(nodes)

    def _wake(self) -> None:
        desk, limit = self.desk, self.desk.properties.mass_failure_hold_ns
        if limit is not None:
            for name in self.current.held():
                desk.wake(desk.now + limit - self.current.nodes[name].elapsed_ns)
        if self.enough_since is not None:
            desk.wake(self.enough_since + desk.properties.isolation_ns)
        if self.suspects:  # who is silent is heard, which is no event of its own, or is lost
            desk.wake(desk.now + desk.properties.heartbeat_interval_ns // 2)

    # -- what is recorded, and shown

    def _save(self, stored: BrakeRecord) -> None:
        desk, wanted = self.desk, self.current
        if _shape(stored) == _shape(wanted):
            if not wanted.held():
                return
            due = self.written_at + desk.properties.isolation_ns
            desk.wake(due)
            if desk.now < due:
                return
        guards = self.store.leading() + self.store.same("brake")
        puts: list[tuple[str, Any]] = [("brake", wanted)] if wanted.nodes else []
        if self.store.write(("brake",), guards, puts, () if puts else ("brake",)):
            self.pending, self.written_at = (stored, wanted), desk.now

    def written(self, succeeded: bool) -> None:
        """The record was written: say what changed."""
        (before, after), self.pending = self.pending or (NOTHING_HELD, NOTHING_HELD), None
        if not succeeded:
            return
        engaged = [name for name in after.held() if not before.holds(name)]
        if engaged:
            members = len(counted_members(self.desk))
            reason = f"{len(after.held())} of {members} members were lost within one isolation time"
            self.desk.note(EventName.BRAKE_ENGAGED, nodes=engaged, reason=reason)
        ended: dict[str, list[str]] = {}
        for name in before.held():
            if not after.holds(name):
                state = after.nodes[name].state if name in after.nodes else "back"
                ended.setdefault(REASONS.get(state, state), []).append(name)
        for reason, names in ended.items():
            self.desk.note(EventName.BRAKE_RELEASED, nodes=names, reason=reason)

    def _show(self, counted: Collection[str]) -> None:
        """S5. One item for all of it, and one for each node."""
        names, limit = self.current.held(), self.desk.properties.mass_failure_hold_ns
        if not names:
            return
        needed = brake.returns_needed(self.current, counted, self.desk.properties)
        others = f"{needed} of them are back" if needed > 1 else "one of them is back"
        if not needed:
            others = "no other is lost for a moment: enough of them are back"
        later = "" if limit is None else f", after {format_duration(limit)}"
        of = f"{', '.join(names)} of {len(counted)} members"
        why = f"{of} were lost in a mass failure, most likely of the network"
        ends = f"{others}{later}, or 'clusterctl hold release {KIND}'"
        self.held.append(HeldItem(KIND, KIND, "cluster", f"{why}; their failovers are held", ends))
        for name in names:
            self.held.append(
                HeldItem(
                    f"{KIND}-{name}",
                    KIND,
                    name,
                    "it was lost in a mass failure: its failovers are held",
                    f"it or enough others are back{later}, 'clusterctl node confirm-dead {name}', or "
                    f"'clusterctl hold release {KIND}-{name}'",
                )
            )


def _shape(record: BrakeRecord) -> dict[str, str]:
    """What of the record is worth writing at once: everything but elapsed times."""
    return {name: node.state for name, node in record.nodes.items()}


def release(desk: Desk, hold_id: str) -> tuple[BrakeRecord, list[str]] | None:
    """The record once an operator has let go what this id names, and the nodes that are let go by it; None if
    the brake holds nothing of the name."""
    record = desk.view.brake()
    named = [name for name in record.nodes if hold_id in (KIND, f"{KIND}-{name}")]
    named = [name for name in named if record.nodes[name].state in ("held", "released")]
    if not named:
        return None
    let_go = [name for name in named if record.holds(name)]
    nodes = {
        name: attrs.evolve(node, state="released") if name in let_go else node
        for name, node in record.nodes.items()
    }
    return records.BrakeRecord(nodes), let_go

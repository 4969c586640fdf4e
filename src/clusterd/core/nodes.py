"""The leader's records of nodes: windows, exits and quarantine, kept in the store as elapsed times.

``refresh`` computes every node's record as it is now: what the store says, aged by our own clock since we
first saw that revision, plus what has happened since. What differs is written, one guarded transaction per
node; elapsed times alone are rewritten once per isolation time. So a change of leader may lengthen a
window or a quarantine by that much, but never shorten it.

No window is opened while it may be us who are cut off (``membership.may_be_us``): the elapsed time counts
from the loss all the same.

An isolation that no leader wrote down, because it was the leader's own or nobody led, is remembered by
everybody who saw it from a majority, and by the node itself (``observe``). Whoever leads next counts it; a
change of the record in the meantime shows that somebody has dealt with it. So an exit is counted once.
"""

from typing import Final

import attrs

from clusterd.core import quarantine, records
from clusterd.core.braking import Braking
from clusterd.core.desk import Desk
from clusterd.core.isolation import longest_ns, opened, progressed
from clusterd.core.membership import all_in_contact, counted_members, goodbye, in_contact, is_lost, may_be_us
from clusterd.core.records import HeldItem, NodeRecord
from clusterd.core.store_session import StoreSession
from clusterd.core.types import FINAL_RUN_STATES, EventName

REWRITE_NEVER_NS: Final = 1 << 62
UNCOUNTED_SESSIONS: Final = 4  # by then a leader has been found, or there is none to count


@attrs.define
class NodeRecords:
    desk: Desk
    store: StoreSession
    braking: Braking
    current: dict[str, NodeRecord] = attrs.field(factory=dict)
    held: list[HeldItem] = attrs.field(factory=list)
    anchors: dict[str, tuple[int, int]] = attrs.field(factory=dict)  # mod revision, our time of it
    written_at: dict[str, int] = attrs.field(factory=dict)
    lost_since: dict[str, int] = attrs.field(factory=dict)
    capped: set[str] = attrs.field(factory=set)
    lost_at: dict[str, int] = attrs.field(factory=dict)  # revision of its record when it was lost
    uncounted: dict[str, tuple[int, int]] = attrs.field(factory=dict)  # that revision, our time of return
    pending: dict[str, tuple[NodeRecord, NodeRecord]] = attrs.field(factory=dict)

    def reset(self) -> None:
        """We have just become leader: nothing of an earlier term counts."""
        self.anchors.clear()
        self.lost_since.clear()
        self.written_at.clear()
        self.capped.clear()
        self.braking.reset()

    def observe(self) -> None:
        """Every round, leader or not: remember isolations that may stay uncounted."""
        desk = self.desk
        self.braking.observe()
        if all_in_contact(desk) and not (desk.is_self_isolated or self.lost_at or self.uncounted):
            return
        members = counted_members(desk)
        reached = sum(1 for name in members if in_contact(desk, name))
        sees_majority = 2 * reached > len(members) and not may_be_us(desk)
        for name in members:
            revision = desk.view.mod(f"nodes/{name}")
            is_ours = name == desk.name
            is_gone = desk.is_self_isolated if is_ours else is_lost(desk, name)
            if is_gone:
                if (is_ours or sees_majority) and goodbye(desk, name) is None:
                    self.lost_at.setdefault(name, revision)
            elif self.lost_at.pop(name, -1) == revision:
                self.uncounted[name] = (revision, desk.now)
        patience = UNCOUNTED_SESSIONS * desk.properties.store_session_ns
        for name, (revision, at) in list(self.uncounted.items()):
            if desk.view.mod(f"nodes/{name}") != revision or desk.now > at + patience:
                del self.uncounted[name]

    def refresh(self) -> None:
        """Every record as of now; write those that differ."""
        desk = self.desk
        members = list(desk.view.members())
        self.held = []
        stored = {name: self._aged(name) for name in members}
        self.current = {name: self._watched(name, stored[name]) for name in members}
        self.braking.decide(self.current, self._proven())
        self.held += self.braking.held
        self.current = {name: self._missed(name, stored[name], self.current[name]) for name in members}
        for name in members:
            self.current[name] = self._quarantined(name, self.current[name])
        for name in members:
            self._save(name, stored[name], self.current[name])

    def _aged(self, name: str) -> NodeRecord:
        desk, key = self.desk, f"nodes/{name}"
        revision = desk.view.mod(key)
        if revision != self.anchors.get(name, (-1, 0))[0]:
            # A write of ours whose answer was lost counts from when it was made; another's from now.
            is_ours = name in self.pending and desk.view.node(name) == self.pending[name][1]
            self.anchors[name] = (revision, self.written_at.get(name, desk.now) if is_ours else desk.now)
        return quarantine.aged(desk.view.node(name), desk.now - self.anchors[name][1], desk.properties)

    def _watched(self, name: str, record: NodeRecord) -> NodeRecord:
        """Open, progress or close the window."""
        desk, window = self.desk, record.window
        if not is_lost(desk, name):
            self.lost_since.pop(name, None)
            if window is None or not in_contact(desk, name):
                return record
            closed = attrs.evolve(record, window=None)
            is_excused = record.quarantine_elapsed_ns is not None or self.braking.excuses(name)
            is_exit = progressed(window, REWRITE_NEVER_NS).counts and not is_excused
            return quarantine.count_exit(closed) if is_exit else closed
        said = goodbye(desk, name)
        if said is not None and said.kind == "leave":
            return attrs.evolve(record, window=None)
        since = self.lost_since.setdefault(name, desk.now)
        if window is None and may_be_us(desk):
            desk.wake(desk.now + desk.properties.heartbeat_interval_ns // 2)
            return record
        if window is None:
            grace = desk.properties.restart_grace_ns if said is not None else None
            peer = desk.contacts.peers.get(name)
            window = opened(peer.counter[0] if peer else 0, desk.now - since, grace)
        longest = self._longest(name)
        window = progressed(window, longest)
        for end in (window.grace_ns, window.grace_ns + longest):
            if window.elapsed_ns < end:
                desk.wake(desk.now + end - window.elapsed_ns)
        return attrs.evolve(record, window=window)

    def _missed(self, name: str, stored: NodeRecord, record: NodeRecord) -> NodeRecord:
        """Count an isolation that no leader wrote down. Comes after the brake, which may excuse it: our own
        waits until those whom nobody blames yet are back, or are known to be the ones that were lost."""
        if name not in self.uncounted or stored.window is not None or is_lost(self.desk, name):
            return record
        if self.braking.excuses(name):
            del self.uncounted[name]
            return record
        if name == self.desk.name and any(
            is_lost(self.desk, other) and node.window is None and goodbye(self.desk, other) is None
            for other, node in self.current.items()
        ):
            return record
        return record if record.quarantine_elapsed_ns is not None else quarantine.count_exit(record)

    def _longest(self, name: str) -> int:
        view = self.desk.view
        configs = []
        for vm in view.vms():
            assignment, spec = view.assignment(vm), view.spec(vm)
            if assignment is not None and assignment.owner == name and spec is not None:
                configs.append(spec.config)
        return longest_ns(configs, self.desk.properties)

    def _quarantined(self, name: str, record: NodeRecord) -> NodeRecord:
        desk, properties = self.desk, self.desk.properties
        elapsed = record.quarantine_elapsed_ns
        if quarantine.is_over(record, properties):
            return quarantine.release(record)
        if elapsed is not None:
            desk.wake(desk.now + properties.quarantine_duration_ns - elapsed)
            return record
        if not quarantine.is_due(record, properties) or not in_contact(desk, name):
            self.capped.discard(name)
            return record
        inside = sum(1 for other in self.current.values() if other.quarantine_elapsed_ns is not None)
        room = quarantine.cap(properties, len(self.current))
        if inside < room:
            self.capped.discard(name)
            return quarantine.enter(record)
        why = f"{len(record.exit_ages_ns)} ungraceful exits, but {inside} of at most {room} are quarantined"
        self.held.append(
            HeldItem(
                f"quarantine-{name}", "quarantine", name, why, "another node is released, or exits grow old"
            )
        )
        oldest = properties.quarantine_window_ns - max(record.exit_ages_ns)
        desk.wake(desk.now + oldest)
        if name not in self.capped:
            self.capped.add(name)
            desk.note(EventName.QUARANTINE_HELD_BY_CAP, node=name, inside=inside, cap=room)
        return record

    def _save(self, name: str, stored: NodeRecord, wanted: NodeRecord) -> None:
        desk, key = self.desk, f"nodes/{name}"
        if _shape(stored) == _shape(wanted):
            is_running = wanted.window is not None or wanted.quarantine_elapsed_ns is not None
            if not (is_running or wanted.exit_ages_ns):
                return
            due = self.anchors[name][1] + max(
                desk.properties.isolation_ns, 0 if is_running else desk.properties.quarantine_window_ns // 20
            )
            desk.wake(due)
            if desk.now < due:
                return
        guards = self.store.leading() + self.store.same(key)
        if self.store.write(("node", name), guards, [(key, wanted)]):
            self.written_at[name] = desk.now
            self.pending[name] = (stored, wanted)

    def written(self, name: str, succeeded: bool) -> None:
        """A record was written: say what changed."""
        before, after = self.pending.pop(name, (NodeRecord(), NodeRecord()))
        if not succeeded:
            self.written_at.pop(name, None)
            return
        self.anchors[name] = (self.desk.view.mod(f"nodes/{name}"), self.written_at.pop(name, self.desk.now))
        note = self.desk.note
        if after.window is not None and after.window.ended and not (before.window and before.window.ended):
            note(EventName.NODE_DOWN, node=name)
        if len(after.exit_ages_ns) > len(before.exit_ages_ns):
            note(EventName.NODE_EXIT_COUNTED, node=name, exits=len(after.exit_ages_ns))
        was, now = before.quarantine_elapsed_ns is not None, after.quarantine_elapsed_ns is not None
        if now and not was:
            note(EventName.NODE_QUARANTINED, node=name, exits=len(after.exit_ages_ns))
        if was and not now:
            note(EventName.NODE_QUARANTINE_RELEASED, node=name)

    def _proven(self) -> set[str]:
        """Of the nodes that ran anything, those of which all that they ran is known to have ended."""
        view = self.desk.view
        runs: dict[str, list[records.Run]] = {}
        if any(record.window is not None for record in self.current.values()):
            for vm in view.vms():
                run = view.current_run(vm)
                if run is not None and run.state not in FINAL_RUN_STATES:
                    runs.setdefault(run.node, []).append(run)
        return {name for name, theirs in runs.items() if all(map(self.proven_dead, theirs))}

    def proven_dead(self, run: records.Run) -> bool:
        """Whether this very run is known to have ended (section 6 "Proven dead")."""
        view = self.desk.view
        presence = view.presence(run.node)
        if presence is not None and run.boot_id and presence.boot_id != run.boot_id:
            return True  # (a recovered store may not know under which boot a run began)
        said = view.record(f"goodbyes/{run.node}", records.Goodbye)
        if said is not None and said.kind == "leave":
            return any(run_.epoch == run.epoch for run_ in said.runs)
        confirmed = view.record(f"confirmed/{run.node}", records.ConfirmedDead)
        return confirmed is not None and run.boot_id in confirmed.boots()


def _shape(record: NodeRecord) -> tuple[object, ...]:
    """What of a record is worth writing at once: everything but elapsed times."""
    window = record.window
    shape = None if window is None else (window.grace_ns, window.counts, window.ended)
    return shape, len(record.exit_ages_ns), record.quarantine_elapsed_ns is None

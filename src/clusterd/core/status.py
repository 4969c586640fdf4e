"""What the cluster looks like from here: the status document, and the transitions it goes through.

Everything is computed from memory; answering never waits for the store. ``Chronicle`` remembers since when
a state has held, and notes each transition once.
"""

from typing import Any, Final

import attrs

from clusterd.core import quarantine
from clusterd.core.desk import Desk
from clusterd.core.failover import RESTARTS_MAX
from clusterd.core.isolation import longest_ns, period_ns, remaining_ns
from clusterd.core.membership import admission, goodbye, liveness, state_word
from clusterd.core.owner import Owner
from clusterd.core.properties import property_document
from clusterd.core.records import HeldItem, HeldList, Leader, PropertyTexts, Run, Window
from clusterd.core.types import FINAL_RUN_STATES, UNSTARTED_RUN_STATES, EventName, Liveness, VmState
from clusterd.core.watching import Watching
from daemonkit.units import format_duration, to_seconds

GONE: Final = (Liveness.ISOLATED, Liveness.DOWN)
OF_VMS: Final = ("start", "failover", "fence")  # kinds of held items that say what state a VM is in
RUN_WORDS: Final = {
    "fencing": VmState.STARTING,
    "held": VmState.HELD,
    "starting": VmState.STARTING,
    "online": VmState.ONLINE,
    "stalled": VmState.STALLED,
    "stopping": VmState.STOPPING,
}


@attrs.define
class Chronicle:
    """``since``: by (kind, name), the value and our time of it. ``ages``: node record revisions likewise."""

    desk: Desk
    owner: Owner
    watching: Watching
    since: dict[tuple[str, str], tuple[Any, int]] = attrs.field(factory=dict)
    seen_before: tuple[Any, ...] = ()

    def _signature(self) -> tuple[Any, ...]:
        """Everything that states depend on: while it is the same, there is nothing to note."""
        desk = self.desk
        return (
            desk.view.version,
            desk.is_self_isolated,
            desk.is_unsure,
            desk.now >= desk.started_at + desk.properties.isolation_ns,
            tuple(peer.in_contact for peer in desk.contacts.peers.values()),
            tuple((run.vm, run.epoch, run.phase, run.is_stalled) for run in self.owner.runs.values()),
        )

    def update(self) -> None:
        """Note what changed since the last time."""
        desk = self.desk
        signature = self._signature()
        if signature == self.seen_before:
            return
        self.seen_before = signature
        for name in self.node_names():
            live = liveness(desk, name)
            before = self._observe("node", name, live)
            self._observe("record", name, desk.view.mod(f"nodes/{name}"))
            self._observe("word", name, state_word(live, admission(desk, name)))
            if live is not before:
                self._note_node(name, live)
        for vm in desk.view.vms():
            state = self.vm_state(vm)
            before_vm = self._observe("vm", vm, state)
            if state is not before_vm and VmState.UNMONITORED in (state, before_vm):
                self._note_vm(vm, state)
        held = {item.id: item for item in self.held()}
        for key in [key for kind, key in self.since if kind == "held" and key not in held]:
            del self.since["held", key]
            desk.note(EventName.UNHELD, id=key)
        for key, item in held.items():
            if self._observe("held", key, True) is None:
                desk.note(EventName.HELD, id=key, why=item.why, ends_when=item.ends_when)

    def _observe(self, kind: str, name: str, value: Any) -> Any:
        """Remember ``value`` and since when; what it was before."""
        before = self.since.get((kind, name))
        if before is None or before[0] != value:
            self.since[kind, name] = (value, self.desk.now)
        return None if before is None else before[0]

    def _since(self, kind: str, name: str) -> int:
        return self.since.get((kind, name), (None, self.desk.now))[1]

    def _note_node(self, name: str, live: Liveness) -> None:
        note, before_episode = self.desk.note, self.since.get(("episode", name), (None, 0))[0]
        if live is Liveness.ISOLATED:
            note(EventName.NODE_ISOLATED, node=name, reason=self.node_reason(name, live))
        elif live is Liveness.UP and before_episode is None:
            note(EventName.NODE_UP, node=name)
        elif live is Liveness.UP and before_episode == "away":
            note(EventName.NODE_RETURNED, node=name)
        if live in GONE:
            self._observe("episode", name, "away")
        elif live is Liveness.UP:
            self._observe("episode", name, "here")

    def _note_vm(self, vm: str, state: VmState) -> None:
        assignment = self.desk.view.assignment(vm)
        owner = assignment.owner if assignment else None
        epoch = assignment.epoch if assignment else None
        if state is VmState.UNMONITORED:
            self.desk.note(EventName.VM_UNMONITORED, vm=vm, node=owner, epoch=epoch)
        elif state is VmState.ONLINE:
            self.desk.note(EventName.VM_MONITORED, vm=vm, node=owner, epoch=epoch)

    # -- nodes

    def node_names(self) -> list[str]:
        return list(self.desk.view.members()) or sorted([self.desk.name, *self.desk.contacts.peers])

    def node_reason(self, name: str, live: Liveness) -> str | None:
        """Why a node is in its state, in one line."""
        desk = self.desk
        if live is Liveness.ISOLATED and name == desk.name:
            return "no contact with a majority of the members" + (
                "" if desk.store_known else f"; the store is unknown ({desk.store_reason})"
            )
        if live in GONE:
            said = goodbye(desk, name)
            if said is not None:
                return "it left" if said.kind == "leave" else "it announced a restart"
            peer = desk.contacts.peers.get(name)
            if peer is None:
                return "it is not among this node's peers"
            heard, answered = peer.direct_at, peer.acknowledged_at or desk.started_at
            if heard is not None and heard - answered > 2 * desk.properties.heartbeat_interval_ns:
                return "its heartbeats show that it does not hear this node"
            if desk.contacts.is_fresh(peer, peer.advanced_at, desk.now):
                return "those that relay its heartbeats do not hear this node, nor does it"
            limit = format_duration(desk.contacts.lasts_ns(peer))
            return f"no heartbeat of it, direct or relayed, for {limit}"
        if live is Liveness.JOINING:
            return "not registered yet, or runs taken from it are not yet known to be stopped"
        exits = len(desk.view.node(name).exit_ages_ns)
        if desk.view.node(name).quarantine_elapsed_ns is not None:
            return f"{exits} ungraceful exits"
        return None

    def _window(self, name: str) -> Window | None:
        """The node's window as of now: the leader's record, or our own verdict until there is one."""
        desk = self.desk
        age = desk.now - self._since("record", name)
        window = quarantine.aged(desk.view.node(name), age, desk.properties).window
        if window is None and liveness(desk, name) is Liveness.ISOLATED:
            window = Window(desk.now - self._since("node", name))
        return window

    def _node(self, name: str) -> dict[str, Any]:
        desk, properties = self.desk, self.desk.properties
        live, admitted = liveness(desk, name), admission(desk, name)
        window = self._window(name) if live in GONE else None
        age = desk.now - self._since("record", name)
        record = quarantine.aged(desk.view.node(name), age, properties)
        elapsed = record.quarantine_elapsed_ns
        remaining = None
        if window is not None:
            configs = [
                spec.config
                for vm in desk.view.vms()
                if (spec := desk.view.spec(vm)) is not None
                and (assignment := desk.view.assignment(vm)) is not None
                and assignment.owner == name
            ]
            remaining = remaining_ns(window, longest_ns(configs, properties))
        left = None if elapsed is None else max(0, properties.quarantine_duration_ns - elapsed)
        return {
            "state": state_word(live, admitted),
            "liveness": live.value,
            "admission": admitted.value,
            "present": desk.view.presence(name) is not None,
            "since_s": to_seconds(desk.now - self._since("word", name)),
            "reason": self.node_reason(name, live),
            "window_remaining_s": None if remaining is None else to_seconds(remaining),
            "quarantine_remaining_s": None if left is None else to_seconds(left),
            "ungraceful_exits": len(record.exit_ages_ns),
        }

    # -- VMs

    def _run(self, vm: str) -> Run | None:
        """What is known of the assigned run: our own observation where it is ours, else the store's."""
        assignment, local = self.desk.view.assignment(vm), self.owner.runs.get(vm)
        if assignment is not None and local is not None and assignment.owner == self.desk.name:
            own = local.record(self.desk.name) if local.epoch == assignment.epoch else None
            if own is not None:
                return own
        return self.desk.view.current_run(vm)

    def _held_of(self, vm: str) -> HeldItem | None:
        return next((item for item in self.held() if item.subject == vm and item.kind in OF_VMS), None)

    def vm_state(self, vm: str) -> VmState:
        """One of the states of DESIGN section 2."""
        desk = self.desk
        spec, assignment, run = desk.view.spec(vm), desk.view.assignment(vm), self._run(vm)
        is_held = self._held_of(vm) is not None
        waiting = VmState.HELD if is_held else VmState.STARTING
        if assignment is None or spec is None:
            return VmState.OFFLINE if spec is None or spec.desired == "offline" else waiting
        if run is not None and run.state in FINAL_RUN_STATES:
            if spec.desired == "offline":
                return VmState.OFFLINE
            worn_out = assignment.attempt >= RESTARTS_MAX and run.counts and run.state == "failed"
            return VmState.FAILED if worn_out and not is_held else waiting
        if run is None or run.state in UNSTARTED_RUN_STATES:
            stopping = assignment.action == "stop" and not is_held
            return (
                VmState.STOPPING if stopping else (VmState.HELD if run and run.state == "held" else waiting)
            )
        if liveness(desk, assignment.owner) in GONE:
            return VmState.HELD if is_held else VmState.UNMONITORED
        if assignment.action == "stop":
            return VmState.STOPPING
        return RUN_WORDS[run.state]

    def _vm(self, vm: str) -> dict[str, Any]:
        desk, view = self.desk, self.desk.view
        spec, assignment, run = view.spec(vm), view.assignment(vm), self._run(vm)
        assert spec is not None
        state, held = self.vm_state(vm), self._held_of(vm)
        remaining = None
        if state is VmState.UNMONITORED and assignment is not None:
            window = self._window(assignment.owner)
            if window is not None:
                remaining = remaining_ns(window, period_ns(spec.config, desk.properties, False))
        age = self.watching.last_io_age_ns([disk.image for disk in spec.config.disks])
        reason = (held.why if held else None) or (run.reason if run else "") or None
        if reason is None and assignment is not None:
            reason = assignment.reason or None
        return {
            "state": state.value,
            "desired": spec.desired,
            "owner": assignment.owner if assignment else None,
            "epoch": assignment.epoch if assignment else None,
            "pid": run.pid if run else None,
            "since_s": to_seconds(desk.now - self._since("vm", vm)),
            "window_remaining_s": None if remaining is None else to_seconds(remaining),
            "last_io_age_s": None if age is None else to_seconds(age),
            "reason": reason,
        }

    # -- the whole

    def held(self) -> list[HeldItem]:
        """What the leader holds back, as recorded."""
        stored = self.desk.view.record("held", HeldList)
        return list(stored.items) if stored else []

    def document(self) -> dict[str, Any]:
        """The document of ``clusterctl status --json`` (DESIGN section 9)."""
        desk = self.desk
        leader = desk.view.record("leader", Leader)
        texts = desk.view.record("properties", PropertyTexts)
        return {
            "cluster": desk.identity.cluster,
            "answered_by": desk.name,
            "as_of_s": to_seconds(desk.now),
            "leader": leader.node if leader else None,
            "store": "ok" if desk.store_known else "unknown",
            "properties": property_document(texts.texts if texts else {}),
            "nodes": {name: self._node(name) for name in self.node_names()},
            "vms": {vm: self._vm(vm) for vm in desk.view.vms()},
            "reachability": desk.contacts.reachability(desk.now),
            "held": [
                {
                    "id": item.id,
                    "kind": item.kind,
                    "subject": item.subject,
                    "why": item.why,
                    "ends_when": item.ends_when,
                    "since_s": to_seconds(desk.now - self._since("held", item.id)),
                }
                for item in self.held()
            ],
        }

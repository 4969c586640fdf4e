"""The leader's work on VMs: verdicts (failover.py) carried out as guarded transactions, at a bounded rate.

A start goes: verdict -> place -> probe (target and every diskd concerned answer) -> one transaction that
raises the epoch counter above everything seen and records the assignment. Only one such transaction is
open at a time, and at most ``STARTS_AT_ONCE`` VMs are on their way. What cannot go on becomes a held item.
"""

from typing import Final

import attrs

from clusterd.core import effects, events
from clusterd.core.desk import Desk
from clusterd.core.doubts import open_doubts, settle_doubts
from clusterd.core.failover import Facts, Verdict, judge
from clusterd.core.membership import admission, in_contact, why_not_placed
from clusterd.core.nodes import NodeRecords
from clusterd.core.placement import Choice, Room, place
from clusterd.core.records import Assignment, EpochCounter, HeldItem, HeldList, MovedAway, VmRequest
from clusterd.core.store_session import StoreSession
from clusterd.core.types import Admission, EventName, VmConfig
from daemonkit.units import MINUTE

STARTS_AT_ONCE: Final = 4
STABLE_NS: Final = 10 * MINUTE  # online for this long: earlier failures are forgotten
DRAINED: Final = (Admission.QUARANTINED, Admission.LEAVING)


@attrs.define
class ProbeOf:
    """The last probe for a VM."""

    target: str
    request: int | None
    at: int
    reached: bool = False
    reason: str = ""
    epochs: dict[str, int] = attrs.field(factory=dict)


@attrs.define
class Leader:
    desk: Desk
    store: StoreSession
    nodes: NodeRecords
    probes: dict[str, ProbeOf] = attrs.field(factory=dict)
    unreachable: dict[tuple[str, str], tuple[int, str]] = attrs.field(factory=dict)
    online_since: dict[tuple[str, int], int] = attrs.field(factory=dict)
    held: list[HeldItem] = attrs.field(factory=list)
    cancelled: dict[str, str] = attrs.field(factory=dict)
    failed_probes: dict[str, tuple[str, str]] = attrs.field(factory=dict)  # why, and what would end it
    is_in_office: bool = False
    starting: tuple[str, str, Assignment, str | None] | None = None

    def decide(self) -> None:
        """One round over all nodes and VMs; level-triggered."""
        if not self.is_in_office:
            self.is_in_office = True
            self.nodes.reset()
            self.probes.clear()
            self.unreachable.clear()
            self.failed_probes.clear()
            self.online_since.clear()
        self.nodes.refresh()
        self.held = list(self.nodes.held)
        settle_doubts(self.desk, self.store)
        view = self.desk.view
        specs = {vm: spec for vm in view.vms() if (spec := view.spec(vm)) is not None}
        facts = {vm: self.facts(vm) for vm in specs}
        under_way = sum(1 for f in facts.values() if self._is_under_way(f))
        order = sorted(specs, key=lambda vm: (-specs[vm].config.priority, vm))
        for vm in order:
            verdict = judge(facts[vm], self.desk.properties)
            if verdict.kind == "start" and under_way >= STARTS_AT_ONCE:
                continue
            if self._carry_out(vm, facts[vm], verdict):
                under_way += 1
        self._save_held()

    def leave_office(self) -> None:
        self.is_in_office = False
        self.nodes.braking.leave_office()

    def facts(self, vm: str) -> Facts:
        """Everything that counts for this VM now."""
        desk, view = self.desk, self.desk.view
        spec = view.spec(vm)
        assert spec is not None
        assignment, run = view.assignment(vm), view.current_run(vm)
        request = view.record(f"vms/{vm}/request", VmRequest)
        if assignment is None:
            return Facts(spec, request=request, doubted=open_doubts(desk, vm))
        owner = assignment.owner
        previous = assignment.previous
        if run is not None and run.state == "online":
            self.online_since.setdefault((vm, run.epoch), desk.now)
        since = self.online_since.get((vm, assignment.epoch), desk.now)
        member = view.members().get(owner)
        record = self.nodes.current.get(owner)
        return Facts(
            spec,
            assignment,
            run,
            request,
            owner_in_contact=in_contact(desk, owner),
            owner_is_present=view.presence(owner) is not None,
            owner_is_drained=admission(desk, owner) in DRAINED or bool(member and member.drain),
            grip=self.nodes.braking.grip(owner),
            previous_in_contact=previous is not None and in_contact(desk, previous),
            proven_dead=run is not None and self.nodes.proven_dead(run),
            window=record.window if record else None,
            was_stable=desk.now - since >= STABLE_NS,
            doubted=open_doubts(desk, vm),
        )

    def _is_under_way(self, facts: Facts) -> bool:
        assignment, run = facts.assignment, facts.run
        if assignment is None or assignment.action != "run" or not facts.owner_in_contact:
            return False
        if not facts.owner_is_present:  # it cannot say how far it is: others do not wait for it
            return False
        return run is None or run.state in ("fencing", "starting")

    # -- carrying out

    def _carry_out(self, vm: str, facts: Facts, verdict: Verdict) -> bool:
        """Whether this took one of the places for starts."""
        if verdict.wait_ns is not None:
            self.desk.wake(self.desk.now + verdict.wait_ns)
        if verdict.kind == "start":
            return self._start(vm, facts, verdict)
        if verdict.kind == "stop" and facts.assignment is not None:
            self._assign(vm, attrs.evolve(facts.assignment, action="stop", then=None), verdict.why)
        elif verdict.kind == "drain":
            self._drain(vm, facts, verdict)
        elif verdict.kind == "cancel" and facts.assignment is not None:
            self._cancel(vm, facts.assignment)
        elif verdict.kind == "hold":
            kind = "fence" if facts.owner_in_contact else "failover"
            self._hold(kind, vm, verdict.why, verdict.ends_when)
        elif verdict.kind == "bury" and facts.assignment is not None:
            self._bury(vm, facts.assignment)
        elif verdict.kind == "forget":
            key = f"vms/{vm}/request"
            guards = self.store.leading() + self.store.same(key)
            self.store.write(("forget", vm), guards, [], deletes=(key,))
        return False

    def _hold(self, kind: str, subject: str, why: str, ends_when: str) -> None:
        self.held.append(HeldItem(f"{kind}-{subject}", kind, subject, why, ends_when))

    def rooms(self, besides: str | None = None) -> list[Room]:
        """Every member as placement sees it, without counting the VM ``besides``."""
        desk, view = self.desk, self.desk.view
        rooms = {}
        for name in view.members():
            presence = view.presence(name)
            memory, vcpus = (presence.memory_bytes, presence.vcpus) if presence else (0, 0)
            rooms[name] = Room(name, memory, vcpus, why_not=why_not_placed(desk, name))
        for vm in view.vms():
            assignment, spec, run = view.assignment(vm), view.spec(vm), view.current_run(vm)
            if vm == besides or assignment is None or spec is None or assignment.owner not in rooms:
                continue
            if run is not None and run.state in ("stopped", "failed"):
                continue
            room = rooms[assignment.owner]
            rooms[room.name] = attrs.evolve(
                room,
                used_memory_bytes=room.used_memory_bytes + spec.config.memory_bytes,
                used_vcpus=room.used_vcpus + spec.config.vcpus,
                vms=room.vms + 1,
            )
        return list(rooms.values())

    def _choose(self, config: VmConfig, wanted: str | None, excluded: dict[str, str]) -> Choice:
        now = self.desk.now
        for (vm, node), (until, reason) in sorted(self.unreachable.items()):
            if vm == config.name and now < until:
                excluded[node] = reason
                self.desk.wake(until)
        return place(config, self.rooms(config.name), wanted=wanted, excluded=excluded)

    def _start(self, vm: str, facts: Facts, verdict: Verdict) -> bool:
        config = facts.spec.config
        choice = self._choose(config, verdict.wanted, {})
        kind = "failover" if verdict.is_failover else "start"
        if choice.node is None:
            why = f"{verdict.why}, but no node can take it ({'; '.join(choice.reasons)})"
            self._hold(kind, vm, why, "one of these nodes can take it")
            return False
        probe = self._probed(vm, choice.node, config)
        if probe is None:
            if vm in self.failed_probes:  # still so while the next node is asked
                reason, ends_when = self.failed_probes[vm]
                self._hold(kind, vm, f"{verdict.why}, but {reason}", ends_when)
            return True
        if not probe.reached:
            self._hold(kind, vm, f"{verdict.why}, but {probe.reason}", f"{probe.target} and its diskd answer")
            return False
        self._record_start(vm, facts, verdict, choice, probe)
        return True

    def _probed(self, vm: str, target: str, config: VmConfig) -> ProbeOf | None:
        """A probe of this target that was just answered, or None while there is none."""
        desk, probe = self.desk, self.probes.get(vm)
        if probe is not None and probe.request is not None:
            return None
        fresh_ns = desk.properties.isolation_ns
        if probe is not None and probe.target == target and desk.now < probe.at + fresh_ns:
            return probe
        self.probes[vm] = ProbeOf(target, desk.request(), desk.now)
        request = self.probes[vm].request
        assert request is not None
        desk.act(effects.Probe(request, target, vm, config.disks))
        return None

    def probe_answered(self, event: events.ProbeAnswered) -> None:
        for vm, probe in self.probes.items():
            if probe.request == event.request:
                probe.request, probe.at = None, self.desk.now
                probe.reached, probe.reason, probe.epochs = event.reached, event.reason, event.epochs
                key = (vm, probe.target)
                self.unreachable.pop(key, None)
                self.failed_probes.pop(vm, None)
                if not event.reached:
                    self.failed_probes[vm] = (event.reason, f"{probe.target} and its diskd answer")
                    until = self.desk.now + self.desk.properties.isolation_ns
                    self.unreachable[key] = (until, event.reason)
                return

    def _record_start(self, vm: str, facts: Facts, verdict: Verdict, choice: Choice, probe: ProbeOf) -> None:
        """S1, S2: one epoch for all disks, above everything ever seen, from the one counter."""
        view, old, run = self.desk.view, facts.assignment, facts.run
        assert choice.node is not None
        seen = max([view.epoch(), self.desk.state.epoch_seen, *probe.epochs.values()])
        if run is not None:
            seen = max(seen, run.seen_epoch)
        is_taken = old is not None and old.owner != choice.node
        last_node, last_boot = (old.last_node, old.last_boot) if old is not None else ("", "")
        if run is not None and run.has_disks():
            last_node, last_boot = run.node, run.boot_id
        new = Assignment(
            choice.node,
            seen + 1,
            reason=f"{verdict.why}; {choice.reasons[0]}",
            attempt=verdict.attempt,
            previous=old.owner if verdict.is_failover and old and is_taken else None,
            previous_epoch=old.epoch if verdict.is_failover and old and is_taken else 0,
            last_node=last_node,
            last_boot=last_boot,
        )
        keys = [f"vms/{vm}/assignment", f"vms/{vm}/run", f"vms/{vm}/spec", f"vms/{vm}/request", "epoch"]
        puts = [(keys[0], new), ("epoch", EpochCounter(seen + 1))]
        if old is not None and is_taken:
            puts.append((f"moves/{old.owner}", MovedAway(vm, new.epoch)))
        deletes = (keys[3],) if facts.request is not None else ()
        guards = self.store.leading() + self.store.same(*keys)
        name = "failover" if verdict.is_failover else "assign"
        if self.store.is_writing("start"):
            return
        if self.store.write(("start",), guards, list(puts), deletes):
            self.starting = (vm, name, new, old.owner if old else None)
            del self.probes[vm]

    def written(self, token: tuple[str, ...], succeeded: bool) -> None:
        """The transaction of a start or a cancellation was answered: say so."""
        if token[0] == "start" and self.starting is not None:
            (vm, name, new, old), self.starting = self.starting, None
            if not succeeded:
                return
            if name == "failover":
                self.desk.note(
                    EventName.VM_FAILED_OVER,
                    vm=vm,
                    taken_from=old,
                    owner=new.owner,
                    epoch=new.epoch,
                    reason=new.reason,
                )
            else:
                self.desk.note(
                    EventName.VM_ASSIGNED, vm=vm, owner=new.owner, epoch=new.epoch, reason=new.reason
                )
        elif token[0] == "cancel":
            why = self.cancelled.pop(token[1], "")
            if succeeded:
                self.desk.note(EventName.VM_FAILOVER_CANCELLED, vm=token[1], owner=why)

    def _assign(self, vm: str, new: Assignment, why: str) -> None:
        keys = (f"vms/{vm}/assignment", f"vms/{vm}/run", f"vms/{vm}/spec", f"vms/{vm}/request")
        guards = self.store.leading() + self.store.same(*keys)
        deletes = (keys[3],) if self.desk.view.mod(keys[3]) else ()
        self.store.write(("assign", vm), guards, [(keys[0], attrs.evolve(new, reason=why))], deletes)

    def _cancel(self, vm: str, assignment: Assignment) -> None:
        """The epoch is burnt; the old owner goes on with its own, if its run still lives."""
        assert assignment.previous is not None
        keys = (f"vms/{vm}/assignment", f"vms/{vm}/run")
        back = Assignment(
            assignment.previous,
            assignment.previous_epoch,
            reason="back in time",
            given_back=True,
            last_node=assignment.last_node,
            last_boot=assignment.last_boot,
        )
        puts = [(keys[0], back), (f"moves/{assignment.owner}", MovedAway(vm, assignment.epoch))]
        guards = self.store.leading() + self.store.same(*keys)
        if self.store.write(("cancel", vm), guards, list(puts)):
            self.cancelled[vm] = assignment.previous

    def _bury(self, vm: str, assignment: Assignment) -> None:
        keys = tuple(f"vms/{vm}/{part}" for part in ("assignment", "run", "spec", "request"))
        guards = self.store.leading() + self.store.same(*keys)
        moved = (f"moves/{assignment.owner}", MovedAway(vm, assignment.epoch))
        self.store.write(("bury", vm), guards, [moved], deletes=(keys[0], keys[1]))

    def _drain(self, vm: str, facts: Facts, verdict: Verdict) -> None:
        """One VM of a node at a time, and only towards a target that answered; a leaving node is emptied
        even where nobody can take its VMs."""
        assignment = facts.assignment
        assert assignment is not None
        owner = assignment.owner
        if verdict.wanted is None and self._is_draining(owner):
            return
        choice = self._choose(facts.spec.config, verdict.wanted, {owner: "is where it leaves"})
        missed = verdict.wanted is not None and choice.node != verdict.wanted
        if choice.node is None or missed:
            if admission(self.desk, owner) is Admission.LEAVING:
                self._assign(vm, attrs.evolve(assignment, action="stop", then=None), verdict.why)
                return
            why = f"{verdict.why}, but it fits nowhere ({'; '.join(choice.reasons)})"
            if missed:
                why = f"{verdict.why}, but {verdict.wanted} cannot take it ({'; '.join(choice.reasons)})"
            self._hold("drain", vm, why, "a node can take it")
            return
        probe = self._probed(vm, choice.node, facts.spec.config)
        if probe is not None and probe.reached:
            self._assign(vm, attrs.evolve(assignment, action="stop", then=choice.node), verdict.why)
        elif probe is not None:
            self._hold("drain", vm, f"{verdict.why}, but {probe.reason}", f"{probe.target} answers")

    def _is_draining(self, owner: str) -> bool:
        """Whether a VM of this node is being stopped, or on its way to where it was moved."""
        view, is_leaving = self.desk.view, admission(self.desk, owner) is Admission.LEAVING
        for vm in view.vms():
            assignment, run = view.assignment(vm), view.current_run(vm)
            if assignment is None or assignment.owner != owner or (run is not None and run.state == "failed"):
                continue
            if is_leaving and run is not None and run.state == "stopped":
                continue  # it may fit nowhere, and need not for the node to be emptied
            if self.store.is_writing("assign", vm):
                return True
            if assignment.action == "stop":
                spec = view.spec(vm)
                if spec is not None and spec.desired == "online":
                    return True
        return False

    def _save_held(self) -> None:
        """S5: what is held is shown by every node, so it is kept in the store."""
        wanted = HeldList(tuple(sorted(self.held, key=lambda item: item.id)))
        stored = self.desk.view.record("held", HeldList) or HeldList(())
        if wanted != stored:
            guards = self.store.leading() + self.store.same("held")
            self.store.write(("held",), guards, [("held", wanted)])

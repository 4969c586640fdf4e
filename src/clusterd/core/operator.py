"""Operators' commands: each becomes one guarded transaction on the operator's own keys, or a refusal.

A command waits while the store is unknown, is tried again when a guard refused it, and is refused after
``PATIENCE_NS``. Accepted means recorded; the leader and the owners do the rest.
"""

from collections.abc import Callable
from typing import Any, Final

import attrs

from clusterd.core import braking, effects, quarantine, records
from clusterd.core import commands as c
from clusterd.core.desk import Desk
from clusterd.core.doubts import doubt_of, open_doubts
from clusterd.core.membership import in_contact, liveness, why_not_placed
from clusterd.core.properties import parse_properties
from clusterd.core.store_session import StoreSession
from clusterd.core.types import FINAL_RUN_STATES, UNSTARTED_RUN_STATES, VMS_MAX, EventName, Liveness, check_vm
from clusterd.errors import Refused
from daemonkit.units import SECOND

PATIENCE_NS: Final = 5 * SECOND
HOLD_ID_MAX: Final = 80  # a kind and a name
COMMANDS_MAX: Final = 64  # waiting at once; an operator's script that sends more is told to slow down


@attrs.frozen
class Change:
    """What a command writes. ``keys``: those it read, and so guards."""

    keys: tuple[str, ...]
    puts: tuple[tuple[str, Any], ...] = ()
    deletes: tuple[str, ...] = ()
    text: str = ""
    nodes: tuple[str, ...] = ()  # that the brake lets go by it


@attrs.define
class Waiting:
    command: c.Command
    until: int
    given_at: int
    text: str = ""
    nodes: tuple[str, ...] = ()


@attrs.define
class Operator:
    desk: Desk
    store: StoreSession
    waiting: dict[int, Waiting] = attrs.field(factory=dict)

    def given(self, ticket: int, command: c.Command) -> None:
        if len(self.waiting) >= COMMANDS_MAX:
            self.desk.act(effects.AnswerCommand(ticket, False, "too many commands at once: try again"))
            return
        self.waiting[ticket] = Waiting(command, self.desk.now + PATIENCE_NS, self.desk.now)
        self.store.read_soon()

    def decide(self) -> None:
        """Write, answer or give up what waits."""
        for ticket, waiting in list(self.waiting.items()):
            if self.desk.now >= waiting.until:
                reason = self.desk.store_reason or "its records keep changing"
                text = f"the store could not be written in time ({reason}): try again"
                # Once it was asked to write, it may have, and only its answer was lost.
                self._answer(ticket, False, text, is_unknown=bool(waiting.text))
            elif self._has_read(waiting) and not self.store.is_writing("command", str(ticket)):
                self._try(ticket, waiting)
            if ticket in self.waiting:
                self.desk.wake(waiting.until)

    def _has_read(self, waiting: Waiting) -> bool:
        """A command is judged by a read that began after it was given, so that two in a row are in order."""
        return self.store.is_usable and self.store.last_read_asked_at >= waiting.given_at

    def _try(self, ticket: int, waiting: Waiting) -> None:
        try:
            change = BUILDERS[type(waiting.command)](self.desk, waiting.command)
        except Refused as error:
            self._answer(ticket, False, str(error), is_unknown=bool(waiting.text))
            return
        waiting.text, waiting.nodes = change.text, change.nodes
        if not change.puts and not change.deletes:
            self._answer(ticket, True, change.text)
            return
        token = ("command", str(ticket))
        self.store.write(token, self.store.same(*change.keys), list(change.puts), change.deletes)

    def written(self, token: tuple[str, ...], succeeded: bool) -> None:
        if token[0] != "command" or not succeeded:
            return
        ticket = int(token[1])
        if ticket in self.waiting:
            command = self.waiting[ticket].command
            if isinstance(command, c.ConfirmDead):
                self.desk.note(EventName.NODE_PROVEN_DEAD, node=command.node, by="operator")
            if isinstance(command, c.ReleaseHold) and self.waiting[ticket].nodes:
                nodes = list(self.waiting[ticket].nodes)
                self.desk.note(EventName.BRAKE_RELEASED, nodes=nodes, reason="released by an operator")
            self._answer(ticket, True, self.waiting[ticket].text)

    def _answer(self, ticket: int, accepted: bool, text: str, *, is_unknown: bool = False) -> None:
        del self.waiting[ticket]
        self.desk.act(effects.AnswerCommand(ticket, accepted, text, is_unknown))


def _spec(desk: Desk, vm: str) -> records.VmSpec:
    spec = desk.view.spec(vm)
    if spec is None:
        raise Refused(f"there is no VM {vm!r}: 'clusterctl vm list' shows them")
    return spec


def _member(desk: Desk, node: str) -> records.Member:
    member = desk.view.members().get(node)
    if member is None:
        raise Refused(f"there is no node {node!r}: 'clusterctl node list' shows them")
    return member


def _add_vm(desk: Desk, command: c.AddVm) -> Change:
    config = check_vm(command.config)
    key, old = f"vms/{config.name}/spec", desk.view.spec(config.name)
    if old is not None and not command.replace:
        raise Refused(f"VM {config.name} exists: 'clusterctl vm apply' changes it")
    if len(desk.view.vms()) >= VMS_MAX:
        raise Refused(f"the cluster has {VMS_MAX} VMs already")
    images = {(disk.diskd, disk.image) for disk in config.disks}
    for vm in desk.view.vms():
        other = _spec(desk, vm).config
        taken = images & {(disk.diskd, disk.image) for disk in other.disks}
        if vm != config.name and taken:
            raise Refused(f"image {min(taken)[1]} belongs to VM {vm}")
    assignment, run = desk.view.assignment(config.name), desk.view.current_run(config.name)
    lives = assignment is not None and (run is None or run.state not in FINAL_RUN_STATES)
    if old is not None and lives and old.config.disks != config.disks:
        raise Refused(f"VM {config.name} runs: its disks can be changed only while it is offline")
    desired = old.desired if old is not None else ("online" if command.start else "offline")
    text = "changed; it takes effect at the next start" if old else "added"
    puts: list[tuple[str, Any]] = [(key, records.VmSpec(config, desired))]
    if old is None or old.config.disks != config.disks:
        changes = desk.view.record("vmset", records.VmSet) or records.VmSet()
        puts.append(("vmset", records.VmSet(changes.changes + 1)))
    keys = (key, "vmset", f"vms/{config.name}/assignment", f"vms/{config.name}/run")
    return Change(keys, tuple(puts), text=f"VM {config.name} {text}")


def _remove_vm(desk: Desk, command: c.RemoveVm) -> Change:
    spec, vm = _spec(desk, command.vm), command.vm
    assignment, run = desk.view.assignment(vm), desk.view.current_run(vm)
    ended = assignment is None or (run is not None and run.state in FINAL_RUN_STATES)
    if spec.desired != "offline" or not ended:
        raise Refused(f"VM {vm} is not offline: 'clusterctl vm stop {vm}' first")
    doubted = open_doubts(desk, vm)
    if doubted:
        raise Refused(
            f"VM {vm} may live on {', '.join(doubted)}, unseen since the store was rebuilt: bring it back, or"
            " 'clusterctl node confirm-dead' it"
        )
    keys = tuple(f"vms/{vm}/{part}" for part in ("spec", "assignment", "run", "request", "doubt"))
    return Change(keys, deletes=keys, text=f"VM {vm} removed; its images are kept")


def _start_vm(desk: Desk, command: c.StartVm) -> Change:
    spec, vm = _spec(desk, command.vm), command.vm
    keys = (f"vms/{vm}/spec", f"vms/{vm}/request")
    puts: list[tuple[str, Any]] = []
    if spec.desired != "online":
        puts.append((keys[0], attrs.evolve(spec, desired="online")))
    run = desk.view.current_run(vm)
    if run is not None and run.state == "failed":
        puts.append((keys[1], records.VmRequest("start")))
    text = f"VM {vm} will be started" if puts else f"VM {vm} is wanted online already"
    return Change(keys, tuple(puts), text=text)


def _stop_vm(desk: Desk, command: c.StopVm) -> Change:
    spec, key = _spec(desk, command.vm), f"vms/{command.vm}/spec"
    return Change(
        (key,), ((key, attrs.evolve(spec, desired="offline")),), text=f"VM {command.vm} will be stopped"
    )


def _move_vm(desk: Desk, command: c.MoveVm) -> Change:
    spec, vm = _spec(desk, command.vm), command.vm
    _member(desk, command.node)
    assignment, run = desk.view.assignment(vm), desk.view.current_run(vm)
    if (
        spec.desired != "online"
        or assignment is None
        or run is None
        or run.state not in ("online", "stalled")
    ):
        raise Refused(f"VM {vm} is not online: only a running VM is moved")
    if not in_contact(desk, assignment.owner):
        raise Refused(f"VM {vm} is unmonitored on {assignment.owner}: 'clusterctl vm failover {vm}'")
    if assignment.owner == command.node:
        raise Refused(f"VM {vm} runs on {command.node} already")
    why_not = why_not_placed(desk, command.node)
    if why_not:
        raise Refused(f"{command.node} cannot take VM {vm}: {why_not}")
    key = f"vms/{vm}/request"
    request = records.VmRequest("move", command.node)
    return Change((key, f"vms/{vm}/assignment"), ((key, request),), text=f"VM {vm} moves to {command.node}")


def _failover_vm(desk: Desk, command: c.FailoverVm) -> Change:
    vm = command.vm
    _spec(desk, vm)
    assignment, run = desk.view.assignment(vm), desk.view.current_run(vm)
    live = run is not None and run.state not in (*FINAL_RUN_STATES, *UNSTARTED_RUN_STATES)
    if assignment is None or not live or in_contact(desk, assignment.owner):
        raise Refused(f"VM {vm} is not unmonitored: 'clusterctl vm move {vm} NODE' moves a running VM")
    key = f"vms/{vm}/request"
    text = f"the window of VM {vm} is ended: it is failed over as soon as it is fenced"
    return Change((key, f"vms/{vm}/assignment"), ((key, records.VmRequest("failover")),), text=text)


def _set_property(desk: Desk, command: c.SetProperty) -> Change:
    record = desk.view.record("properties", records.PropertyTexts)
    texts = {**(record.texts if record else {}), command.name: command.value}
    parse_properties(texts)
    return Change(
        ("properties",),
        (("properties", records.PropertyTexts(texts)),),
        text=f"{command.name} is {command.value}",
    )


def _admit(desk: Desk, node: str, changed: records.Member, text: str) -> Change:
    key = f"members/{node}"
    return Change((key,), ((key, changed),), text=text)


def _pause(desk: Desk, command: c.PauseNode) -> Change:
    member = _member(desk, command.node)
    if member.admission == "leaving":
        raise Refused(f"{command.node} is leaving: 'clusterctl node resume {command.node}' first")
    text = f"{command.node} is paused" + (" and drained" if command.drain else "")
    changed = attrs.evolve(member, admission="paused", drain=command.drain)
    return _admit(desk, command.node, changed, text)


def _resume(desk: Desk, command: c.ResumeNode) -> Change:
    changed = attrs.evolve(_member(desk, command.node), admission="normal", drain=False)
    return _admit(desk, command.node, changed, f"{command.node} takes part again")


def _leave(desk: Desk, command: c.LeaveNode) -> Change:
    changed = attrs.evolve(_member(desk, command.node), admission="leaving", drain=True)
    return _admit(desk, command.node, changed, f"{command.node} leaves once its VMs have moved")


def _remove_node(desk: Desk, command: c.RemoveNode) -> Change:
    node, view = command.node, desk.view
    _member(desk, node)
    if liveness(desk, node) is not Liveness.DOWN:
        raise Refused(f"{node} is not down: 'clusterctl node leave {node}' first")
    guards = [f"members/{node}", f"presence/{node}"]
    for vm in view.vms():
        assignment, run = view.assignment(vm), view.current_run(vm)
        if assignment is not None and assignment.owner == node:
            guards.append(f"vms/{vm}/assignment")
            if run is None or run.state not in FINAL_RUN_STATES:
                raise Refused(f"VM {vm} belongs to {node}: fail it over, or confirm that {node} is dead")
        if node in open_doubts(desk, vm):
            raise Refused(f"VM {vm} may live on {node}: 'clusterctl node confirm-dead {node}' first")
    # What was confirmed stays: a VM may still wait for the proof, and a boot id never comes back.
    deletes = tuple(f"{kind}/{node}" for kind in ("members", "nodes", "moves", "goodbyes"))
    return Change(tuple(guards), deletes=deletes, text=f"{node} removed")


def _clear_quarantine(desk: Desk, command: c.ClearQuarantine) -> Change:
    _member(desk, command.node)
    key, record = f"nodes/{command.node}", desk.view.node(command.node)
    if record.quarantine_elapsed_ns is None and not record.exit_ages_ns:
        raise Refused(f"{command.node} is not quarantined and has no ungraceful exits")
    text = f"{command.node} is released; its exits are cleared"
    return Change((key,), ((key, quarantine.release(record)),), text=text)


def _confirm_dead(desk: Desk, command: c.ConfirmDead) -> Change:
    """A node that was removed can be confirmed as well, as long as a VM waits for the proof."""
    node, view = command.node, desk.view
    if in_contact(desk, node):
        raise Refused(f"{node} is alive: this node is in contact with it")
    presence, boots = view.presence(node), _unproven_boots(desk, node)
    if not boots:
        _member(desk, node)
        raise Refused(f"nothing is known to run on {node}")
    if presence is not None and boots != [presence.boot_id]:
        raise Refused(f"{node} is back under another boot id: that proves the death of its former runs")
    peer = desk.contacts.peers.get(node)
    key = f"confirmed/{node}"
    known = view.record(key, records.ConfirmedDead)
    before = [boot for boot in known.boots() if boot not in boots] if known else []
    also = (*boots[1:], *before[: records.CONFIRMED_BOOTS_MAX])
    record = records.ConfirmedDead(boots[0], peer.counter[0] if peer else 0, also)
    return Change((key,), ((key, record),), text=f"{node} is confirmed dead: its windows end now")


def _unproven_boots(desk: Desk, node: str) -> list[str]:
    """The boots of a node whose end would let something go on. Under how many it ran does not matter: the
    word that it is dead is about all of them. A VM that lives elsewhere waits for none, whatever its
    assignment remembers of where it was before."""
    view, boots = desk.view, set()
    presence = view.presence(node)
    for vm in view.vms():
        run, taken = view.current_run(vm), view.assignment(vm)
        if run is not None and run.node == node and run.state not in FINAL_RUN_STATES:
            boots.add(run.boot_id)
        is_awaited = run is None or not run.has_disks()
        if is_awaited and taken is not None and taken.last_node == node and presence is None:
            boots.add(taken.last_boot)  # given to another, whose diskd waits for this proof
        doubt = doubt_of(desk, vm)
        if doubt is not None and node in open_doubts(desk, vm):
            boots.add(doubt.nodes[node])
    if presence is not None:
        boots.add(presence.boot_id)
    return sorted(boots)


def _release_hold(desk: Desk, command: c.ReleaseHold) -> Change:
    """Only the brake takes an operator's word. What S2, the cap or a lack of room hold, only facts end."""
    found = braking.release(desk, command.id)
    if found is not None:
        record, let_go = found
        if not let_go:
            return Change(("brake",), text=f"{command.id} is released already")
        text = f"the failovers of {', '.join(let_go)} go on as their windows end"
        return Change(("brake",), (("brake", record),), text=text, nodes=tuple(let_go))
    held = desk.view.record("held", records.HeldList) or records.HeldList(())
    item = next((item for item in held.items if item.id == command.id), None)
    if item is None:
        shown = command.id[:HOLD_ID_MAX]
        raise Refused(f"nothing is held under {shown!r}: 'clusterctl hold list' shows what is")
    if _is_held_by_the_brake(desk, item):
        return _failover_vm(desk, c.FailoverVm(item.subject))
    raise Refused(f"{item.id} cannot be released by hand ({item.why}): it ends when {item.ends_when}")


def _is_held_by_the_brake(desk: Desk, item: records.HeldItem) -> bool:
    """Whether a VM's failover waits for nothing but the brake. S2 comes first: no disks to fence, no word."""
    spec, assignment = desk.view.spec(item.subject), desk.view.assignment(item.subject)
    if item.kind != "failover" or spec is None or assignment is None:
        return False
    can_be_fenced = bool(spec.config.disks) or spec.config.stateless
    return can_be_fenced and desk.view.brake().holds(assignment.owner)


BUILDERS: Final[dict[type, Callable[[Desk, Any], Change]]] = {
    c.AddVm: _add_vm,
    c.RemoveVm: _remove_vm,
    c.StartVm: _start_vm,
    c.StopVm: _stop_vm,
    c.MoveVm: _move_vm,
    c.FailoverVm: _failover_vm,
    c.SetProperty: _set_property,
    c.PauseNode: _pause,
    c.ResumeNode: _resume,
    c.LeaveNode: _leave,
    c.RemoveNode: _remove_node,
    c.ClearQuarantine: _clear_quarantine,
    c.ConfirmDead: _confirm_dead,
    c.ReleaseHold: _release_hold,
}

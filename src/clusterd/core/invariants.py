"""Rules of DESIGN section 4 that can be seen from one node, checked on what it is about to do.

The simulator asserts them after every step; what takes a view of the whole cluster (one writer per image,
one live run of a VM without disks) is checked by the simulated world itself.
"""

from clusterd.core import quarantine, records
from clusterd.core.effects import Ready, SpawnRun, WriteStore
from clusterd.core.membership import admission
from clusterd.core.node import NodeCore
from clusterd.core.state import decode_state
from clusterd.core.types import Admission, VmState
from daemonkit.errors import InvariantBroken


def _broken(core: NodeCore, rule: str, text: str) -> InvariantBroken:
    return InvariantBroken(f"{rule} on {core.identity.name} at {core.desk.now}: {text}")


def check_ready(core: NodeCore, ready: Ready) -> None:
    """What one Ready may contain. Raises InvariantBroken."""
    for effect in ready.act:
        if isinstance(effect, SpawnRun):
            _check_spawn(core, ready, effect)
        elif isinstance(effect, WriteStore):
            _check_write(core, effect)


def _check_spawn(core: NodeCore, ready: Ready, effect: SpawnRun) -> None:
    vm = effect.config.name
    if ready.persist is None:
        raise _broken(core, "S7", f"{vm} is spawned without a durable intent")
    intent = decode_state(ready.persist.document).intents.get(vm)
    if intent is None or intent.epoch != effect.epoch:
        raise _broken(core, "S7", f"{vm}@{effect.epoch} is spawned, but its intent is {intent}")
    if not core.desk.store_known:
        raise _broken(core, "S3", f"{vm} is spawned while the store is unknown")
    run = core.desk.view.run(vm)
    if run is None or run.epoch != effect.epoch or run.state != "starting":
        raise _broken(core, "S2", f"{vm}@{effect.epoch} is spawned, but its run is recorded as {run}")
    if run.leased < len(effect.config.disks):
        raise _broken(core, "S2", f"{vm}@{effect.epoch} is spawned with {run.leased} leases")


def _check_write(core: NodeCore, effect: WriteStore) -> None:
    prefix, view = core.desk.view.prefix, core.desk.view
    guards = {compare.key[len(prefix) :] for compare in effect.compares}
    for put in effect.puts:
        key = put.key[len(prefix) :]
        if key.endswith("/assignment"):
            if not {"leader", key, key.replace("/assignment", "/run")} <= guards:
                raise _broken(core, "S2", f"{key} is written unguarded")
            if _is_minority(core):
                raise _broken(core, "S3", f"{key} is written from a minority")
            new = records.decode_record(records.Assignment, key, put.value)
            old = view.record(key, records.Assignment)
            doubt = view.record(key.replace("/assignment", "/doubt"), records.Doubt)
            found = doubt.found if doubt is not None else None
            if found is not None and (found.node, found.epoch) == (new.owner, new.epoch):
                continue  # nothing is started: it lives there since before the store was rebuilt
            if new.action == "run" and (old is None or new.epoch > old.epoch):
                _check_start(core, key, new)
                if old is not None and new.previous == old.owner:
                    _check_brake(core, key, old.owner)
        elif key.endswith("/run") and not {key, key.replace("/run", "/assignment")} <= guards:
            raise _broken(core, "S2", f"{key} is written unguarded")


def _is_minority(core: NodeCore) -> bool:
    """S3, counted anew from the evidence itself, so that a mistake in ``membership`` does not hide here."""
    desk, view = core.desk, core.desk.view
    present = [name for name in view.members() if view.presence(name) is not None]
    counted = [
        name
        for name in present
        if view.members()[name].admission != "leaving" and view.node(name).quarantine_elapsed_ns is None
    ]
    alive, heard = counted or present, 0
    for name in alive:
        peer = desk.contacts.peers.get(name)
        lasts = max(desk.contacts.isolation_ns, peer.isolation_ns) if peer else 0
        fresh = peer is not None and peer.advanced_at is not None and desk.now < peer.advanced_at + lasts
        heard += name == desk.name or fresh
    return 2 * heard < len(alive)


def _check_start(core: NodeCore, key: str, new: records.Assignment) -> None:
    if new.epoch <= core.desk.view.epoch():
        raise _broken(core, "S1", f"{key} gets the epoch {new.epoch}, which has been handed out before")
    if core.desk.view.presence(new.owner) is None:
        raise _broken(core, "S4", f"{key} goes to {new.owner}, whose presence is gone")
    if admission(core.desk, new.owner) is not Admission.NORMAL:
        raise _broken(core, "S4", f"{key} goes to {new.owner}, which is not admitted")


def _check_brake(core: NodeCore, key: str, owner: str) -> None:
    """S5: no failover of a VM whose owner is held by the brake, unless the end of its run is proven, or an
    operator asked for it by name."""
    view, vm = core.desk.view, key.removeprefix("vms/").removesuffix("/assignment")
    run, request = view.current_run(vm), view.record(f"vms/{vm}/request", records.VmRequest)
    if (run is not None and core.nodes.proven_dead(run)) or (request and request.verb == "failover"):
        return
    if view.brake().holds(owner):
        raise _broken(core, "S5", f"{key} is failed over, but {owner} is held by the brake")
    if owner not in view.brake().nodes and _is_plain_mass_failure(core, owner):
        raise _broken(core, "S5", f"{key} is failed over, but {owner} was lost in a mass failure")


def _is_plain_mass_failure(core: NodeCore, owner: str) -> bool:
    """Whether the owner was lost together with so many that the brake must have held it: counted anew, where
    the evidence itself and the windows agree, with half an isolation time between the losses, so that
    neither rounding nor a change of leader matters."""
    desk, view = core.desk, core.desk.view
    lost_at: dict[str, tuple[int, int]] = {}  # by the evidence, and by the window
    for name in view.members():
        peer, node = desk.contacts.peers.get(name), core.nodes.current.get(name)
        if peer is None or peer.advanced_at is None or not peer.met or peer.in_contact:
            continue
        window = node.window if node is not None else None
        if window is not None and not window.grace_ns:
            lasts = max(desk.contacts.isolation_ns, peer.isolation_ns)
            lost_at[name] = (peer.advanced_at + lasts, desk.now - window.elapsed_ns)
    if owner not in lost_at:
        return False
    counted = [
        name
        for name, member in view.members().items()
        if member.admission != "leaving" and view.node(name).quarantine_elapsed_ns is None
    ]
    near = desk.properties.isolation_ns // 2
    together = [
        name
        for name in counted
        if name in lost_at
        and all(abs(a - b) <= near for a, b in zip(lost_at[name], lost_at[owner], strict=True))
    ]
    share = desk.properties.mass_failure_brake
    return len(together) >= 2 and len(together) >= share * len(counted) + 1e-9


def check_core(core: NodeCore) -> None:
    """What must be true of a node's own picture at any time. Raises InvariantBroken."""
    nodes = core.nodes.current
    if core.leader.is_in_office:
        inside = sum(1 for record in nodes.values() if record.quarantine_elapsed_ns is not None)
        if inside > max(quarantine.cap(core.desk.properties, len(nodes)), 0) and core.desk.view.members():
            before = sum(1 for name in nodes if core.desk.view.node(name).quarantine_elapsed_ns is not None)
            if inside > before:
                raise _broken(core, "S5", f"{inside} nodes are quarantined")
    for run in core.owner.live():
        assignment = core.desk.view.assignment(run.vm)
        ours = assignment is not None and assignment.owner == core.identity.name
        if assignment is None or not ours or assignment.epoch != run.epoch:
            continue
        if core.chronicle.vm_state(run.vm) in (VmState.OFFLINE, VmState.FAILED):
            raise _broken(core, "S6", f"{run.vm} is shown as ended while it runs here")

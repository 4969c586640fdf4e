"""Where a VM may live unseen after a recovery of the store, and what ends that doubt (S2, S6).

A recovery that does without a node cannot know whether a VM without disks runs there: no lease tells, and
nothing would fence it. So it records a *doubt*: the nodes that were not asked. While one of them is neither
heard nor proven dead the VM is held, whatever else would start it. A doubt about a node ends

    with its word    its presence is settled after the doubt was recorded: no run lives there unassigned
    with its death   an operator's ``confirm-dead`` after the recovery
    with the run     the node finds it alive, says so (``found``), and the leader assigns it there

and the whole doubt ends once the owner has seen its own run alive, since a VM has one run.
"""

from clusterd.core.desk import Desk
from clusterd.core.records import FOUND_STATES, Assignment, ConfirmedDead, Doubt, MovedAway, Run
from clusterd.core.store_session import StoreSession


def doubt_key(vm: str) -> str:
    """Where the doubt about this VM is kept."""
    return f"vms/{vm}/doubt"


def doubt_of(desk: Desk, vm: str) -> Doubt | None:
    """What a recovery left open about this VM, None where it left nothing."""
    return desk.view.record(doubt_key(vm), Doubt)


def open_doubts(desk: Desk, vm: str) -> tuple[str, ...]:
    """The nodes, ascending, on which this VM may live unseen."""
    doubt = doubt_of(desk, vm)
    if doubt is None or _is_seen_alive(desk.view.current_run(vm)):
        return ()
    since = desk.view.create(doubt_key(vm))
    nodes = sorted(doubt.nodes.items())
    return tuple(node for node, boot in nodes if not _is_cleared(desk, node, boot, since))


def _is_seen_alive(run: Run | None) -> bool:
    """Its owner saw the process after the recovery, which records no pid of a run that may be elsewhere."""
    return run is not None and run.state in FOUND_STATES and run.pid is not None


def _is_cleared(desk: Desk, node: str, boot: str, since: int) -> bool:
    presence = desk.view.presence(node)
    if presence is not None and presence.settled >= since:
        return True
    confirmed = desk.view.record(f"confirmed/{node}", ConfirmedDead)
    return confirmed is not None and boot in confirmed.boots()


def settle_doubts(desk: Desk, store: StoreSession) -> None:
    """The leader's round: what was found is assigned to where it lives, and what is cleared is taken out."""
    for vm in desk.view.vms():
        doubt = doubt_of(desk, vm)
        if doubt is None:
            continue
        left = open_doubts(desk, vm)
        if doubt.found is not None and doubt.found.node in left:
            _assign_found(desk, store, vm, doubt.found)
        elif len(left) < len(doubt.nodes):
            key = doubt_key(vm)
            guards = store.leading() + store.same(key, f"vms/{vm}/assignment", f"vms/{vm}/run")
            kept = Doubt({node: doubt.nodes[node] for node in left}, doubt.found)
            puts, deletes = ([(key, kept)], ()) if left else ([], (key,))
            store.write(("doubt", vm), guards, list(puts), deletes)


def _assign_found(desk: Desk, store: StoreSession, vm: str, found: Run) -> None:
    old, keys = desk.view.assignment(vm), (f"vms/{vm}/assignment", f"vms/{vm}/run", doubt_key(vm))
    new = Assignment(found.node, found.epoch, reason="it lived there when its node was heard again")
    puts = [(keys[0], new), (keys[1], found)]
    if old is not None and old.owner != found.node:
        puts.append((f"moves/{old.owner}", MovedAway(vm, found.epoch)))
    store.write(("doubt", vm), store.leading() + store.same(*keys), list(puts), (keys[2],))

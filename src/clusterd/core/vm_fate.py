"""Where a VM belongs when the store is rebuilt: what lives decides, then leases, then the last picture.

    lives      an asked node has a run of it: it is assigned to exactly that run
    elsewhere  a run of it may live on a node that was not asked: it stays with that node, as if unmonitored,
               until that node is back or its window is over, as after any isolation (S2, S6)
    ended      its last run was on an asked node, and no run of it lives: recorded as ended
    unstarted  nobody has ever run it, as far as is known

The newest lease wins over an older run: a run whose disks were leased under a newer epoch is fenced already,
and its node will stop it. A run that its owner recorded as ended holds nothing any more, whatever its lease
says. Where a run could be hidden from us, by nodes that were not asked and without disks to fence it, the VM
is not started before each of them was heard or is proven dead: a *doubt* about them is recorded (``doubts``).
With disks whose leases nobody told, it is set to *offline*, until an operator starts it.

An epoch is one process (S1): one that a node which was not asked may have used is never left as a start that
the node could still make.
"""

from typing import Any, Final, Literal

import attrs

from clusterd.core.records import Assignment, Run
from clusterd.core.testimony import LiveRun
from clusterd.core.types import FINAL_RUN_STATES, UNSTARTED_RUN_STATES, Desired, VmConfig

Kind = Literal["lives", "elsewhere", "ended", "unstarted"]
WORDS: Final[dict[str, str]] = {
    "lives": "runs there",
    "elsewhere": "may run there",
    "ended": "its run has ended",
    "unstarted": "has not run",
}


@attrs.frozen
class LeaseSeen:
    """``holder``: ``NODE/VM``, None once it was released."""

    diskd: str
    image: str
    epoch: int
    holder: str | None


def node_of(holder: str | None) -> str | None:
    """The node of a lease's holder, None where it is not one of a node's."""
    node, slash, _ = (holder or "").partition("/")
    return node if slash and node else None


@attrs.frozen
class Known:
    """``run``: of the assignment's epoch. ``lives``: (node, run) as the asked nodes tell. ``is_seen``: every
    diskd concerned answered. ``boots``: the boots of nodes, as last seen."""

    config: VmConfig
    desired: Desired
    assignment: Assignment | None = None
    run: Run | None = None
    lives: tuple[tuple[str, LiveRun], ...] = ()
    leases: tuple[LeaseSeen, ...] = ()
    is_seen: bool = True
    boots: dict[str, str] = attrs.field(factory=dict)


@attrs.frozen
class Fate:
    """What the store will say of the VM. ``doubts``: nodes where it may live unseen, and their boots."""

    kind: Kind
    desired: Desired
    assignment: Assignment | None = None
    run: Run | None = None
    why: str = ""
    warnings: tuple[str, ...] = ()
    doubts: dict[str, str] = attrs.field(factory=dict)

    def document(self) -> dict[str, Any]:
        owner = self.assignment.owner if self.assignment else None
        epoch = self.assignment.epoch if self.assignment else None
        return {
            "fate": self.kind,
            "owner": owner,
            "epoch": epoch,
            "desired": self.desired,
            "why": self.why,
            "doubted": sorted(self.doubts),
        }


def vm_fate(known: Known, asked: dict[str, str], unasked: dict[str, str]) -> Fate:
    """``asked``: the nodes that told what runs on them, with their boots. ``unasked``: those that were left
    out, with the boots that they had, or words that are no boot's."""
    live = max(known.lives, key=lambda told: told[1].epoch, default=None)
    hidden = _hidden_lease(known, asked)
    if hidden is not None and (live is None or hidden[1] > live[1].epoch):
        return _elsewhere(known, *hidden)
    away = _away(known, asked)
    is_newer_recorded = away is not None and away.run is not None and away.run == known.run
    if live is not None and not (is_newer_recorded and _epoch(away) > live[1].epoch):
        return _lives(known, *live)
    if away is not None:
        fate = away
    elif known.assignment is not None and known.assignment.owner not in asked:
        kind: Kind = "ended" if known.run else "unstarted"
        fate = Fate(kind, known.desired, known.assignment, known.run, "the last picture says so")
    else:
        fate = _ended(known, asked)
    return _cautious(known, fate, unasked) if unasked else fate


def _away(known: Known, asked: dict[str, str]) -> Fate | None:
    """By the last picture it may run on a node that was not asked."""
    assignment, run = known.assignment, known.run
    if assignment is None or assignment.owner in asked:
        return None
    why = "the last picture says so"
    if run is not None and run.state in FINAL_RUN_STATES:
        return None
    if run is not None and run.state not in UNSTARTED_RUN_STATES:
        return Fate("elsewhere", known.desired, assignment, run, why)
    if assignment.given_back:
        return Fate("elsewhere", known.desired, assignment, run, "it was given back to it")
    has_leased = any(lease.epoch >= assignment.epoch for lease in known.leases)
    if known.config.disks and known.is_seen and not has_leased:
        return None  # it took no lease, so there was no process
    unseen = _unseen(known, assignment.owner, assignment.epoch)
    return Fate("elsewhere", known.desired, assignment, unseen, why)


def _epoch(fate: Fate | None) -> int:
    return fate.assignment.epoch if fate is not None and fate.assignment is not None else 0


def _unseen(known: Known, node: str, epoch: int) -> Run:
    """A run that may live. Recorded as begun: its owner never starts this epoch again."""
    reason, boot = "not asked when the store was rebuilt", known.boots.get(node, "")
    return Run(node, epoch, "online", boot, reason=reason, leased=len(known.config.disks))


def _hidden_lease(known: Known, asked: dict[str, str]) -> tuple[str, int] | None:
    """The newest lease that is held on behalf of a node that was not asked."""
    over = known.run.epoch if known.run is not None and known.run.state in FINAL_RUN_STATES else 0
    held = [
        (lease.epoch, node)
        for lease in known.leases
        if (node := node_of(lease.holder)) is not None and node not in asked and lease.epoch > over
    ]
    if not held:
        return None
    epoch, node = max(held)
    return node, epoch


def _assigned(known: Known, node: str, epoch: int, reason: str) -> Assignment:
    """The assignment as it was, if it is this one; else a new one."""
    old = known.assignment
    if old is not None and (old.owner, old.epoch) == (node, epoch):
        return old
    last = (old.last_node, old.last_boot) if old is not None else ("", "")
    return Assignment(node, epoch, reason=reason, last_node=last[0], last_boot=last[1])


def _elsewhere(known: Known, node: str, epoch: int) -> Fate:
    assignment = _assigned(
        known, node, epoch, "it holds its lease; it was not asked when the store was rebuilt"
    )
    run = known.run
    if run is None or (run.node, run.epoch) != (node, epoch) or run.state in UNSTARTED_RUN_STATES:
        run = _unseen(known, node, epoch)
    why = f"it holds the lease of epoch {epoch} of its disks"
    stale = tuple(
        f"its run of epoch {other.epoch} on {on} is fenced by that lease, and will be stopped"
        for on, other in known.lives
    )
    return Fate("elsewhere", known.desired, assignment, run, why, stale)


def _lives(known: Known, node: str, live: LiveRun) -> Fate:
    assignment = _assigned(known, node, live.epoch, "it ran there when the store was rebuilt")
    disks = len(live.config.disks)
    run = Run(node, live.epoch, live.state, live.boot_id, pid=live.pid, leased=disks)
    warnings = [
        f"its older run of epoch {other.epoch} on {on} will be stopped"
        for on, other in known.lives
        if other is not live
    ]
    newest = max((lease.epoch for lease in known.leases), default=0)
    if newest > live.epoch:
        warnings.append(
            f"its disks know the newer epoch {newest}: this run is fenced, and will be started anew"
        )
    return Fate("lives", known.desired, assignment, run, f"run of epoch {live.epoch}", tuple(warnings))


def _ended(known: Known, asked: dict[str, str]) -> Fate:
    """Its owner was asked, and has no run of it; the same of whoever holds a lease."""
    held = [(lease.epoch, node) for lease in known.leases if (node := node_of(lease.holder)) in asked]
    old, run = known.assignment, known.run
    candidates = [(epoch, node) for epoch, node in held if node is not None]
    if old is not None:
        candidates.append((old.epoch, old.owner))
    if not candidates:
        return Fate("unstarted", known.desired, why="no run and no lease of it is known")
    epoch, node = max(candidates)
    assignment = _assigned(known, node, epoch, "its last run, when the store was rebuilt")
    if run is None or run.epoch != epoch or run.state not in FINAL_RUN_STATES:
        is_same = run is not None and run.epoch == epoch
        was_stopped = known.desired == "offline" or assignment.action == "stop"
        leased = sum(1 for lease in known.leases if lease.epoch >= epoch)
        run = Run(
            node,
            epoch,
            "stopped" if was_stopped else "failed",
            run.boot_id if run is not None and is_same else asked[node],
            reason="it did not run any more when the store was rebuilt",
            leased=run.leased if run is not None and is_same else leased,
            counts=False,
        )
    return Fate("ended", known.desired, assignment, run, f"{node} has no run of it any more")


def _cautious(known: Known, fate: Fate, unasked: dict[str, str]) -> Fate:
    """S2: nothing that could run hidden is started anew before that is ruled out."""
    config = known.config
    if not (config.disks or config.stateless):
        run = attrs.evolve(fate.run, pid=None) if fate.run is not None else None
        warning = (
            f"it has no disks to fence: it is not started before {', '.join(sorted(unasked))} was heard,"
            " or is confirmed dead"
        )
        return attrs.evolve(fate, run=run, doubts=unasked, warnings=(*fate.warnings, warning))
    if fate.kind == "elsewhere" or fate.desired == "offline" or known.is_seen or config.stateless:
        return fate
    warning = (
        "it could run on a node that was not asked, and no diskd told its leases: it is set to offline;"
        f" once that is ruled out, 'clusterctl vm start {config.name}'"
    )
    return attrs.evolve(fate, desired="offline", warnings=(*fate.warnings, warning))

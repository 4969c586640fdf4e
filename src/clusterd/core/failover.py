"""What the leader does about one VM: a pure function of facts, used by the leader and by ``explain``.

Theory of operation. The leader compares what an operator wants (spec) with its own last decision
(assignment) and with what the owner observes (run, if it is of the assignment's epoch). The outcome is
exactly one verdict:

    rest       nothing to do: it is as wanted, or somebody else is working on it
    window     unmonitored: left alone until its window is over
    start      give it a new epoch and an owner (first start, restart, failover)
    stop       ask the owner to end the run
    drain      move it away, once a target has accepted
    cancel     the old owner is back before the new one took a lease: give it back
    forget     a request that has become pointless
    bury       wanted offline, and its run never began or is proven to have ended: drop the assignment
    hold       would start, but must not, with what would end it (S2, S5)
    failed     it failed too often in a row

Why each is safe: see S2 in ``_lost``; every change of the assignment is guarded by the revisions of
assignment and run, so that it excludes a claim by the owner at the same instant.
"""

from typing import Final, Literal

import attrs

from clusterd.core.brake import Grip
from clusterd.core.isolation import period_ns, remaining_ns
from clusterd.core.properties import Properties
from clusterd.core.records import Assignment, Run, VmRequest, VmSpec, Window
from clusterd.core.types import FINAL_RUN_STATES, UNSTARTED_RUN_STATES

FREEING: Final = ("start", "bury", "drain")  # what must not be while a run of it may live unseen
RESTARTS_MAX: Final = 3  # in a row, without having been online for a while in between

Kind = Literal["rest", "window", "start", "stop", "drain", "cancel", "forget", "bury", "hold", "failed"]


@attrs.frozen
class Facts:
    """All that counts. ``run``: of the assignment's epoch, else None. ``window``: the owner's, aged to now.
    ``grip``: what the mass-failure brake does to the owner. ``proven_dead``: this very run is known to have
    ended (section 6 "Proven dead"). ``doubted``: nodes on which it may live unseen (``doubts``)."""

    spec: VmSpec
    assignment: Assignment | None = None
    run: Run | None = None
    request: VmRequest | None = None
    owner_in_contact: bool = True
    owner_is_present: bool = True
    owner_is_drained: bool = False
    grip: Grip = ""
    previous_in_contact: bool = False
    proven_dead: bool = False
    window: Window | None = None
    was_stable: bool = False
    doubted: tuple[str, ...] = ()


@attrs.frozen
class Verdict:
    """``wanted``: where an operator sent it. ``wait_ns``: until this verdict may change by time alone.
    ``is_failover``: the run is taken from a lost owner. ``attempt``: of restarts in a row."""

    kind: Kind
    why: str = ""
    ends_when: str = ""
    wanted: str | None = None
    wait_ns: int | None = None
    is_failover: bool = False
    attempt: int = 0


def judge(facts: Facts, properties: Properties) -> Verdict:
    """The one verdict about this VM now."""
    verdict = _judge(facts, properties)
    if not facts.doubted or verdict.kind not in FREEING:
        return verdict
    nodes = ", ".join(facts.doubted)
    return Verdict(
        "hold",
        f"{verdict.why}, but it has no disks to fence, and may live on {nodes}, unseen since the store was"
        " rebuilt",
        " and ".join(f"{node} is back, or 'clusterctl node confirm-dead {node}'" for node in facts.doubted),
    )


def _judge(facts: Facts, properties: Properties) -> Verdict:
    assignment, run = facts.assignment, facts.run
    if facts.spec.desired == "offline":
        return _offline(facts)
    if assignment is None:
        wanted = facts.request.node if facts.request else None
        return Verdict("start", "it is wanted online", wanted=wanted)
    if assignment.previous is not None and _is_cancellable(facts):
        return Verdict("cancel", f"{assignment.previous} is back before its leases were taken")
    if run is not None and run.state in FINAL_RUN_STATES:
        return _ended(facts, assignment, run)
    if not facts.owner_in_contact:
        return _lost(facts, assignment, run, properties)
    return _held_by_owner(facts, assignment, run)


def _is_unstarted(assignment: Assignment, run: Run | None) -> bool:
    """Whether no process of this epoch can exist. One that was given back may live, whatever is recorded."""
    return not assignment.given_back and (run is None or run.state in UNSTARTED_RUN_STATES)


def _is_cancellable(facts: Facts) -> bool:
    run = facts.run
    untouched = run is None or (run.state == "held" and run.leased == 0)
    return facts.previous_in_contact and untouched


def _offline(facts: Facts) -> Verdict:
    assignment, run = facts.assignment, facts.run
    if facts.request is not None:
        return Verdict("forget", "it is wanted offline")
    if assignment is None or (run is not None and run.state in FINAL_RUN_STATES):
        return Verdict("rest", "it is offline")
    if not facts.owner_in_contact and (facts.proven_dead or _is_unstarted(assignment, run)):
        return Verdict("bury", f"{assignment.owner} is lost, and its run is not alive")
    if assignment.action == "run":
        return Verdict("stop", "an operator wants it offline")
    if not facts.owner_in_contact:
        return Verdict(
            "hold", f"{assignment.owner} cannot be asked to stop it", f"{assignment.owner} is back in contact"
        )
    return Verdict("rest", f"{assignment.owner} is stopping it")


def _ended(facts: Facts, assignment: Assignment, run: Run) -> Verdict:
    """Its run has ended by the word of its owner: that proof lets any VM start anywhere (S2)."""
    request = facts.request
    wanted = request.node if request and request.verb == "move" else assignment.then
    if request is not None or run.state == "stopped" or assignment.action == "stop":
        return Verdict("start", "its run was stopped", wanted=wanted)
    if not run.counts:
        return Verdict("start", run.reason or "its run has ended", attempt=assignment.attempt)
    attempt = 0 if facts.was_stable else assignment.attempt
    if attempt >= RESTARTS_MAX:
        return Verdict("failed", f"failed {attempt + 1} times in a row, last: {run.reason}")
    return Verdict("start", run.reason or "its run has ended", attempt=attempt + 1)


def _lost(facts: Facts, assignment: Assignment, run: Run | None, properties: Properties) -> Verdict:
    """The owner is out of contact. S2: a VM with disks may be taken over, since the new owner must acquire
    every lease first. One without disks only if it is stateless or its run is proven to have ended, or
    never started: an unclaimed epoch cannot start any more once the assignment has changed. The brake comes
    last, and so holds nothing that S2 holds already, nor what an operator orders for this very VM."""
    owner = assignment.owner
    if _is_unstarted(assignment, run):
        return Verdict("start", f"{owner} was lost before it had started it", is_failover=False)
    config = facts.spec.config
    period = period_ns(config, properties, facts.proven_dead)
    if facts.request is not None and facts.request.verb == "failover":
        period = 0
    left = remaining_ns(facts.window, period) if facts.window is not None else period
    if facts.window is not None and period == 0 and facts.proven_dead:
        left = 0  # a proof ends the grace of an announced restart as well
    if left is None:
        return Verdict("window", f"{owner} is isolated; this VM is never failed over by time")
    if left > 0 or facts.window is None:
        return Verdict("window", f"{owner} is isolated; its window is open", wait_ns=left)
    if config.disks or config.stateless or facts.proven_dead:
        why = f"the window of {owner} is over" if period else f"{owner} is lost and there is no window"
        if facts.proven_dead:
            why = f"{owner} is proven dead"
        is_ordered = facts.request is not None and facts.request.verb == "failover"
        if facts.grip and not (facts.proven_dead or is_ordered):
            return _braked(facts, owner, why)
        return Verdict("start", why, is_failover=True)
    return Verdict(
        "hold",
        f"it has no disks to fence and is not stateless: whether its run on {owner} still lives is unknown",
        f"{owner} is back, or 'clusterctl node confirm-dead {owner}'",
    )


def _braked(facts: Facts, owner: str, why: str) -> Verdict:
    """The failover is due, but its owner was lost in a mass failure, or is just being so."""
    if facts.grip == "suspected":
        return Verdict("window", f"{why}, but others are silent as well: it may be a mass failure")
    vm = facts.spec.config.name
    return Verdict(
        "hold",
        f"{why}, but {owner} was lost in a mass failure, and the brake holds its failovers",
        f"the brake lets go of {owner} ('clusterctl hold list'), 'clusterctl node confirm-dead {owner}', or "
        f"'clusterctl hold release failover-{vm}'",
    )


def _held_by_owner(facts: Facts, assignment: Assignment, run: Run | None) -> Verdict:
    """The owner is in contact and its run has not ended."""
    request, owner = facts.request, assignment.owner
    if assignment.action == "stop":
        return Verdict("rest", f"{owner} is stopping it")
    if _is_unstarted(assignment, run) and not facts.owner_is_present:
        return Verdict("start", f"{owner} lost its session before it had started it")
    if run is None:
        return Verdict("rest", f"{owner} is about to start it")
    if run.state == "held":
        if run.seen_epoch >= assignment.epoch:
            return Verdict("start", "its disks know a newer epoch", wanted=owner)
        return Verdict("hold", run.reason or "a lease got no answer", "every diskd of its disks answers")
    if request is not None:
        if request.verb == "move" and request.node != owner and run.state in ("online", "stalled"):
            return Verdict("drain", "an operator moves it", wanted=request.node)
        if request.verb == "move" and request.node != owner:
            return Verdict("rest", "it is moved once it is online")
        return Verdict("forget", f"it runs on {owner}, which is in contact")
    if facts.owner_is_drained and run.state in ("online", "stalled"):
        return Verdict("drain", f"{owner} is being drained")
    return Verdict("rest", f"{owner} runs it")

"""The runs of this node: compares what is assigned to it with what lives here, and takes the next step.

Level-triggered: ``decide`` may be called at any time and any number of times. A run whose VM was given to
somebody else is *stale*. It is stopped as soon as the new owner has begun to take its leases (until then
the leader may still give it back), or as soon as diskd shows a newer epoch; and this node's presence is
*settled* up to a revision only when no stale run is left (so it is not ``up`` before).
"""

from typing import Final

import attrs

from clusterd.core import effects, events
from clusterd.core.desk import Desk
from clusterd.core.doubts import doubt_key, doubt_of
from clusterd.core.fencing import STOP_REASONS, UNSPAWNED, LocalRun, Phase, Step
from clusterd.core.isolation import period_ns
from clusterd.core.records import NOT_ASKED, Assignment, ConfirmedDead, Doubt, MovedAway, Run, VmSet, VmSpec
from clusterd.core.state import Intent
from clusterd.core.store_session import StoreSession
from clusterd.core.store_view import StoreView
from clusterd.core.types import FINAL_RUN_STATES, UNSTARTED_RUN_STATES, EventName
from daemonkit.units import SECOND

STOP_PATIENCE_NS: Final = 60 * SECOND  # then SIGKILL is asked for, and again after as long


def dead_boots(view: StoreView, vm: str) -> tuple[str, ...]:
    """Boots of hosts that are known to be over: confirmed by an operator, or the host is back under another.
    Of a host that is merely silent nothing is known, and its diskd may be writing (S2)."""
    found: set[str] = set()
    for node in view.named("confirmed"):
        confirmed = view.record(f"confirmed/{node}", ConfirmedDead)
        if confirmed is not None:
            found.update(confirmed.boots())
    assignment = view.assignment(vm)
    if assignment is not None and assignment.last_boot:
        presence = view.presence(assignment.last_node)
        if presence is not None and presence.boot_id != assignment.last_boot:
            found.add(assignment.last_boot)
    return tuple(sorted(found))


@attrs.define
class Owner:
    desk: Desk
    store: StoreSession
    runs: dict[str, LocalRun] = attrs.field(factory=dict)
    stopped: list[tuple[str, int]] = attrs.field(factory=list)  # for a leave: proof for exactly these

    def start(self) -> None:
        """After a restart of clusterd: look for the processes of every durable intent of this boot (S7)."""
        desk = self.desk
        for vm, intent in sorted(desk.state.intents.items()):
            run = LocalRun(intent.config, intent.epoch, intent.boot_id, Phase.ADOPTING, was_adopted=True)
            run.leased = len(intent.config.disks)
            self.runs[vm] = run
            if intent.boot_id == desk.identity.boot_id:
                desk.act(effects.AdoptRun(intent.config, intent.epoch))
            else:
                run.counts = False
                self._ended(run, "the host restarted")

    # -- events

    def leases_answered(self, event: events.LeasesAnswered) -> None:
        """All acquired: commit. Else the run is held, with the reason."""
        for run in self.runs.values():
            if run.request == event.request and run.phase is Phase.FENCING:
                self._leases(run, event.answers)
                return

    def _leases(self, run: LocalRun, answers: tuple[events.LeaseAnswer, ...]) -> None:
        run.request = None
        got = {answer.image for answer in answers if answer.outcome == "acquired"}
        run.leased = len(got)
        if got >= {disk.image for disk in run.config.disks}:
            run.step(Step.LEASED)
            run.reason = ""
            return
        failed = [answer for answer in answers if answer.outcome != "acquired"]
        refused = [answer.epoch for answer in failed if answer.outcome == "refused"]
        run.seen_epoch = max(refused, default=0)
        run.reason = "; ".join(f"{a.image}: {a.outcome} ({a.reason})" for a in failed) or "no lease answered"
        run.step(Step.UNLEASED)
        run.retry_at = self.desk.now + self.desk.properties.isolation_ns

    def run_started(self, event: events.RunStarted) -> None:
        run = self.runs.get(event.vm)
        if run is None or run.epoch != event.epoch or not run.can(Step.STARTED):
            return
        first = run.phase in (Phase.SPAWNING, Phase.ADOPTING)
        run.step(Step.STARTED)
        run.pid = event.pid
        if first:
            name = EventName.VM_ADOPTED if run.was_adopted else EventName.VM_STARTED
            self.desk.note(name, vm=run.vm, epoch=run.epoch, pid=event.pid)

    def run_ended(self, vm: str, epoch: int, reason: str) -> None:
        """The process is certainly gone."""
        run = self.runs.get(vm)
        if run is None or run.epoch != epoch or not run.can(Step.ENDED):
            return
        if run.phase is Phase.STOPPING:
            reason = STOP_REASONS[run.stop_why]
            run.counts = run.stop_why == "storage"
        self._ended(run, reason)

    def written(self, token: tuple[str, ...], succeeded: bool) -> None:
        """A claim or commit was answered; anything else is seen in the picture."""
        if not succeeded or token[0] != "run" or token[2] not in ("claim", "commit"):
            return
        run = self.runs.get(token[1])
        if run is None or str(run.epoch) != token[3]:
            return
        if token[2] == "claim" and run.phase is Phase.CLAIMING:
            run.step(Step.CLAIMED if run.config.disks else Step.CLAIMED_DISKLESS)
            if run.config.disks:
                self._acquire(run)
        elif token[2] == "commit" and run.phase is Phase.COMMITTING:
            self._spawn(run)

    def images_seen(self, looks: dict[str, events.ImageLook], asked: set[str]) -> None:
        """S1 from the owner's side: a newer epoch at diskd means that our copy is fenced already."""
        desk = self.desk
        for run in self.runs.values():
            images = {disk.image for disk in run.config.disks}
            if not run.may_live() or not images or not images <= asked:
                continue
            newest = max((looks[image].epoch for image in images if image in looks), default=0)
            if newest > run.epoch and run.phase is not Phase.STOPPING:
                run.seen_epoch = newest
                desk.note(EventName.VM_FENCED, vm=run.vm, epoch=run.epoch, newer=newest)
                self._stop(run, "fenced", force=True)
            self._storage(run, answered=images <= looks.keys())

    def _storage(self, run: LocalRun, *, answered: bool) -> None:
        if answered:
            run.silent_since, run.is_stalled = None, False
            return
        now, properties = self.desk.now, self.desk.properties
        run.silent_since = now if run.silent_since is None else run.silent_since
        silent = now - run.silent_since
        if silent >= properties.isolation_ns and not run.is_stalled and run.phase is Phase.ONLINE:
            run.is_stalled = True
            self.desk.note(EventName.VM_STALLED, vm=run.vm, epoch=run.epoch)
        if silent >= properties.storage_timeout_ns and run.phase is Phase.ONLINE:
            self._stop(run, "storage", force=True)

    # -- steps

    def _acquire(self, run: LocalRun) -> None:
        run.request = self.desk.request()
        holder, dead = self.desk.holder(run.vm), dead_boots(self.desk.view, run.vm)
        self.desk.act(effects.AcquireLeases(run.request, run.vm, run.epoch, holder, run.config.disks, dead))

    def _spawn(self, run: LocalRun) -> None:
        """S7: the intent is in this Ready's persist, so it is durable before the process exists."""
        run.step(Step.COMMITTED)
        intent = Intent(run.config, run.epoch, run.boot_id)
        state = self.desk.state
        self.desk.remember(
            intents={**state.intents, run.vm: intent}, epoch_seen=max(state.epoch_seen, run.epoch)
        )
        self.desk.act(effects.SpawnRun(run.config, run.epoch))

    def _stop(self, run: LocalRun, why: str, *, force: bool) -> None:
        run.step(Step.STOP)
        run.stop_why, run.stop_forced, run.stop_asked_at = why, force, self.desk.now
        self.desk.act(effects.StopRun(run.vm, run.epoch, force))

    def _ended(self, run: LocalRun, reason: str) -> None:
        why = run.stop_why if run.phase is Phase.STOPPING else ""
        run.step(Step.ENDED)
        run.reason, run.final = reason, "stopped" if why == "asked" else "failed"
        intents = {vm: intent for vm, intent in self.desk.state.intents.items() if vm != run.vm}
        self.desk.remember(intents=intents)
        self.stopped.append((run.vm, run.epoch))
        if run.config.disks and why not in ("stale", "fenced"):
            self.desk.act(
                effects.ReleaseLeases(run.vm, run.epoch, self.desk.holder(run.vm), run.config.disks)
            )
        if why == "stale":
            self.desk.note(EventName.VM_STALE_STOPPED, vm=run.vm, epoch=run.epoch)
        elif run.final == "stopped":
            self.desk.note(EventName.VM_STOPPED, vm=run.vm, epoch=run.epoch)
        else:
            self.desk.note(EventName.VM_FAILED, vm=run.vm, epoch=run.epoch, reason=reason)

    # -- decisions

    def decide(self) -> None:
        """Bring what lives here towards what is assigned here."""
        self._respond_to_isolation()
        if not self.store.is_usable:
            return  # S3: keep every VM, start none
        view = self.desk.view
        assigned = {vm for vm in view.vms() if self._is_mine(view.assignment(vm))}
        for vm in sorted(assigned | self.runs.keys()):
            self._decide_vm(vm)

    def _is_mine(self, assignment: Assignment | None) -> bool:
        return assignment is not None and assignment.owner == self.desk.name

    def _decide_vm(self, vm: str) -> None:
        assignment, run = self.desk.view.assignment(vm), self.runs.get(vm)
        if run is not None and (assignment is None or not self._matches(run, assignment)):
            self._not_ours(run, assignment)
            run = self.runs.get(vm)
        if run is None and assignment is not None and self._is_mine(assignment):
            run = self._begin(vm, assignment)
        if run is None or assignment is None or not self._matches(run, assignment):
            return
        if assignment.action == "stop":
            self._end_as_asked(run)
        self._work(run)

    def _matches(self, run: LocalRun, assignment: Assignment) -> bool:
        return assignment.owner == self.desk.name and assignment.epoch == run.epoch

    def _not_ours(self, run: LocalRun, assignment: Assignment | None) -> None:
        """The VM was assigned to another run (or, never by our own commands, removed under it: then its
        process is left alone, S6)."""
        if run.phase in UNSPAWNED:
            run.step(Step.DROPPED)
        if run.phase is Phase.ENDED:
            del self.runs[run.vm]
        elif self._is_doubted(run, assignment) or self._is_unknown(run):
            self._tell_found(run)
        elif assignment is not None and run.can(Step.STOP) and self._has_taken_over(assignment, run):
            self._stop(run, "stale", force=True)
        self._be_insistent(run)

    def _is_doubted(self, run: LocalRun, assignment: Assignment | None) -> bool:
        """Whether a recovery of the store that did not ask us has left open whether this run lives (S6)."""
        doubt = doubt_of(self.desk, run.vm)
        is_newer = assignment is None or assignment.epoch < run.epoch
        is_going = run.phase is Phase.STOPPING
        return doubt is not None and self.desk.name in doubt.nodes and is_newer and not is_going

    def _is_unknown(self, run: LocalRun) -> bool:
        """Whether a recovery that did not ask us knew nothing of this VM, and nothing was taken from us
        since: its specification is then that of its run, as of the runs of those who were asked."""
        view = self.desk.view
        moved = view.record(f"moves/{self.desk.name}", MovedAway)
        is_told = moved is not None and moved.vm == NOT_ASKED and run.epoch < moved.epoch
        is_absent = view.spec(run.vm) is None and view.assignment(run.vm) is None
        return is_told and is_absent and run.may_live() and run.phase is not Phase.STOPPING

    def _tell_found(self, run: LocalRun) -> None:
        doubt, key = doubt_of(self.desk, run.vm), doubt_key(run.vm)
        if run.phase is Phase.ONLINE and self._is_unknown(run):
            spec, found = f"vms/{run.vm}/spec", run.as_record(self.desk.name, "online")
            guards = self.store.same(
                spec, key, f"vms/{run.vm}/assignment", f"moves/{self.desk.name}", "vmset"
            )
            told = Doubt({self.desk.name: run.boot_id}, found)
            images = self.desk.view.record("vmset", VmSet) or VmSet()
            puts = [(spec, VmSpec(run.config)), (key, told), ("vmset", VmSet(images.changes + 1))]
            self.store.write(("found", run.vm), guards, puts)
            return
        if doubt is None or run.phase is not Phase.ONLINE:
            return
        if doubt.found is None or doubt.found.epoch < run.epoch:
            told = attrs.evolve(doubt, found=run.as_record(self.desk.name, "online"))
            self.store.write(("found", run.vm), self.store.same(key), [(key, told)])

    def _has_taken_over(self, assignment: Assignment, run: LocalRun) -> bool:
        """Whether the newer run has begun to take the leases: before, the leader may still cancel it."""
        if assignment.epoch < run.epoch:
            return True
        if assignment.owner == self.desk.name:
            return True
        newer = self.desk.view.current_run(run.vm)
        return newer is not None and (newer.leased > 0 or newer.state not in UNSTARTED_RUN_STATES)

    def _begin(self, vm: str, assignment: Assignment) -> LocalRun | None:
        """An assignment of ours of which nothing lives here."""
        spec, record = self.desk.view.spec(vm), self.desk.view.current_run(vm)
        if spec is None or (record is not None and record.state in FINAL_RUN_STATES):
            return None
        run = LocalRun(spec.config, assignment.epoch, self.desk.identity.boot_id, Phase.CLAIMING)
        if record is not None and record.state not in UNSTARTED_RUN_STATES:
            # It was live by our own record, and no intent of it is left: its process is certainly gone.
            run.phase, run.final, run.counts = Phase.ENDED, "failed", record.boot_id == run.boot_id
            run.reason, run.leased = "the run ended while clusterd was away", record.leased
        elif record is None and assignment.given_back:
            # S1: an epoch is one process. This one had ended before the VM was given back to us.
            run.phase, run.final, run.counts = Phase.ENDED, "failed", False
            run.reason = "the run ended while its node was away"
        if assignment.action == "stop" and run.phase is Phase.CLAIMING:
            run.phase, run.final = Phase.ENDED, "stopped"
        self.runs[vm] = run
        return run

    def _end_as_asked(self, run: LocalRun) -> None:
        if run.phase in UNSPAWNED:
            run.step(Step.DROPPED)
            run.final, run.reason = "stopped", STOP_REASONS["asked"]
        elif run.can(Step.STOP):
            self._stop(run, "asked", force=False)

    def _work(self, run: LocalRun) -> None:
        desk = self.desk
        if run.phase is Phase.HELD and desk.now >= run.retry_at and self._is_recorded(run):
            run.step(Step.RETRIED)
        if run.phase is Phase.HELD:
            desk.wake(run.retry_at)
        if run.phase in (Phase.CLAIMING, Phase.COMMITTING):
            if self._may_start():
                claim = run.phase is Phase.CLAIMING
                record = run.as_record(desk.name, "fencing" if claim else "starting")
                self._write(run, record, "claim" if claim else "commit")
            return
        self._be_insistent(run)
        wanted = run.record(desk.name)
        if wanted is not None and wanted != desk.view.run(run.vm):
            self._write(run, wanted, "record")
        elif run.phase is Phase.ENDED:
            del self.runs[run.vm]

    def _is_recorded(self, run: LocalRun) -> bool:
        return run.record(self.desk.name) == self.desk.view.run(run.vm)

    def _may_start(self) -> bool:
        """S3, S4: only while we are present ourselves and not isolated."""
        desk = self.desk
        presence = desk.view.seen.get(f"presence/{desk.name}")
        is_present = presence is not None and desk.lease is not None and presence.lease == desk.lease
        return is_present and not desk.is_self_isolated and not desk.is_leaving_process

    def _write(self, run: LocalRun, record: Run, kind: str) -> None:
        keys = (f"vms/{run.vm}/assignment", f"vms/{run.vm}/run")
        token = ("run", run.vm, kind, str(run.epoch))
        self.store.write(token, self.store.same(*keys), [(keys[1], record)])

    def _be_insistent(self, run: LocalRun) -> None:
        if run.phase is not Phase.STOPPING:
            return
        if self.desk.now >= run.stop_asked_at + STOP_PATIENCE_NS:
            run.stop_asked_at, run.stop_forced = self.desk.now, True
            self.desk.act(effects.StopRun(run.vm, run.epoch, force=True))
        self.desk.wake(run.stop_asked_at + STOP_PATIENCE_NS)

    def _respond_to_isolation(self) -> None:
        """``isolation_response`` stop: a courtesy to the network, never a proof (S2)."""
        desk = self.desk
        if not desk.is_self_isolated or desk.properties.isolation_response != "stop":
            return
        for run in self.runs.values():
            period = period_ns(run.config, desk.properties, proven_dead=False)
            if period is None or run.phase is not Phase.ONLINE:
                continue
            if desk.now >= desk.isolated_since + period:
                self._stop(run, "isolated", force=False)
            else:
                desk.wake(desk.isolated_since + period)

    # -- what others ask

    def has_stale(self) -> bool:
        """Whether a process may live here whose VM was given to another run."""
        for run in self.runs.values():
            assignment = self.desk.view.assignment(run.vm)
            if run.may_live() and (assignment is None or not self._matches(run, assignment)):
                return True
        return False

    def live(self) -> list[LocalRun]:
        return [run for run in self.runs.values() if run.may_live()]

"""The only door of the core: ``handle(event, now) -> Ready`` and ``next_deadline()``.

One ``decide`` round follows every event that may have changed something: ask the store what is due, judge
ourselves, register, bring local runs in line, lead if we do, answer operators, note transitions. Every
part is level-triggered: a round may come at any time and any number of times. Datagrams that change no
contact are taken in without a round, since they are most of the events.
"""

from typing import Any

import attrs

from clusterd.core import events
from clusterd.core.braking import Braking
from clusterd.core.desk import Desk
from clusterd.core.effects import Ready, SendHeartbeat
from clusterd.core.events import Event
from clusterd.core.explain import explain_node
from clusterd.core.leader import Leader
from clusterd.core.leadership import Leadership
from clusterd.core.liveness import Contacts
from clusterd.core.membership import in_contact, judge_self
from clusterd.core.messages import INCARNATION_MAX, HeartbeatRejected, decode_heartbeat, encode_heartbeat
from clusterd.core.nodes import NodeRecords
from clusterd.core.operator import Operator
from clusterd.core.owner import Owner
from clusterd.core.picture import Picture
from clusterd.core.properties import Properties
from clusterd.core.records import Leader as LeaderRecord
from clusterd.core.records import prefix
from clusterd.core.registration import Registration
from clusterd.core.state import NodeState
from clusterd.core.status import Chronicle
from clusterd.core.store_identity import Marks
from clusterd.core.store_session import StoreSession
from clusterd.core.store_view import StoreView
from clusterd.core.testimony import Memory, Testimony
from clusterd.core.types import EventName, Identity
from clusterd.core.vm_copies import BackupPlace, backup_place, has_gone_elsewhere
from clusterd.core.watching import Watching
from daemonkit.errors import InvariantBroken
from daemonkit.schema import unstructure


@attrs.define(init=False)
class NodeCore:
    """One node's decisions. ``state`` was durably written by ``begin_incarnation`` before. ``kept``: the
    picture of the newest KeepPicture of a former clusterd, if it reads.

    Call ``handle`` for every event, in order, never re-entrantly, and carry the Ready out as
    ``effects`` says. After each call ask ``next_deadline()`` and feed DeadlineReached at that time.
    """

    identity: Identity
    desk: Desk
    store: StoreSession
    owner: Owner
    registration: Registration
    leadership: Leadership
    nodes: NodeRecords
    leader: Leader
    watching: Watching
    operator: Operator
    chronicle: Chronicle
    memory: Memory
    keys: tuple[bytes, ...]
    beat_at: int | None
    contact_at: int | None
    jump: tuple[int, int] | None
    rejected: dict[str, int]

    def __init__(self, identity: Identity, state: NodeState, kept: Picture | None = None) -> None:
        self.identity = identity
        self.keys = identity.keys or (b"",)
        contacts = Contacts.of(identity.name, state.incarnation, identity.peers, Properties().isolation_ns)
        self.desk = Desk(identity, state, contacts, StoreView(prefix(identity.cluster)))
        self.store = StoreSession(self.desk)
        self.owner = Owner(self.desk, self.store)
        self.registration = Registration(self.desk, self.store, self.owner)
        self.leadership = Leadership(self.desk, self.store)
        self.nodes = NodeRecords(self.desk, self.store, Braking(self.desk, self.store))
        self.leader = Leader(self.desk, self.store, self.nodes)
        self.watching = Watching(self.desk, self.owner)
        self.operator = Operator(self.desk, self.store)
        self.chronicle = Chronicle(self.desk, self.owner, self.watching)
        self.memory = Memory(self.desk, self.store, self.owner, kept)
        self.beat_at = self.contact_at = None
        self.jump = None
        self.rejected = {}

    @property
    def state(self) -> NodeState:
        """What the node remembers (as of the newest Persist)."""
        return self.desk.state

    def handle(self, event: Event, now: int) -> Ready:
        """What ``event`` leads to. Time never goes backwards: an earlier ``now`` is taken as the last one."""
        desk = self.desk
        desk.now = max(desk.now, now)
        if isinstance(event, events.DatagramReceived):
            is_news = self._datagram(event)
        elif isinstance(event, events.DeadlineReached):
            is_news = self._deadline()
        else:
            is_news = self._take_in(event)
        if is_news:
            self._decide()
        ready = desk.take()
        if self.jump is not None and self.jump[0] == 0 and ready.persist is not None:
            self.jump = (ready.persist.ticket, self.jump[1])
        return ready

    def next_deadline(self) -> int | None:
        """When DeadlineReached is due, in the time of ``now``."""
        first = self.beat_at
        for at in (self.contact_at, self.desk.wake_at):
            if at is not None and (first is None or at < first):
                first = at
        return first

    # -- taking events in: each returns whether a round of decisions must follow

    def _datagram(self, event: events.DatagramReceived) -> bool:
        desk = self.desk
        try:
            heartbeat = decode_heartbeat(self.identity.cluster, self.keys, event.data)
        except HeartbeatRejected as error:
            self.rejected[str(error)[:80]] = self.rejected.get(str(error)[:80], 0) + 1
            return False
        if not desk.contacts.heard(heartbeat, event.network, desk.now):
            return False
        newer = desk.contacts.newer_self(heartbeat)
        if newer is not None and newer >= desk.state.incarnation and newer < INCARNATION_MAX - 1:
            desk.remember(incarnation=newer + 1)
            self.jump = (0, newer + 1)
            desk.note(EventName.NODE_INCARNATION_JUMPED, node=desk.name, incarnation=newer + 1)
        change = desk.contacts.would_change(heartbeat.node, desk.now)
        if change is None:  # contact is lost at deadlines only: make one
            self.contact_at = desk.now
        return bool(change)

    def _deadline(self) -> bool:
        now, is_news = self.desk.now, False
        if self.contact_at is not None and now >= self.contact_at:
            is_news = bool(self.desk.contacts.evaluate(now, losses=True))
            self.contact_at = self.desk.contacts.next_expiry(now)
        if self.beat_at is not None and now >= self.beat_at:
            self._beat()
        return is_news or (self.desk.wake_at is not None and now >= self.desk.wake_at)

    def _beat(self) -> None:
        """S: a heartbeat waits for nothing. Beats missed by a stall are skipped, not made up for."""
        desk = self.desk
        interval = desk.properties.heartbeat_interval_ns
        self.beat_at = (desk.now if self.beat_at is None else self.beat_at) + interval
        if self.beat_at <= desk.now:
            self.beat_at = desk.now + interval
        leader = desk.view.record("leader", LeaderRecord)
        hears = leader is not None and in_contact(desk, leader.node)
        heartbeat = desk.contacts.beat(desk.now, hears)
        desk.sends.append(SendHeartbeat(encode_heartbeat(self.identity.cluster, self.keys[0], heartbeat)))

    def _take_in(self, event: Event) -> bool:
        match event:
            case events.Started():
                self._start()
            case events.LoopStalled(duration_ns):
                self.desk.contacts.shift(duration_ns, self.desk.now)
                self.desk.note(EventName.LOOP_STALLED, duration_ns=duration_ns)
                return False
            case events.Persisted(ticket):
                self._persisted(ticket)
                return False
            case events.RunStarted():
                self.owner.run_started(event)
            case events.RunNotStarted(vm, epoch, reason):
                self.owner.run_ended(vm, epoch, reason)
            case events.RunEnded(vm, epoch, exit_code, reason):
                text = reason if exit_code is None else f"{reason} (exit code {exit_code})"
                self.owner.run_ended(vm, epoch, text)
            case events.LeasesAnswered():
                self.owner.leases_answered(event)
            case events.ProbeAnswered():
                self.leader.probe_answered(event)
            case events.ReferencesAnswered():
                self.leadership.references_answered(event)
            case events.ImagesSeen():
                return self.watching.images_seen(event)
            case events.CommandGiven(ticket, command):
                self.operator.given(ticket, command)
            case events.ShutdownRequested():
                self.registration.shut_down()
            case _:
                return self._store_answer(event)
        return True

    def _store_answer(self, event: Event) -> bool:
        match event:
            case events.StoreSnapshot():
                return self.store.snapshot(event)
            case events.StoreWritten():
                answer = self.store.written(event)
                if answer is not None:
                    self._written(*answer)
                return answer is not None
            case events.SessionGranted():
                return self.store.granted(event)
            case events.SessionKept():
                return self.store.kept(event)
            case events.StoreFailed():
                return self.store.failed(event)
        raise InvariantBroken(f"the core does not know the event {event!r}")

    def _written(self, token: tuple[str, ...], succeeded: bool) -> None:
        self.owner.written(token, succeeded)
        self.registration.written(token, succeeded)
        self.operator.written(token, succeeded)
        self.leader.written(token, succeeded)
        if token[0] == "node":
            self.nodes.written(token[1], succeeded)
        elif token[0] == "brake":
            self.nodes.braking.written(succeeded)

    def _start(self) -> None:
        desk = self.desk
        desk.started_at = self.beat_at = desk.now
        desk.note(EventName.NODE_STARTED, node=desk.name, incarnation=desk.state.incarnation)
        self.memory.start()
        self.owner.start()
        self._beat()

    def _persisted(self, ticket: int) -> None:
        """A jump of the incarnation is used only once it is durable."""
        if self.jump is not None and 0 < self.jump[0] <= ticket:
            contacts = self.desk.contacts
            contacts.incarnation, contacts.sequence = self.jump[1], 0
            contacts.sent.clear()
            self.jump = None

    # -- deciding

    def _decide(self) -> None:
        desk = self.desk
        desk.wake_at = None
        isolation = desk.properties.isolation_ns
        desk.contacts.go_by(isolation, desk.now)
        if self.beat_at is not None:  # a shorter interval counts from now on
            self.beat_at = min(self.beat_at, desk.now + desk.properties.heartbeat_interval_ns)
        desk.contacts.evaluate(desk.now, losses=False)
        self.contact_at = desk.contacts.next_expiry(desk.now)  # in the past: a loss waits for the deadline
        if desk.now < desk.started_at + isolation:
            desk.wake(desk.started_at + isolation)
        self.store.tick()
        self._judge_self()
        self.nodes.observe()
        is_present = self.registration.decide()
        self.watching.decide()
        self.owner.decide()
        if self.leadership.decide() and is_present:
            self.leader.decide()
        else:
            self.leader.leave_office()
        self.operator.decide()
        self.memory.decide()
        self.chronicle.update()

    def _judge_self(self) -> None:
        desk = self.desk
        verdict = judge_self(desk)
        if verdict and not desk.is_self_isolated:
            desk.isolated_since = desk.now
        desk.is_self_isolated = verdict
        # What was assigned meanwhile is not known before a read that began after the return.
        if verdict:
            desk.is_unsure = True
        elif desk.is_unsure and self.store.is_usable and self.store.last_read_asked_at > desk.back_since:
            desk.is_unsure = False
        if verdict:
            desk.back_since = desk.now

    # -- questions

    def status(self, now: int) -> dict[str, Any]:
        """The document of ``clusterctl status --json`` (DESIGN section 9), from memory alone."""
        self.desk.now = max(self.desk.now, now)
        return self.chronicle.document()

    def explain_node(self, node: str, now: int) -> list[dict[str, Any]]:
        """If ``node`` vanished now: per VM what happens, when and why."""
        self.desk.now = max(self.desk.now, now)
        return explain_node(self.leader, node)

    def testimony(self) -> Testimony:
        """What this node can tell a recovery of the store."""
        return self.memory.testimony()

    def picture(self) -> Picture | None:
        """This node's newest picture of its own store."""
        return self.memory.picture()

    def store_marks(self) -> Marks:
        """By what this node judges a store."""
        return self.store.marks()

    def vm_config(self, vm: str) -> dict[str, Any] | None:
        """The recorded configuration and desired state of a VM, as plain data (``vm show``)."""
        spec = self.desk.view.spec(vm)
        if spec is None:
            return None
        document: dict[str, Any] = unstructure(spec)
        return document

    def backup_place(self, vm: str, now: int) -> BackupPlace:
        """Where a backup of this VM runs. Raises Refused."""
        self.desk.now = max(self.desk.now, now)
        return backup_place(self.desk, vm)

    def has_gone_elsewhere(self, vm: str, place: BackupPlace) -> bool:
        """Whether the VM has left the place where its backup runs."""
        return has_gone_elsewhere(self.desk, vm, place)

"""What the machines of one node share: identity, memory, contacts, the store's picture, and the effects
collected while one event is handled. It decides nothing."""

from typing import Any, Final

import attrs

from clusterd.core import records
from clusterd.core.effects import NOTHING, Act, NoteEvent, Persist, Ready, SendHeartbeat
from clusterd.core.liveness import Contacts
from clusterd.core.properties import Properties
from clusterd.core.state import NodeState, encode_state
from clusterd.core.store_view import StoreView
from clusterd.core.types import EventName, Identity
from daemonkit.units import MILLISECOND

NEVER_AWAY: Final = -(1 << 62)
OVERDUE_NS: Final = 50 * MILLISECOND


@attrs.define
class Desk:
    """``store_known``: the last store request was answered by our own store (S3, S6). ``lease``: our
    session, None while there is none. ``now``: of the event being handled. ``back_since``: when we were last
    isolated ourselves."""

    identity: Identity
    state: NodeState
    contacts: Contacts
    view: StoreView
    now: int = 0
    started_at: int = 0
    store_known: bool = False
    store_reason: str = "not asked yet"
    lease: int | None = None
    lease_good_until: int = 0
    is_self_isolated: bool = False
    isolated_since: int = 0
    back_since: int = NEVER_AWAY
    is_unsure: bool = False  # was isolated, and has not read the store since: runs may be stale
    is_leaving_process: bool = False
    expected: dict[str, tuple[int, int]] = attrs.field(factory=dict)  # incarnation present, since when
    next_request: int = 1
    ticket: int = 0
    is_dirty: bool = False
    wake_at: int | None = None
    acts: list[Act] = attrs.field(factory=list)
    sends: list[SendHeartbeat] = attrs.field(factory=list)

    @property
    def name(self) -> str:
        return self.identity.name

    @property
    def properties(self) -> Properties:
        return self.view.properties

    def request(self) -> int:
        """A fresh request number."""
        self.next_request += 1
        return self.next_request - 1

    def act(self, effect: Act) -> None:
        self.acts.append(effect)

    def note(self, name: EventName, **fields: Any) -> None:
        """An entry of the event log."""
        self.acts.append(NoteEvent(name, fields))

    def remember(self, **changes: Any) -> None:
        """Change what survives a restart; it is durable before any act of this Ready."""
        changed = attrs.evolve(self.state, **changes)
        if changed != self.state:
            self.state, self.is_dirty = changed, True

    def wake(self, at: int) -> None:
        """Something is due then. What is due already and was not done waits for an answer; it is looked at
        again after a while, never at once, so that no mistake can make a node spin."""
        if at <= self.now:
            at = self.now + OVERDUE_NS
        if self.wake_at is None or at < self.wake_at:
            self.wake_at = at

    def take(self) -> Ready:
        """The effects collected, in their order of duty."""
        if not (self.acts or self.sends or self.is_dirty):
            return NOTHING
        persist = None
        if self.is_dirty:
            self.ticket += 1
            self.remember_revision()
            persist = Persist(self.ticket, encode_state(self.state))
            self.is_dirty = False
        ready = Ready(persist, tuple(self.sends), tuple(self.acts))
        self.sends, self.acts = [], []
        return ready

    def remember_revision(self) -> None:
        """Whenever the state is written anyway, note how far the store had come."""
        if self.view.has_read and self.view.revision > self.state.revision_seen:
            epoch = max(self.state.epoch_seen, self.view.epoch())
            self.state = attrs.evolve(self.state, revision_seen=self.view.revision, epoch_seen=epoch)

    def holder(self, vm: str) -> str:
        """The lease holder id of a run here."""
        return f"{self.name}/{vm}"

    def is_leading(self) -> bool:
        """Whether the leader key is ours, as far as we saw."""
        seen = self.view.seen.get("leader")
        return (
            seen is not None
            and isinstance(seen.record, records.Leader)
            and seen.record.node == self.name
            and seen.lease == self.lease
            and self.lease is not None
            and self.now < self.lease_good_until
        )

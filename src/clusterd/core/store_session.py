"""The node's dealings with the store: periodic linearizable reads, its session, guarded writes.

Theory of operation. The store is *known* while its last answer was usable and came from our own store
(S6, ``store_identity``). Every failure, of whatever shape, makes it *unknown* until the next good read; while
it is unknown nothing is written and nothing is decided (S3). A write that a guard refused means that our
picture is old: the next write waits for a fresh read. A store that was rebuilt is another database under the
same id: with its first good read the session, the open requests and the picture of before are dropped.

    unknown --good read--> known --failure | foreign, empty or older store--> unknown

A write has a *token*; at most one write per token is open. The result is found in the picture afterwards
(level-triggered): whoever wants a record to be so compares and writes again.
"""

from typing import Any, Final

import attrs

from clusterd.core import effects, events, records
from clusterd.core.desk import Desk
from clusterd.core.store_identity import GOOD, Marks, judge_store, read_head
from clusterd.core.types import EventName
from clusterd.errors import Refused, StoreUnknown
from daemonkit.units import MILLISECOND, SECOND

READ_INTERVAL_NS_MIN: Final = 100 * MILLISECOND
READ_INTERVAL_NS_MAX: Final = SECOND
KEEPALIVES_PER_SESSION: Final = 4

Token = tuple[str, ...]


@attrs.frozen
class OpenWrite:
    token: Token
    puts: tuple[tuple[str, Any, int], ...]
    deletes: tuple[str, ...]


@attrs.define
class StoreSession:
    desk: Desk
    reading: int | None = None
    reading_since_revision: int = 0
    read_asked_at: int = 0
    last_read_asked_at: int = 0  # of the newest read that was answered
    next_read_at: int = 0
    is_stale: bool = False  # a guard refused: read before writing again
    session_request: int | None = None
    session_asked_at: int = 0
    asked_ttl_ns: int = 0
    granted_ttl_ns: int = 0
    keep_at: int = 0
    writes: dict[int, OpenWrite] = attrs.field(factory=dict)
    is_foreign: bool = False
    epoch_seen: int = 0
    revision_kept: int = 0  # of the picture that a former clusterd kept
    expected_version: int = -1

    @property
    def is_usable(self) -> bool:
        """Whether decisions may be based on the picture and written."""
        return self.desk.store_known and not self.is_stale

    @property
    def read_interval_ns(self) -> int:
        interval = self.desk.properties.heartbeat_interval_ns
        return min(max(interval, READ_INTERVAL_NS_MIN), READ_INTERVAL_NS_MAX)

    def tick(self) -> None:
        """Ask what is due to be asked."""
        desk = self.desk
        if self.reading is None and (desk.now >= self.next_read_at or self.is_stale):
            self.reading = desk.request()
            self.reading_since_revision, self.read_asked_at = desk.view.revision, desk.now
            self.next_read_at = desk.now + self.read_interval_ns
            desk.act(effects.ReadStore(self.reading))
        if self.session_request is None and (desk.now >= self.keep_at or self._is_outdated()):
            self._ask_session()
        if desk.now < self.next_read_at or self.reading is None:
            desk.wake(self.next_read_at)
        if self.session_request is None and desk.lease is not None:
            desk.wake(self.keep_at)

    def read_soon(self) -> None:
        """Somebody needs a read that begins after now."""
        self.next_read_at = min(self.next_read_at, self.desk.now)

    def _ask_session(self) -> None:
        desk = self.desk
        if desk.lease is None and not desk.store_known:
            return  # a session is asked for when the store answers
        self.session_request = desk.request()
        if desk.lease is not None and not self._is_outdated():
            desk.act(effects.KeepSession(self.session_request, desk.lease))
        else:
            self.asked_ttl_ns = desk.properties.store_session_ns
            desk.act(effects.GrantSession(self.session_request, self.asked_ttl_ns))
        self.session_asked_at = desk.now
        self.keep_at = desk.now + self._keep_interval_ns()

    def _is_outdated(self) -> bool:
        """``store_session`` has changed: a session of the new length is asked for. The former one runs out;
        nothing hangs on it once the keys are put under the new one."""
        desk = self.desk
        return (
            desk.store_known
            and desk.lease is not None
            and self.granted_ttl_ns != desk.properties.store_session_ns
        )

    def _keep_interval_ns(self) -> int:
        session = self.desk.properties.store_session_ns // KEEPALIVES_PER_SESSION
        return session if self.desk.lease is not None else min(session, self.read_interval_ns)

    # -- answers

    def snapshot(self, event: events.StoreSnapshot) -> bool:
        """A full read arrived; whether the picture changed or became known."""
        if event.request != self.reading:
            return False
        self.reading = None
        desk = self.desk
        if event.revision < desk.view.revision and event.revision >= self.reading_since_revision:
            self.next_read_at = desk.now  # it was overtaken by one of our own writes
            return True
        try:
            self._check_identity(event)
            changed = desk.view.replace(event.revision, event.entries)
        except (StoreUnknown, Refused) as error:
            self._unknown(str(error))
            return True
        self.last_read_asked_at = self.read_asked_at
        self._expect()
        was_known, was_stale = desk.store_known, self.is_stale
        self.is_stale = False
        self._known()
        return changed or not was_known or was_stale or desk.now >= self.next_read_at

    def _expect(self) -> None:
        """Remember since when we could have heard each node that is present (``membership.is_lost``)."""
        desk = self.desk
        if desk.view.version == self.expected_version:
            return
        self.expected_version = desk.view.version
        for name in desk.view.members():
            presence = desk.view.presence(name)
            if presence is not None and presence.incarnation > desk.expected.get(name, (0, 0))[0]:
                desk.expected[name] = (presence.incarnation, desk.now)

    def marks(self) -> Marks:
        """Below what a store is not ours (S6)."""
        state = self.desk.state
        return Marks(
            state.store_id,
            max(self.epoch_seen, state.epoch_seen),
            max(self.reading_since_revision, state.revision_seen, self.revision_kept),
            state.recovery,
            state.recovery_token,
        )

    def _check_identity(self, event: events.StoreSnapshot) -> None:
        """S6: raises StoreUnknown for a store that is empty, older, another one's, or being rebuilt."""
        desk, head = self.desk, read_head(self.desk.view.prefix, event.entries)
        condition, reason = judge_store(self.marks(), head, event.revision)
        if condition == "rebuilding":
            raise StoreUnknown(reason)
        if condition not in GOOD:
            self._foreign(reason)
        recovered = head.recovered
        if condition == "rebuilt" or (desk.state.store_id is None and head.id is not None):
            number, token = (recovered.number, recovered.token) if recovered else (0, "")
            epoch = max(head.epoch, desk.state.epoch_seen)
            desk.remember(
                store_id=head.id,
                recovery=number,
                recovery_token=token,
                epoch_seen=epoch,
                revision_seen=event.revision,
            )
        if condition == "rebuilt":
            self._start_over()
            desk.note(EventName.STORE_RECOVERED, recovery=head.recovery, revision=event.revision)
        self.is_foreign, self.epoch_seen = False, head.epoch

    def _start_over(self) -> None:
        """It is another database: nothing of our session, our open requests and our picture is of it."""
        self.session_request, self.keep_at = None, self.desk.now
        self.desk.lease, self.desk.lease_good_until, self.granted_ttl_ns = None, 0, 0
        self.writes.clear()
        self.revision_kept = 0
        self.desk.view.start_over()

    def _foreign(self, reason: str) -> None:
        if not self.is_foreign:
            self.desk.note(EventName.STORE_FOREIGN, reason=reason)
        self.is_foreign = True
        raise StoreUnknown(reason)

    def written(self, event: events.StoreWritten) -> tuple[Token, bool] | None:
        """A write was answered: its token and whether it succeeded; then the picture has it."""
        write = self.writes.pop(event.request, None)
        if write is None:
            return None
        if not event.succeeded:
            self.is_stale = True
            return write.token, False
        for key, record, lease in write.puts:
            self.desk.view.wrote(key, record, event.revision, lease)
        for key in write.deletes:
            self.desk.view.deleted(key, event.revision)
        return write.token, True

    def granted(self, event: events.SessionGranted) -> bool:
        if event.request != self.session_request:
            return False
        self.session_request = None
        self.desk.lease, self.granted_ttl_ns = event.lease, self.asked_ttl_ns
        self.desk.lease_good_until = self.session_asked_at + self.granted_ttl_ns
        self.keep_at = self.session_asked_at + self._keep_interval_ns()
        return True

    def kept(self, event: events.SessionKept) -> bool:
        """Whether the session was found to be gone."""
        if event.request != self.session_request:
            return False
        self.session_request = None
        if event.alive:
            self.desk.lease_good_until = self.session_asked_at + self.granted_ttl_ns
            return False
        self.desk.lease = None
        self.keep_at = self.desk.now
        return True

    def failed(self, event: events.StoreFailed) -> bool:
        """No usable answer; whether it was an answer to an open request."""
        if event.request == self.reading:
            self.reading = None
        elif event.request == self.session_request:
            self.session_request = None
            self.keep_at = self.desk.now + self.read_interval_ns
        elif self.writes.pop(event.request, None) is None:
            return False
        self._unknown(event.reason)
        return True

    def _unknown(self, reason: str) -> None:
        desk = self.desk
        desk.store_reason = reason
        # The next read waits its turn: a store in trouble is not helped by being asked at once.
        self.next_read_at = max(self.next_read_at, desk.now + self.read_interval_ns // 2)
        if desk.store_known:
            desk.store_known = False
            desk.note(EventName.STORE_UNKNOWN, reason=reason)

    def _known(self) -> None:
        desk = self.desk
        if not desk.store_known:
            desk.store_known, desk.store_reason = True, ""
            desk.note(EventName.STORE_KNOWN, revision=desk.view.read_revision)

    # -- writes

    def is_writing(self, *token: str) -> bool:
        """Whether a write of this token is open."""
        return any(write.token == token for write in self.writes.values())

    def write(
        self,
        token: Token,
        compares: list[effects.Compare],
        puts: list[tuple[str, Any]],
        deletes: tuple[str, ...] = (),
        leased: tuple[str, ...] = (),
    ) -> bool:
        """Open one guarded transaction. ``leased``: keys put under our session. False: not now."""
        desk = self.desk
        if not self.is_usable or self.is_writing(*token):
            return False
        if leased and desk.lease is None:
            return False
        request = desk.request()
        leases = dict.fromkeys(leased, desk.lease or 0)
        kept = tuple((key, record, leases.get(key, 0)) for key, record in puts)
        prefix = desk.view.prefix
        desk.act(
            effects.WriteStore(
                request,
                tuple(attrs.evolve(compare, key=prefix + compare.key) for compare in compares),
                tuple(
                    effects.Put(prefix + key, records.encode_record(record), lease)
                    for key, record, lease in kept
                ),
                tuple(prefix + key for key in deletes),
            )
        )
        self.writes[request] = OpenWrite(token, kept, deletes)
        return True

    def same(self, *keys: str) -> list[effects.Compare]:
        """Guards: these keys are as our picture has them."""
        return [effects.Compare(key, "mod", self.desk.view.mod(key)) for key in keys]

    def leading(self) -> list[effects.Compare]:
        """The guard of every decision of the leader: it still is the one it was."""
        return [effects.Compare("leader", "create", self.desk.view.create("leader"))]

"""Evidence of life, and the rule of contact.

Theory of operation. Every node has a counter (incarnation, sequence) that advances with each heartbeat.
A counter that advanced, whether heard directly or read in another node's rows, is evidence that its node
lived. Evidence is *fresh* while it is younger, on the receiver's clock, than the isolation time.

Contact with B holds while the evidence of B is fresh, *unless* B's own heartbeats arrive and show that
B's evidence of us, by any route, is stale. So one cut link, or one direction of it, isolates nobody as
long as somebody relays; and where nobody does, both ends come to the same verdict, even if only one
direction is cut. The age of that evidence is judged as of the moment that B's heartbeat came, since it
says what B knew then: so B, gone silent, is not found deaf before it is found gone.

Where B's own heartbeats do not arrive, those that relay its counter tell in its place. A counter brings along
what its node knew: every heartbeat on the way from B to us carries rows at least as new as B's. So a relay
that has no fresh evidence of us shows that B has none either. Without this, a node that comes back hears
first what the others relay of one another, takes that for contact, and loses it with their next heartbeats.

What B knows of us it says in its rows: our own (incarnation, sequence). We remember when we sent which
sequence; the age of the newest acknowledged one is the age of B's evidence.

Every heartbeat carries the isolation time that its sender goes by, and evidence of a node is judged by the
longer of its and ours. So a shorter interval, set while the cluster runs, isolates nobody who has not yet
read of it.

A stall of our own loop says nothing about the others: ``shift`` moves all evidence by it.
"""

from typing import Final

import attrs

from clusterd.core.messages import Heartbeat, Row, peer_id

UNKNOWN: Final = (0, 0)
NEWEST: Final = Row(
    1 << 62, 0, hears_leader=True
)  # above every counter: nothing is newer of a node that is no peer
MARKS_PER_ISOLATION: Final = 4
MARKS_MAX: Final = 16  # the peer may go by a longer isolation time than we
SENT_KEPT_FACTOR: Final = 2  # acknowledgements older than this many isolation times say nothing new


@attrs.define
class Peer:
    """What is known of one other node. Times are on our clock; None: never."""

    name: str
    id: int = 0
    counter: tuple[int, int] = UNKNOWN
    advanced_at: int | None = None
    direct_counter: tuple[int, int] = UNKNOWN
    direct_at: int | None = None
    networks: dict[str, int] = attrs.field(factory=dict)
    acknowledged_at: int | None = None  # when we sent the newest of ours that it has
    relay_acknowledged_at: int | None = None  # the same of those whose heartbeats brought its counter
    hears_leader: bool = False
    rows: dict[int, Row] = attrs.field(factory=dict)  # of its newest heartbeat
    marks: list[tuple[int, dict[int, Row]]] = attrs.field(factory=list)  # its rows some time ago
    in_contact: bool = False
    isolation_ns: int = 0  # what its newest heartbeat said that it goes by
    met: bool = False  # has been in contact, and has heard us, since this clusterd began


def _newest(a: int | None, b: int | None) -> int | None:
    """The later of two times that may not be known."""
    if a is None or b is None:
        return b if a is None else a
    return max(a, b)


@attrs.define
class Contacts:
    """The liveness detector of one node."""

    name: str
    incarnation: int
    isolation_ns: int
    peers: dict[str, Peer]
    sequence: int = 0
    sent: dict[int, int] = attrs.field(factory=dict)
    own_id: int = 0
    names: dict[int, str] = attrs.field(factory=dict)
    known: dict[int, Row] = attrs.field(factory=dict)  # every peer's counter by id, as the last row of it
    without_contact: int = 0

    @classmethod
    def of(cls, name: str, incarnation: int, peers: tuple[str, ...], isolation_ns: int) -> "Contacts":
        """A detector that knows nobody yet."""
        ids = {peer_id(peer): peer for peer in peers if peer != name}
        members = {peer: Peer(peer, peer_id(peer)) for peer in sorted(ids.values())}
        detector = cls(name, incarnation, isolation_ns, members, own_id=peer_id(name), names=ids)
        detector.known = dict.fromkeys(ids, Row(*UNKNOWN, hears_leader=True))
        detector.without_contact = len(members)
        return detector

    def go_by(self, isolation_ns: int, now: int) -> None:
        """Another isolation time from now on. The peers acknowledged what we sent at the former pace, so
        those in contact are given one new isolation time to acknowledge the new one."""
        if isolation_ns < self.isolation_ns:
            for peer in self.peers.values():
                if peer.in_contact and peer.acknowledged_at is not None:
                    peer.acknowledged_at = now
                if peer.in_contact and peer.relay_acknowledged_at is not None:
                    peer.relay_acknowledged_at = now
        self.isolation_ns = isolation_ns

    def beat(self, now: int, hears_leader: bool) -> Heartbeat:
        """The next heartbeat to send; remembers when it was sent."""
        self.sequence += 1
        self.sent[self.sequence] = now
        horizon = now - SENT_KEPT_FACTOR * self.isolation_ns
        while self.sent and next(iter(self.sent.values())) < horizon:
            del self.sent[next(iter(self.sent))]
        rows = {
            identifier: Row(peer.counter[0], peer.counter[1], peer.hears_leader)
            for identifier, peer in ((i, self.peers[n]) for i, n in self.names.items())
            if peer.counter != UNKNOWN
        }
        return Heartbeat(self.name, self.incarnation, self.sequence, hears_leader, rows, self.isolation_ns)

    def heard(self, heartbeat: Heartbeat, network: str, now: int) -> bool:
        """Take in a heartbeat. False: it is older or repeated, or from nobody we know, and was ignored
        (a repetition over a second network is still remembered as a sign of that network)."""
        peer = self.peers.get(heartbeat.node)
        counter = (heartbeat.incarnation, heartbeat.sequence)
        if peer is None:
            return False
        if counter == peer.direct_counter:
            peer.networks[network] = now
        if counter <= peer.direct_counter:
            return False
        peer.networks[network] = now
        peer.direct_counter, peer.direct_at = counter, now
        peer.hears_leader, peer.isolation_ns = heartbeat.hears_leader, heartbeat.isolation_ns
        if counter > peer.counter:
            self._advanced(peer, counter, now)
        own = heartbeat.rows.get(self.own_id)
        if own is not None and own.incarnation == self.incarnation:
            peer.acknowledged_at = _newest(peer.acknowledged_at, self.sent.get(own.sequence))
        known = self.known
        for identifier, row in [r for r in heartbeat.rows.items() if r[1] > known.get(r[0], NEWEST)]:
            other = self.peers[self.names[identifier]]
            if other is not peer:
                self._advanced(other, (row.incarnation, row.sequence), now)
                other.relay_acknowledged_at = _newest(other.relay_acknowledged_at, peer.acknowledged_at)
        peer.rows = heartbeat.rows
        if not peer.marks or now >= peer.marks[-1][0] + self.isolation_ns // MARKS_PER_ISOLATION:
            self._mark(peer, now)
        return True

    def _advanced(self, peer: Peer, counter: tuple[int, int], now: int) -> None:
        peer.counter, peer.advanced_at = counter, now
        self.known[peer.id] = Row(*counter, hears_leader=True)

    def _mark(self, peer: Peer, now: int) -> None:
        """Remember what it knew, to see later which of its evidence has advanced: one mark older than the
        isolation time is kept."""
        peer.marks.append((now, peer.rows))
        while len(peer.marks) > 2 and peer.marks[1][0] + self.lasts_ns(peer) <= now:
            del peer.marks[0]
        del peer.marks[:-MARKS_MAX]

    def newer_self(self, heartbeat: Heartbeat) -> int | None:
        """The incarnation to jump above, if somebody knows a newer us than we are: our state file was
        restored from an older copy, or somebody else uses our name."""
        row = heartbeat.rows.get(self.own_id)
        if row is None or (row.incarnation, row.sequence) <= (self.incarnation, self.sequence):
            return None
        return row.incarnation

    def lasts_ns(self, peer: Peer) -> int:
        """How long evidence of this peer stays fresh: by its isolation time or ours, whichever is longer."""
        return max(self.isolation_ns, peer.isolation_ns)

    def is_fresh(self, peer: Peer, at: int | None, now: int) -> bool:
        """Whether evidence of that time counts now."""
        return at is not None and now < at + self.lasts_ns(peer)

    def judge(self, peer: Peer, now: int) -> bool:
        """The rule of contact (DESIGN "Contact"). What the peer knew of us is judged as of its newest own
        heartbeat; where it sends none that arrive, by what the relays of its newest counter knew."""
        lasts = self.isolation_ns
        if peer.isolation_ns > lasts:
            lasts = peer.isolation_ns
        advanced_at, direct_at, acknowledged_at = peer.advanced_at, peer.direct_at, peer.acknowledged_at
        if advanced_at is None or now >= advanced_at + lasts:
            return False
        if direct_at is None or now >= direct_at + lasts:
            relayed = peer.relay_acknowledged_at
            return relayed is not None and advanced_at < relayed + lasts
        return acknowledged_at is not None and direct_at < acknowledged_at + lasts

    def evaluate(self, now: int, *, losses: bool) -> list[Peer]:
        """Judge every peer; those whose contact changed, in name order. ``losses`` False: contact is only
        gained. After a stall of our own loop old evidence is looked at before ``shift`` has made it younger,
        so contact is lost at deadlines only, which come last."""
        changed = []
        for peer in self.peers.values():
            verdict = self.judge(peer, now)
            if verdict != peer.in_contact and (verdict or losses):
                peer.in_contact = verdict
                self.without_contact += -1 if verdict else 1
                # A relay of an older us proves nothing: only who knows this incarnation of ours was met.
                peer.met = peer.met or (verdict and peer.acknowledged_at is not None)
                changed.append(peer)
        return changed

    def would_change(self, sender: str, now: int) -> bool | None:
        """Whether a heartbeat that has just come gains a contact (True), or ends one (None). Cheap, for every
        datagram: it can gain only one that is not there, and end the sender's; where the sender is without
        contact, that of those whom it relays as well."""
        if self.without_contact:
            wrong = [peer for peer in self.peers.values() if self.judge(peer, now) != peer.in_contact]
            if wrong:
                return None if all(peer.in_contact for peer in wrong) else True
        peer = self.peers[sender]
        return None if peer.in_contact and not self.judge(peer, now) else False

    def next_expiry(self, now: int) -> int | None:
        """When the first contact may end. Evidence that comes meanwhile makes it later, never earlier; that
        a peer does not hear us comes with its own heartbeat, and ends contact at once."""
        first: int | None = None
        for peer in self.peers.values():
            if peer.in_contact:
                end = now
                if peer.advanced_at is not None and self.judge(peer, now):
                    end = peer.advanced_at + self.lasts_ns(peer)
                if first is None or end < first:
                    first = end
        return first

    def shift(self, duration_ns: int, now: int) -> None:
        """Our own loop stood still: evidence could not arrive, so it is younger than it looks. What has been
        drained since is not made younger than now."""

        def younger(at: int | None) -> int | None:
            return None if at is None else min(at + duration_ns, now)

        for peer in self.peers.values():
            peer.advanced_at = younger(peer.advanced_at)
            peer.direct_at = younger(peer.direct_at)
            peer.acknowledged_at = younger(peer.acknowledged_at)
            peer.relay_acknowledged_at = younger(peer.relay_acknowledged_at)
        self.sent = {sequence: min(at + duration_ns, now) for sequence, at in self.sent.items()}

    def _has_fresh(self, by: Peer, of: Peer, now: int) -> bool:
        """Whether a peer's own heartbeats show that its evidence of another has advanced lately."""
        row = by.rows.get(of.id)
        if row is None or not self.is_fresh(of, by.direct_at, now):
            return False
        before = [rows for at, rows in by.marks if not self.is_fresh(of, at, now)]
        old = before[-1].get(of.id) if before else None
        return old is None or row[:2] > old[:2]

    def reachability(self, now: int) -> dict[str, dict[str, str]]:
        """Who hears whom: ``both``, ``in`` (the row's node hears the column's), ``out``, ``none``.

        Our own row's ``in`` is direct evidence. Whether others hear is what their own heartbeats say, by
        any route, and so is unknown (shown as not) where their heartbeats do not arrive here."""

        def hears(a: str, b: str) -> bool:
            if a == self.name:
                return self.is_fresh(self.peers[b], self.peers[b].direct_at, now)
            if b == self.name:
                return self.is_fresh(self.peers[a], self.peers[a].acknowledged_at, now)
            return self._has_fresh(self.peers[a], self.peers[b], now)

        everybody = sorted([self.name, *self.peers])
        words = {(True, True): "both", (True, False): "in", (False, True): "out", (False, False): "none"}
        return {a: {b: words[hears(a, b), hears(b, a)] for b in everybody if b != a} for a in everybody}

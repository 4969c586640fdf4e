"""Lease and AVHD map against naive oracles."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from diskd.core import avhd, lease, overlay
from diskd.core.avhd import DATA, PARENT, ZERO, AvhdMap, Head
from diskd.core.lease import LeaseState
from diskd.core.merge import Merge
from diskd.errors import Damaged, Fenced, Refused

BLOCKS = avhd.BLOCKS_PER_SECTOR + 30
HEAD = Head("cp-0123456789abcdef", "uuid", BLOCKS * 512 - 100, 512, "0011223344556677", "live")

epochs = st.integers(-1, 8) | st.sampled_from([lease.EPOCH_MAX, lease.EPOCH_MAX + 1])
holders = st.sampled_from(["a", "b", ""])


class Leases(RuleBasedStateMachine):
    """At most one epoch may write, epochs never go down, and the file says exactly what memory does."""

    def __init__(self) -> None:
        super().__init__()
        self.state = LeaseState()
        self.highest = 0
        self.claims: list[lease.Claim] = []
        self.owner: dict[int, str] = {}

    @rule(
        decision=st.sampled_from([lease.acquire, lease.prepare, lease.release]), epoch=epochs, holder=holders
    )
    def change(self, decision, epoch, holder):
        before = self.state
        try:
            self.state = decision(before, epoch, holder)
        except Refused:
            return
        if decision is lease.acquire:
            assert epoch > before.epoch or self.state is before
            assert self.owner.setdefault(epoch, holder) == holder, "one epoch names one run"

    @rule(epoch=st.none() | st.integers(1, 8))
    def connect(self, epoch):
        try:
            self.claims.append(lease.admit(self.state, epoch))
        except Refused:
            return

    @invariant()
    def at_most_one_epoch_writes(self):
        assert self.state.epoch >= self.highest
        self.highest = self.state.epoch
        writers = set()
        for claim in self.claims:
            try:
                lease.check_write(self.state, claim)
            except (Fenced, PermissionError):
                continue
            writers.add(claim.epoch)
        assert len(writers) <= 1
        assert writers <= {None if self.state.is_free else self.state.epoch}
        assert lease.decode(lease.encode(self.state)) == self.state


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(st.binary(max_size=300))
def test_rubbish_raises_only_damaged(data):
    for decode in (lease.decode, avhd.decode_head, lambda d: avhd.decode_sector(0, HEAD.nonce, d)):
        try:
            decode(data)
        except Damaged:
            continue
        raise AssertionError("rubbish was accepted")


ranges = st.tuples(
    st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS), st.sampled_from([PARENT, DATA, ZERO])
).map(lambda r: (r[0], min(r[1], BLOCKS - r[0]), r[2]))


@given(st.lists(ranges, max_size=12), st.data())
@settings(max_examples=60, deadline=None)
def test_the_map_is_a_list_of_states(changes, data):
    states, oracle = AvhdMap.empty(HEAD), [PARENT] * BLOCKS
    for first, count, state in changes:
        states.set_range(first, count, state)
        oracle[first : first + count] = [state] * count
    assert states.entries == sum(state != PARENT for state in oracle)
    assert states.data_blocks == oracle.count(DATA)
    first = data.draw(st.integers(0, BLOCKS - 1))
    count = data.draw(st.integers(1, BLOCKS - first))
    runs = states.runs(first, count)
    assert [state for _, size, state in runs for _ in range(size)] == oracle[first : first + count]
    assert all(a[2] != b[2] for a, b in itertools.pairwise(runs))
    assert states.state(first) == oracle[first]
    limit = data.draw(st.integers(1, 50))
    assert (
        states.entries_from(first, limit)
        == [block for block in range(first, BLOCKS) if oracle[block] != PARENT][:limit]
    )
    copy = AvhdMap.over(
        HEAD, bytearray(b"".join(avhd.decode_sector(i, HEAD.nonce, states.sector(i)) for i in range(2)))
    )
    assert copy.runs(0, BLOCKS) == states.runs(0, BLOCKS) and copy.entries == states.entries


@given(st.lists(ranges, max_size=6), st.integers(0, HEAD.size_bytes - 1), st.data())
@settings(max_examples=150, deadline=None)
def test_a_plan_covers_the_write_once_and_never_touches_a_frozen_parent(changes, offset, data):
    states = AvhdMap.empty(HEAD)
    for first, count, state in changes:
        states.set_range(first, count, state)
    length = data.draw(st.integers(1, HEAD.size_bytes - offset))
    merging = data.draw(st.booleans())
    pieces = overlay.plan_write(states, Merge(states, 8) if merging else None, offset, length)
    assert pieces is not None
    at = offset
    for piece in pieces:
        assert piece.offset == at and piece.length > 0
        at += piece.length
        first, count = overlay.block_span(states, piece.offset, piece.length)
        assert {states.state(block) for block in range(first, first + count)} == {piece.base}
        if piece.kind == "parent":
            assert merging and piece.base == PARENT
        elif piece.kind == "copy_up":
            assert count == 1 and piece.base != DATA
        else:
            ends = {piece.offset % 512, (piece.offset + piece.length) % 512}
            whole = ends == {0} or (
                piece.offset % 512 == 0 and piece.offset + piece.length == HEAD.size_bytes
            )
            assert whole or piece.base == DATA
    assert at == offset + length

"""The checker catches every bad history that is built for it, and accepts every good one."""

from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.checker.verdict import Verdict, judge
from holdfast.guest.acks import Line
from holdfast.guest.journal import (
    BLOCK_BYTES,
    RECORD_BYTES,
    RECORDS_PER_BLOCK,
    Record,
    encode_header,
    encode_record,
    load_block,
    load_offset,
    load_target,
    plan_layout,
    ring_offset,
    slot_of,
)

SIZE = 32 * BLOCK_BYTES
LAYOUT = plan_layout(SIZE, b"j" * 16)
STEP_NS = 20_000_000


class History:
    """A guest's disk and its acknowledgements, written by hand."""

    def __init__(self) -> None:
        self.disk = bytearray(SIZE)
        self.disk[:BLOCK_BYTES] = encode_header(LAYOUT)
        self.acks: list[Line] = []
        self.now_ns = 1_000
        self.sequence = 0
        self.load_writes = 0

    def write(self, epoch: int, node: str, sequence: int) -> None:
        index, position = slot_of(LAYOUT, sequence)
        start = ring_offset(index)
        if position == 0:
            self.disk[start : start + BLOCK_BYTES] = bytes(BLOCK_BYTES)
        at = start + position * RECORD_BYTES
        record = Record(epoch, sequence, node, self.load_writes, 0, 0)
        self.disk[at : at + RECORD_BYTES] = encode_record(LAYOUT, record)

    def load(self) -> None:
        self.load_writes += 1
        at = load_offset(LAYOUT, load_target(LAYOUT, self.load_writes))
        self.disk[at : at + BLOCK_BYTES] = load_block(LAYOUT, self.load_writes)

    def step(self, epoch: int = 1, node: str = "n1", *, after_ns: int = STEP_NS, loads: int = 0) -> None:
        for _ in range(loads):
            self.load()
        self.sequence += 1
        self.now_ns += after_ns
        self.write(epoch, node, self.sequence)
        self.acks.append(Line("ack", epoch, node, self.sequence, self.now_ns))

    def wipe(self, sequence: int) -> None:
        index, position = slot_of(LAYOUT, sequence)
        at = ring_offset(index) + position * RECORD_BYTES
        self.disk[at : at + RECORD_BYTES] = bytes(RECORD_BYTES)

    def judge(self) -> Verdict:
        return judge(self.acks, lambda offset, length: bytes(self.disk[offset : offset + length]), SIZE)


def test_checker_good_history() -> None:
    history = History()
    for _ in range(40):
        history.step()
    history.acks.append(Line("refused", 1, "n1", 41, history.now_ns + 5))
    history.step(4, "n2", after_ns=5_000_000_000)
    for _ in range(9):
        history.step(4, "n2")
    history.write(4, "n2", 51)  # written, not acknowledged: nobody was told, nothing is wrong
    verdict = history.judge()
    assert verdict.is_good and verdict.records == 50
    assert verdict.owners == [(1, "n1", 1, 40), (4, "n2", 41, 50)]
    assert verdict.longest_gap_s == 5.0
    assert verdict.refused == [(1, "n1", 41)]


def test_checker_nothing_acknowledged() -> None:
    verdict = History().judge()
    assert verdict == Verdict(0, 0, 0, [], 0.0, [], 0, [])


def test_checker_lost_record() -> None:
    for victim in (1, 32, 33, 50):
        history = History()
        for _ in range(50):
            history.step()
        history.wipe(victim)
        verdict = history.judge()
        assert (verdict.lost, verdict.overlaps) == (1, 0)
        assert f"record {victim} " in verdict.examples[0]


def test_checker_lost_tail_and_empty_disk() -> None:
    history = History()
    for _ in range(70):
        history.step()
    for victim in range(60, 71):
        history.wipe(victim)
    assert history.judge().lost == 11
    history.disk[:] = bytes(SIZE)
    assert history.judge().lost == 70


def test_checker_record_overwritten_by_another_owner_is_lost() -> None:
    history = History()
    for _ in range(10):
        history.step()
    history.write(2, "n2", 10)
    verdict = history.judge()
    assert verdict.lost == 1 and "slot holds record 10 of epoch 2" in verdict.examples[0]


def test_checker_overlap() -> None:
    history = History()
    for _ in range(5):
        history.step(1, "n1")
    history.step(2, "n2")
    history.step(1, "n1")
    history.step(2, "n2")
    history.step(1, "n1")
    verdict = history.judge()
    assert (verdict.lost, verdict.overlaps) == (0, 2)
    assert verdict.owners == [(1, "n1", 1, 9), (2, "n2", 6, 8)]


def test_checker_order_is_by_time_not_by_line() -> None:
    history = History()
    history.step(1, "n1")
    history.step(2, "n2")
    history.acks.reverse()
    assert history.judge().overlaps == 0


def test_checker_wrapped_ring() -> None:
    history = History()
    for _ in range(LAYOUT.slots + 40):
        history.step()
    assert history.judge().is_good
    history.wipe(LAYOUT.slots + 40)
    assert history.judge().lost == 1
    history = History()
    for _ in range(LAYOUT.slots * 2):
        history.step()
    history.wipe(LAYOUT.slots + 1)
    assert history.judge().lost == 1


def test_checker_block_of_an_older_lap_is_lost() -> None:
    history = History()
    for _ in range(LAYOUT.slots):
        history.step()
    old = bytes(history.disk)
    for _ in range(RECORDS_PER_BLOCK):
        history.step()
    history.disk[:] = old
    assert history.judge().lost == RECORDS_PER_BLOCK


def test_checker_load_blocks() -> None:
    history = History()
    for _ in range(30):
        history.step(loads=3)
    verdict = history.judge()
    assert verdict.is_good and verdict.load_blocks > 5
    at = load_offset(LAYOUT, load_target(LAYOUT, 90))
    older = next(n for n in range(89, 0, -1) if load_target(LAYOUT, n) == load_target(LAYOUT, 90))
    history.disk[at : at + BLOCK_BYTES] = load_block(LAYOUT, older)
    assert history.judge().lost == 1
    history.disk[at + 100] ^= 1
    assert history.judge().lost == 1


def test_checker_later_load_write_is_fine() -> None:
    history = History()
    for _ in range(10):
        history.step(loads=2)
    history.load()
    history.load()
    assert history.judge().is_good


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=6),
    st.data(),
)
def test_checker_counts_exactly_what_was_taken(runs: list[tuple[int, int]], data: st.DataObject) -> None:
    history = History()
    for number, (steps, loads) in enumerate(runs, 1):
        for _ in range(steps):
            history.step(number, f"n{number % 3}", loads=loads)
    assert history.judge().is_good
    sequences = (
        st.sets(st.integers(1, history.sequence - 1), max_size=5) if history.sequence > 1 else st.just(set())
    )
    victims = data.draw(sequences)
    for victim in victims:
        history.wipe(victim)
    verdict = history.judge()
    assert verdict.lost == len(victims)
    assert verdict.owners[-1][0] == len(runs)

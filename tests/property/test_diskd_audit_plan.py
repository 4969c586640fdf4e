"""What an audit compares, and how: every unchanged byte once, in bounded questions, down to the block."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemonkit.codec import encode
from daemonkit.errors import InvariantBroken, ProtocolError
from diskd.core.audit import (
    ALL_ZERO,
    DATA_BYTES_MAX,
    MESSAGE_BYTES_MAX,
    MISMATCHES_MAX,
    PORTION_BYTES,
    RANGES_MAX,
    SOMETHING,
    TOTAL_BYTES_MAX,
    ZERO_BYTES_MAX,
    Answer,
    Findings,
    Probe,
    Question,
    decode_answer,
    decode_question,
    digest_of,
    encode_message,
    narrower,
    probes_of,
    questions_of,
    unchanged,
)
from diskd.core.ports import Allocation

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30


@given(st.integers(0, 60), st.sets(st.integers(0, 70)))
def test_unchanged_is_the_complement(size, blocks):
    extents = []
    for block in sorted(blocks):
        if extents and sum(extents[-1]) == block:
            extents[-1] = (extents[-1][0], extents[-1][1] + 1)
        else:
            extents.append((block, 1))
    found = [byte for offset, length in unchanged(size, extents) for byte in range(offset, offset + length)]
    assert found == [byte for byte in range(size) if byte not in blocks]


def test_changes_out_of_order_are_a_defect():
    with pytest.raises(InvariantBroken):
        list(unchanged(100, [(50, 10), (40, 5)]))


PIECES = st.lists(
    st.tuples(st.integers(1, 5 * MiB), st.sampled_from(["data", "zero", "hole"]), st.integers(0, 3 * MiB)),
    max_size=12,
)


@given(PIECES)
def test_probes_cover_each_byte_once_and_are_bounded(pieces):
    allocations, position = [], 0
    for length, kind, gap in pieces:
        allocations.append(Allocation(position, length, kind))
        position += length + gap
    probes = list(probes_of(allocations))
    covered = [(p.offset, p.end, p.is_zero) for p in probes]
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(covered))
    for piece in allocations:
        inside = [p for p in probes if p.offset < piece.offset + piece.length and p.end > piece.offset]
        assert sum(min(p.end, piece.offset + piece.length) - max(p.offset, piece.offset) for p in inside) == (
            piece.length
        )
        assert all(p.is_zero == (piece.kind != "data") for p in inside)
    assert sum(p.length for p in probes) == sum(piece.length for piece in allocations)
    assert all(p.length <= (ZERO_BYTES_MAX if p.is_zero else PORTION_BYTES) for p in probes)
    for question in questions_of(probes):
        message = encode_message(Question("system", [[p.offset, p.length] for p in question]))
        assert len(message) <= MESSAGE_BYTES_MAX
        assert decode_question(message).ranges == [[p.offset, p.length] for p in question]
    assert [p for question in questions_of(probes) for p in question] == probes


def test_a_sparse_terabyte_is_few_questions():
    probes = probes_of([Allocation(0, 1024 * GiB, "hole")])
    questions = list(questions_of(probes))
    assert len(questions) == 1024 * GiB // TOTAL_BYTES_MAX
    # And many small pieces are many questions, each within its bounds.
    small = [Allocation(n * 8192, 4096, "data") for n in range(3 * RANGES_MAX)]
    assert [len(question) for question in questions_of(probes_of(small))] == [RANGES_MAX] * 3
    large = [Allocation(0, 3 * DATA_BYTES_MAX, "data")]
    assert [len(q) for q in questions_of(probes_of(large))] == [DATA_BYTES_MAX // PORTION_BYTES] * 3


def test_a_difference_is_narrowed_down_to_a_block():
    large = Probe(0, 3 * GiB, is_zero=True)
    portions = narrower(large, 4096)
    assert {p.length for p in portions} == {PORTION_BYTES}
    blocks = narrower(portions[7], 4096)
    assert [(b.offset, b.length) for b in blocks[:2]] == [(7 * MiB, 4096), (7 * MiB + 4096, 4096)]
    assert narrower(blocks[0], 4096) == []
    assert narrower(Probe(4096, 512, is_zero=False), 4096) == []


def test_findings_coalesce_and_are_bounded():
    findings = Findings()
    findings.add(0, 4096)
    findings.add(4096, 4096)
    assert findings.places == [[0, 8192]]
    for number in range(2 * MISMATCHES_MAX):
        findings.add((number + 2) * 8192, 4096)
    assert len(findings.places) == MISMATCHES_MAX
    assert findings.bytes == (2 * MISMATCHES_MAX + 2) * 4096


def test_zeroes_are_zeroes_however_they_are_stored():
    assert digest_of(bytes(4096)) == ALL_ZERO
    assert digest_of(bytearray(512)) == ALL_ZERO
    assert len(digest_of(bytes(4095) + b"\x01")) == 32


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xff",
        encode([]),
        encode({"disk": "d"}),
        encode({"disk": "d", "ranges": []}),
        encode({"disk": "d", "ranges": [[0]]}),
        encode({"disk": "d", "ranges": [[0, 0]]}),
        encode({"disk": "d", "ranges": [[-4096, 4096]]}),
        encode({"disk": "d", "ranges": [[4096, 4096], [0, 4096]]}),
        encode({"disk": "d", "ranges": [[0, 2 * GiB]]}),
        encode({"disk": "d", "ranges": [[1 << 63, 4096]]}),
        encode({"disk": "d", "ranges": [[n, 1] for n in range(RANGES_MAX + 1)]}),
        encode({"disk": "d", "ranges": [[n * MiB, MiB] for n in range(65)]}),
        encode({"disk": "d", "ranges": [[n * GiB, GiB] for n in range(17)]}),
        encode({"disk": "d", "ranges": [[0, 4096]], "more": 1}),
        encode({"disk": "d" * (MESSAGE_BYTES_MAX + 1), "ranges": [[0, 4096]]}),
    ],
)
def test_hostile_questions_are_refused(message):
    with pytest.raises(ProtocolError):
        decode_question(message)


PROBES = [Probe(0, 4096, is_zero=False), Probe(4096, GiB, is_zero=True)]


@pytest.mark.parametrize(
    "digests", [[], [ALL_ZERO], [b"x", b"x"], [b"x" * 32, b"x" * 32], [ALL_ZERO] * 3, [b"x" * 32, b""] * 2]
)
def test_answers_to_another_question_are_refused(digests):
    with pytest.raises(ProtocolError):
        decode_answer(encode_message(Answer(digests)), PROBES)


def test_good_answers():
    for digests in ([ALL_ZERO, ALL_ZERO], [b"x" * 32, SOMETHING], [b"x" * 32, ALL_ZERO]):
        assert decode_answer(encode_message(Answer(digests)), PROBES).digests == digests
    assert decode_answer(encode_message(Answer([], "no")), PROBES).refused == "no"


@given(st.binary(max_size=200))
def test_garbage_is_a_protocol_error(data):
    for decode in (decode_question, lambda payload: decode_answer(payload, PROBES)):
        try:
            decode(data)
        except ProtocolError:
            continue

"""The journal's layout: what is written is found again, and damage is never taken for a record."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.guest.acks import AcksError, Line, parse_acks
from holdfast.guest.journal import (
    BLOCK_BYTES,
    RECORDS_PER_BLOCK,
    JournalError,
    Layout,
    Record,
    decode_header,
    decode_record,
    encode_header,
    encode_record,
    find_last,
    load_block,
    load_number,
    load_offset,
    load_target,
    plan_layout,
    ring_offset,
    slot_of,
)
from holdfast.guest.nbd import parse_uri

ID = bytes(range(16))


def record(sequence: int, *, epoch: int = 1, node: str = "n1") -> Record:
    return Record(epoch, sequence, node, sequence * 2, 10, 20)


def ring_after(layout: Layout, last: int) -> dict[int, bytes]:
    """The ring's blocks as a guest leaves them that wrote records 1 to ``last``."""
    blocks: dict[int, bytes] = {}
    parts: list[bytes] = []
    for sequence in range(1, last + 1):
        index, position = slot_of(layout, sequence)
        if position == 0:
            parts = []
        parts.append(encode_record(layout, record(sequence)))
        blocks[index] = b"".join(parts).ljust(BLOCK_BYTES, b"\0")
    return blocks


def test_guest_layout_fits_its_disk() -> None:
    for blocks in (16, 17, 256):
        layout = plan_layout(blocks * BLOCK_BYTES, ID)
        assert layout.ring_blocks > 0 and layout.load_blocks > 0
        assert ring_offset(0) == BLOCK_BYTES
        assert load_offset(layout, 0) == ring_offset(layout.ring_blocks)
        assert load_offset(layout, layout.load_blocks - 1) + BLOCK_BYTES == blocks * BLOCK_BYTES
    with pytest.raises(JournalError, match="at least"):
        plan_layout(15 * BLOCK_BYTES, ID)


def test_guest_header_round_trip_and_refusals() -> None:
    size = 64 * BLOCK_BYTES
    layout = plan_layout(size, ID)
    header = encode_header(layout)
    assert len(header) == BLOCK_BYTES
    assert decode_header(header, size) == layout
    assert decode_header(bytes(BLOCK_BYTES), size) is None
    with pytest.raises(JournalError, match="something else"):
        decode_header(b"EXT4" + header[4:], size)
    with pytest.raises(JournalError, match="damaged"):
        decode_header(header[:40] + b"\xff" + header[41:], size)
    with pytest.raises(JournalError, match="larger than its disk"):
        decode_header(header, size // 2)
    with pytest.raises(JournalError, match="version 9"):
        decode_header(header[:16] + bytes((0, 0, 0, 9)) + header[20:], size)


@given(
    st.integers(0, 2**63),
    st.integers(1, 2**63),
    st.text("abcdefghijklmnopqrstuvwxyz0123456789.-", min_size=1, max_size=63),
    st.integers(0, 127),
)
def test_guest_record_round_trip_and_damage(epoch: int, sequence: int, node: str, position: int) -> None:
    layout = plan_layout(64 * BLOCK_BYTES, ID)
    written = Record(epoch, sequence, node, 3, 4, 5)
    data = encode_record(layout, written)
    assert decode_record(layout, data) == written
    damaged = bytearray(data)
    damaged[position] ^= 0x40
    assert decode_record(layout, bytes(damaged)) is None
    assert decode_record(layout._replace(journal_id=bytes(16)), data) is None


@pytest.mark.parametrize("last", [0, 1, 31, 32, 33, 64, 100, 255, 256, 257, 290, 512, 513, 700])
def test_guest_finds_where_the_journal_ends(last: int) -> None:
    layout = plan_layout(16 * BLOCK_BYTES, ID)
    assert layout.slots == 8 * RECORDS_PER_BLOCK
    blocks = ring_after(layout, last)
    reads: list[int] = []

    def read_block(index: int) -> bytes:
        reads.append(index)
        return blocks.get(index, bytes(BLOCK_BYTES))

    found = find_last(layout, read_block)
    assert found == (record(last) if last else None)
    assert len(reads) <= 5


def test_guest_load_blocks_are_known_from_their_number() -> None:
    layout = plan_layout(64 * BLOCK_BYTES, ID)
    blocks = {number: load_block(layout, number) for number in range(1, 40)}
    assert len(set(blocks.values())) == len(blocks)
    assert {load_target(layout, number) for number in range(1, 2000)} == set(range(layout.load_blocks))
    for number, block in blocks.items():
        assert len(block) == BLOCK_BYTES
        assert load_number(layout, block) == number
        assert load_number(layout, block[:-1] + b"?") is None
    assert load_number(layout, bytes(BLOCK_BYTES)) is None


def test_guest_acks_lines() -> None:
    data = b"ack 3 n1 17 1000\nrefused 3 n1 18 2000\nack 4 n2 1"
    assert parse_acks(data) == [Line("ack", 3, "n1", 17, 1000), Line("refused", 3, "n1", 18, 2000)]
    assert parse_acks(b"") == []
    for bad in (b"hello\n", b"ack 1 n1 x 5\n", b"ack 1 n1 5\n", b"\xff\xfe 1 2 3 4\n"):
        with pytest.raises(AcksError, match="line 1"):
            parse_acks(bad)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("nbd://127.0.0.1:10809/web@17", ("127.0.0.1", 10809, "web@17")),
        ("nbd://host:1/a:cp-1", ("host", 1, "a:cp-1")),
        ("nbd://host/x", ("host", 10809, "x")),
        ("nbd://[::1]:99/x%40y", ("::1", 99, "x@y")),
    ],
)
def test_guest_nbd_addresses(uri: str, expected: tuple[str, int, str]) -> None:
    assert parse_uri(uri) == expected


@pytest.mark.parametrize(
    "uri", ["", "x", "http://a/b", "nbd://", "nbd://:5/x", "nbd://h:x/y", "nbd://h:0/y", "nbd://[::1/x"]
)
def test_guest_bad_nbd_addresses(uri: str) -> None:
    with pytest.raises(ValueError, match=r"nbd|NBD|port|host"):
        parse_uri(uri)

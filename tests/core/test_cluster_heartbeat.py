"""Heartbeats: what is sent is read back, and nothing else is accepted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterd.core.messages import (
    DATAGRAM_BYTES_MAX,
    INCARNATION_MAX,
    ISOLATION_MS_MAX,
    SEQUENCE_MAX,
    Heartbeat,
    HeartbeatRejected,
    Row,
    decode_heartbeat,
    encode_heartbeat,
    peer_id,
)
from daemonkit.codec import encode
from daemonkit.units import MILLISECOND

KEY, OTHER = b"k" * 32, b"o" * 32
counters = st.tuples(st.integers(0, INCARNATION_MAX), st.integers(0, SEQUENCE_MAX), st.booleans())
heartbeats = st.builds(
    Heartbeat,
    node=st.text("abcdefgh0123456789-", min_size=1, max_size=63),
    incarnation=st.integers(0, INCARNATION_MAX),
    sequence=st.integers(0, SEQUENCE_MAX),
    hears_leader=st.booleans(),
    rows=st.dictionaries(st.integers(0, 2**32 - 1), counters.map(lambda c: Row(*c)), max_size=8),
    isolation_ns=st.integers(0, ISOLATION_MS_MAX).map(lambda ms: ms * MILLISECOND),
)


@given(heartbeats)
def test_what_is_encoded_is_decoded(heartbeat: Heartbeat) -> None:
    data = encode_heartbeat("lab", KEY, heartbeat)
    assert decode_heartbeat("lab", (OTHER, KEY), data) == heartbeat


@given(st.binary(max_size=2000))
def test_random_bytes_raise_only_our_error(data: bytes) -> None:
    with pytest.raises(HeartbeatRejected):
        decode_heartbeat("lab", (KEY,), data)


@given(heartbeats, st.integers(0, 10_000), st.integers(1, 255))
def test_a_flipped_byte_is_rejected(heartbeat: Heartbeat, at: int, flip: int) -> None:
    data = bytearray(encode_heartbeat("lab", KEY, heartbeat))
    data[at % len(data)] ^= flip
    with pytest.raises(HeartbeatRejected):
        decode_heartbeat("lab", (KEY,), bytes(data))


def test_64_nodes_with_the_longest_names_and_largest_counters_fit() -> None:
    rows = {2**32 - 1 - n: Row(INCARNATION_MAX, SEQUENCE_MAX, True) for n in range(63)}
    worst = Heartbeat("n" * 63, INCARNATION_MAX, SEQUENCE_MAX, True, rows, ISOLATION_MS_MAX * MILLISECOND)
    data = encode_heartbeat("c" * 63, KEY, worst)
    assert len(data) <= DATAGRAM_BYTES_MAX
    assert decode_heartbeat("c" * 63, (KEY,), data) == worst


def test_another_cluster_a_wrong_key_and_a_later_version_are_rejected() -> None:
    heartbeat = Heartbeat("n1", 1, 1, False, {peer_id("n2"): Row(1, 2, True)})
    data = encode_heartbeat("lab", KEY, heartbeat)
    for cluster, keys in (("other", (KEY,)), ("lab", (OTHER,)), ("lab", ())):
        with pytest.raises(HeartbeatRejected):
            decode_heartbeat(cluster, keys, data)
    with pytest.raises(HeartbeatRejected, match="version"):
        decode_heartbeat("lab", (KEY,), encode([2, b"m" * 16, b""]))


def test_a_key_of_any_length_works() -> None:
    heartbeat = Heartbeat("n1", 1, 1, False, {})
    for key in (b"", b"x", b"x" * 64, b"x" * 4096):
        assert decode_heartbeat("lab", (key,), encode_heartbeat("lab", key, heartbeat)) == heartbeat

"""Heartbeats on the wire. docs/formats/heartbeat.md describes the bytes.

A datagram is ``[version, mac, body]`` and the body
``[cluster, node, incarnation, sequence, flags, isolation_ms, rows]``, both msgpack. ``rows`` is a flat list
of three integers per peer, because 64 nodes must fit into 1,400 bytes: the peer's 32-bit id (a hash of its
name), its incarnation, and sequence * 2 + "hears the leader".
"""

import functools
import hashlib
import hmac
from typing import Any, Final, NamedTuple

import attrs

from clusterd.core.types import NODES_MAX
from daemonkit.codec import CodecError, decode, encode
from daemonkit.errors import ProtocolError
from daemonkit.units import MILLISECOND

WIRE_VERSION: Final = 1
ACCEPTED_VERSIONS: Final = (WIRE_VERSION,)  # the previous one joins here when there is a second
DATAGRAM_BYTES_MAX: Final = 1400
MAC_BYTES: Final = 16
KEYS_MAX: Final = 2
INCARNATION_MAX: Final = (1 << 32) - 1
SEQUENCE_MAX: Final = (1 << 40) - 1
ISOLATION_MS_MAX: Final = 60_000_000  # the longest interval times the highest threshold
HEARS_LEADER: Final = 1
REMEMBERED_MAX: Final = 2 * NODES_MAX


class HeartbeatRejected(ProtocolError):
    """A datagram that is not a heartbeat of this cluster under one of our keys."""


class Row(NamedTuple):
    """The newest counter of a peer known by any route, and whether that peer hears the leader. A tuple, since
    63 of them are made and compared for every datagram."""

    incarnation: int
    sequence: int
    hears_leader: bool


@attrs.frozen
class Heartbeat:
    """``rows`` by peer id (``peer_id`` of the name). ``isolation_ns``: the isolation time that the sender
    goes by, in whole milliseconds."""

    node: str
    incarnation: int
    sequence: int
    hears_leader: bool
    rows: dict[int, Row]
    isolation_ns: int = 0


def peer_id(name: str) -> int:
    """The 32-bit id under which a node appears in rows."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")


def _mac(key: bytes, version: int, body: bytes) -> bytes:
    short = key if len(key) <= hashlib.blake2b.MAX_KEY_SIZE else hashlib.blake2b(key).digest()
    return hashlib.blake2b(bytes([version]) + body, key=short, digest_size=MAC_BYTES).digest()


def encode_heartbeat(cluster: str, key: bytes, heartbeat: Heartbeat) -> bytes:
    """The datagram, under the first of the cluster's keys."""
    rows: list[int] = []
    for identifier, row in heartbeat.rows.items():
        rows += (identifier, row.incarnation, row.sequence * 2 + row.hears_leader)
    body = encode(
        [
            cluster,
            heartbeat.node,
            heartbeat.incarnation,
            heartbeat.sequence,
            HEARS_LEADER if heartbeat.hears_leader else 0,
            heartbeat.isolation_ns // MILLISECOND,
            rows,
        ]
    )
    data = encode([WIRE_VERSION, _mac(key, WIRE_VERSION, body), body])
    assert len(data) <= DATAGRAM_BYTES_MAX, len(data)
    return data


def _is_count(value: Any, maximum: int) -> bool:
    return type(value) is int and 0 <= value <= maximum


@functools.lru_cache(maxsize=REMEMBERED_MAX)
def decode_heartbeat(cluster: str, keys: tuple[bytes, ...], data: bytes) -> Heartbeat:
    """The heartbeat. Raises HeartbeatRejected for everything else, and nothing else.

    The last ones are remembered: the same datagram comes over every network, and in the simulator to every
    node. What is returned is not to be changed."""
    try:
        outer = decode(data, size_bytes_max=DATAGRAM_BYTES_MAX)
    except CodecError as error:
        raise HeartbeatRejected(str(error)) from error
    if not (isinstance(outer, list) and len(outer) == 3):
        raise HeartbeatRejected("not a heartbeat")
    version, mac, body = outer
    if type(version) is not int or version not in ACCEPTED_VERSIONS:
        raise HeartbeatRejected(f"version {version!r} is not spoken here")
    if type(mac) is not bytes or type(body) is not bytes:
        raise HeartbeatRejected("not a heartbeat")
    if not any(hmac.compare_digest(mac, _mac(key, version, body)) for key in keys):
        raise HeartbeatRejected("its authentication code is not ours")
    try:
        fields = decode(body, size_bytes_max=DATAGRAM_BYTES_MAX)
    except CodecError as error:
        raise HeartbeatRejected(str(error)) from error
    if not (isinstance(fields, list) and len(fields) == 7):
        raise HeartbeatRejected("not a heartbeat")
    return _read_body(cluster, fields)


def _read_body(cluster: str, fields: list[Any]) -> Heartbeat:
    sender_cluster, node, incarnation, sequence, flags, isolation_ms, flat = fields
    if sender_cluster != cluster:
        raise HeartbeatRejected("it comes from another cluster")
    if type(node) is not str or not 1 <= len(node) <= 63:
        raise HeartbeatRejected("its node name is not one")
    if not (_is_count(incarnation, INCARNATION_MAX) and _is_count(sequence, SEQUENCE_MAX)):
        raise HeartbeatRejected("its counter is out of range")
    if not _is_count(isolation_ms, ISOLATION_MS_MAX):
        raise HeartbeatRejected("its isolation time is out of range")
    if not (_is_count(flags, 255) and isinstance(flat, list) and len(flat) <= 3 * NODES_MAX):
        raise HeartbeatRejected("its rows are out of range")
    if len(flat) % 3:
        raise HeartbeatRejected("its rows are incomplete")
    identifiers, incarnations, packed = flat[0::3], flat[1::3], flat[2::3]
    if flat and not (
        set(map(type, flat)) == {int}
        and min(flat) >= 0
        and max(identifiers) <= INCARNATION_MAX
        and max(incarnations) <= INCARNATION_MAX
        and max(packed) <= 2 * SEQUENCE_MAX + 1
    ):
        raise HeartbeatRejected("a row is out of range")
    rows = {
        identifier: Row(peer_incarnation, both >> 1, bool(both & 1))
        for identifier, peer_incarnation, both in zip(identifiers, incarnations, packed, strict=True)
    }
    hears_leader = bool(flags & HEARS_LEADER)
    return Heartbeat(node, incarnation, sequence, hears_leader, rows, isolation_ms * MILLISECOND)

"""The rules over manifests: chains, bases on offer, what may be removed; and manifests that lie."""

import json

import attrs
import pytest
from blake3 import blake3
from diskd_manifests import manifest, name, points

from diskd.core.catalog import (
    CHAIN_MAX,
    FileDigest,
    by_commit,
    chain_of,
    check_incoming,
    commit_time,
    decode_manifest,
    dependants,
    encode_manifest,
    header_of,
    is_restorable,
    offered,
)
from diskd.errors import Damaged, Refused

CHAIN = points(manifest(1), manifest(2, 1), manifest(3, 2), manifest(4), manifest(5, 4))


def test_a_chain_goes_down_to_its_full():
    assert [m.point for m in chain_of(CHAIN, name(3))] == [name(3), name(2), name(1)]
    assert [m.point for m in chain_of(CHAIN, name(4))] == [name(4)]


def test_a_missing_base_is_damage_and_an_unknown_point_is_refused():
    torn = {point: m for point, m in CHAIN.items() if point != name(2)}
    with pytest.raises(Damaged, match=name(2)):
        chain_of(torn, name(3))
    with pytest.raises(Refused, match="no point"):
        chain_of(CHAIN, name(9))
    assert not is_restorable(torn, name(3))
    assert [p.point for p in offered(torn)] == [name(1), name(4), name(5)]


def test_a_circle_and_an_endless_chain_are_damage():
    circle = points(manifest(1, 2), manifest(2, 1))
    with pytest.raises(Damaged, match="circular"):
        chain_of(circle, name(1))
    assert len(by_commit(circle.values())) == 2
    long = points(manifest(0), *(manifest(n, n - 1, at="x") for n in range(1, CHAIN_MAX + 1)))
    with pytest.raises(Damaged, match="longer"):
        chain_of(long, name(CHAIN_MAX))
    header = attrs.evolve(header_of(manifest(CHAIN_MAX + 5, CHAIN_MAX - 1), config=""))
    with pytest.raises(Refused, match="synthesize"):
        check_incoming(header, long)


def test_a_disk_missing_below_is_damage():
    chain = points(manifest(1), manifest(2, 1, disks=("system", "journal")))
    with pytest.raises(Damaged, match="journal"):
        chain_of(chain, name(2))


def test_incoming_needs_a_base_with_the_same_disks():
    assert check_incoming(header_of(manifest(9), config=""), CHAIN) == []
    base = check_incoming(header_of(manifest(9, 3), config=""), CHAIN)
    assert [m.point for m in base] == [name(3), name(2), name(1)]
    with pytest.raises(Refused, match="--full"):
        check_incoming(header_of(manifest(9, 8), config=""), CHAIN)
    with pytest.raises(Refused, match="--full"):
        check_incoming(header_of(manifest(9, 3, disks=("other",)), config=""), CHAIN)


def test_incoming_needs_the_image_that_the_base_was_made_of():
    """Whatever the source believed: the changes of one image are no changes of another."""
    header = header_of(manifest(9, 3), config="")
    other = attrs.evolve(header, disks=[attrs.evolve(header.disks[0], image="another")])
    with pytest.raises(Refused, match=r"was the image system in rp-.* now it is another; .*--full"):
        check_incoming(other, CHAIN)


def test_commit_order_keeps_bases_first_within_one_second():
    same = points(manifest(1, at="t"), manifest(3, 2, at="t"), manifest(2, 1, at="t"))
    assert [m.point for m in by_commit(same.values())] == [name(1), name(2), name(3)]


def test_what_others_need_outlives_them():
    assert dependants(CHAIN, name(1)) == [name(2), name(3)]
    assert dependants(CHAIN, name(5)) == []


def test_a_manifest_round_trips():
    one = manifest(7, 3)
    assert decode_manifest(encode_manifest(one), vm="web", point=name(7)) == one


@pytest.mark.parametrize("where", ["point", "committed_at", "disks", "kind"])
def test_a_changed_manifest_is_damage(where):
    document = json.loads(encode_manifest(manifest(1)))
    document[where] = [] if where == "disks" else "other"
    with pytest.raises(Damaged, match="own digest"):
        decode_manifest(json.dumps(document).encode(), vm="web", point=name(1))


def test_a_manifest_of_another_point_is_damage():
    with pytest.raises(Damaged, match="another point"):
        decode_manifest(encode_manifest(manifest(1)), vm="web", point=name(2))
    with pytest.raises(Damaged, match="another point"):
        decode_manifest(encode_manifest(manifest(1)), vm="db", point=name(1))
    escaping = attrs.evolve(manifest(1), config=FileDigest("../../etc/passwd", 1, "cd"))
    with pytest.raises(Damaged, match="another point"):
        decode_manifest(encode_manifest(escaping), vm="web", point=name(1))


def test_every_flipped_bit_of_a_manifest_is_found():
    data = encode_manifest(manifest(1))
    for place in range(len(data) - 1):
        for bit in (0, 3, 5):
            bad = bytearray(data)
            bad[place] ^= 1 << bit
            try:
                same = decode_manifest(bytes(bad), vm="web", point=name(1)) == manifest(1)
            except Damaged:
                continue
            # White space between members carries nothing.
            assert same
            assert chr(data[place]).isspace()


@pytest.mark.parametrize("other", [{"version": 2}, {"format": "something-else"}, {"version": "1"}])
def test_a_manifest_of_another_version_is_refused_though_whole(other):
    document = {**json.loads(encode_manifest(manifest(1))), **other}
    del document["blake3"]
    whole = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    document["blake3"] = blake3(whole).hexdigest()
    with pytest.raises(Damaged, match="not a manifest of version 1"):
        decode_manifest(json.dumps(document).encode(), vm="web", point=name(1))


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b"[" * 100_000, b'{"a":NaN}'])
def test_garbage_is_damage(data):
    with pytest.raises(Damaged):
        decode_manifest(data, vm="web", point=name(1))


@pytest.mark.parametrize(
    "now", ["2025-01-01T00:00:00+00:00", "2026-01-01T00:00:05+00:00", "2026-07-01T00:00:00+00:00"]
)
def test_a_point_is_committed_after_every_earlier_one_whatever_the_clock_says(now):
    at = commit_time(now, CHAIN)
    newcomer = manifest(9, at=at)
    assert by_commit([newcomer, *CHAIN.values()])[-1] == newcomer
    again = manifest(8, at=commit_time(now, points(newcomer, *CHAIN.values())))
    assert [m.point for m in by_commit([again, newcomer])] == [name(9), name(8)]


def test_the_first_point_is_committed_now():
    assert commit_time("2026-01-01T00:00:00+00:00", {}) == "2026-01-01T00:00:00.000000+00:00"

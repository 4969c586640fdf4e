"""Copy plans against brute force, block by block; frames of a chain against a plain array."""

import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diskd.core.copy_plan import (
    QUERY_BYTES_MAX,
    SourceDisk,
    TargetPoint,
    choose_base,
    data_bytes,
    frames_of,
    plan_differential,
    plan_full,
    walk,
)
from diskd.core.frame_index import DiskFrames, resolve
from diskd.core.ports import Allocation
from diskd.core.stream import DATA_BYTES_MAX, FrameKind
from diskd.errors import NoSuchPoint, Refused

BLOCK = 4096
KIND = {"data": FrameKind.DATA, "zero": FrameKind.ZERO, "hole": FrameKind.HOLE}
kinds = st.sampled_from(["data", "zero", "hole"])


def query_of(blocks, *, answer_max=sys.maxsize):
    """Where there is more than an answer holds, it ends early."""

    def query(offset, length):
        return [
            Allocation(start, BLOCK, blocks[start // BLOCK])
            for start in range(offset, offset + length, BLOCK)
        ][:answer_max]

    return query


def extents_of(changed):
    extents = []
    for block in sorted(changed):
        if extents and sum(extents[-1]) == block * BLOCK:
            extents[-1] = (extents[-1][0], extents[-1][1] + BLOCK)
        else:
            extents.append((block * BLOCK, BLOCK))
    return extents


def covered(runs):
    return {block: run.kind for run in runs for block in range(run.offset // BLOCK, run.end // BLOCK)}


@given(st.lists(kinds, min_size=1, max_size=60), st.data())
def test_a_differential_sends_every_changed_block_once_by_its_kind(blocks, data):
    changed = data.draw(st.sets(st.integers(0, len(blocks) - 1)))
    runs = plan_differential(walk(extents_of(changed), query_of(blocks)))
    assert covered(runs) == {block: KIND[blocks[block]] for block in changed}
    assert data_bytes(runs) == sum(BLOCK for block in changed if blocks[block] == "data")
    for one, other in itertools.pairwise(runs):
        assert one.end < other.offset or (one.end == other.offset and one.kind is not other.kind)


@given(st.lists(kinds, min_size=1, max_size=60), st.integers(1, 60))
def test_a_full_sends_the_data_and_nothing_else(blocks, answer_max):
    runs = plan_full(walk([(0, len(blocks) * BLOCK)], query_of(blocks, answer_max=answer_max)))
    assert covered(runs) == {n: FrameKind.DATA for n, kind in enumerate(blocks) if kind == "data"}


@given(st.lists(st.tuples(st.integers(1, 3000), kinds), min_size=1, max_size=6))
def test_frames_end_at_their_borders(lengths):
    offset, allocations = 0, []
    for length, kind in lengths:
        allocations.append(Allocation(offset * BLOCK, length * BLOCK, kind))
        offset += length
    runs = plan_differential(allocations)
    frames = list(frames_of(runs))
    assert covered(frames) == covered(runs)
    for frame in frames:
        if frame.kind is FrameKind.DATA:
            assert frame.offset // DATA_BYTES_MAX == (frame.end - 1) // DATA_BYTES_MAX


def test_large_extents_are_asked_for_in_portions():
    asked = []

    def query(offset, length):
        asked.append((offset, length))
        return [Allocation(offset, length, "hole")]

    runs = plan_differential(walk([(0, 3 * QUERY_BYTES_MAX + 512)], query))
    assert [length for _, length in asked] == [QUERY_BYTES_MAX] * 3 + [512]
    assert [(run.offset, run.length) for run in runs] == [(0, 3 * QUERY_BYTES_MAX + 512)]


@pytest.mark.parametrize(
    "answer",
    [
        [],
        [Allocation(0, 512, "data")],
        [Allocation(512, 512, "data")],
        [Allocation(0, 0, "data"), Allocation(0, 1024, "data")],
        [Allocation(0, 2048, "data")],
    ],
)
def test_an_allocation_with_gaps_is_refused(answer):
    with pytest.raises(ValueError, match="allocation"):
        list(walk([(0, 1024)], lambda _offset, _length: answer))


POINTS = st.lists(st.sampled_from([f"rp-{n:016x}" for n in range(6)]), unique=True)


@given(POINTS, POINTS, POINTS)
def test_the_base_is_the_newest_point_that_both_sides_hold(at_target, system, journal):
    held = [TargetPoint(point, {"system": "a", "journal": "b"}) for point in at_target]
    source = {"system": SourceDisk("a", system), "journal": SourceDisk("b", journal)}
    common = [p for p in system if p in journal and p in at_target]
    if not at_target:
        assert choose_base("auto", None, at_target=held, at_source=source) is None
    elif not common:
        with pytest.raises(NoSuchPoint, match="--full"):
            choose_base("auto", None, at_target=held, at_source=source)
    else:
        assert choose_base("auto", None, at_target=held, at_source=source) == common[-1]
    assert choose_base("full", None, at_target=held, at_source=source) is None
    for point in {*at_target, *system, *journal}:
        if point in common:
            assert choose_base("since", point, at_target=held, at_source=source) == point
        else:
            with pytest.raises(NoSuchPoint, match="--full"):
                choose_base("since", point, at_target=held, at_source=source)


def test_a_disk_that_the_base_does_not_have_needs_a_full():
    point = "rp-" + "0" * 16
    held = [TargetPoint(point, {"system": "a"})]
    old, new = SourceDisk("a", [point]), SourceDisk("b", [point])
    with pytest.raises(NoSuchPoint, match="no disk new"):
        choose_base("since", point, at_target=held, at_source={"system": old, "new": new})
    with pytest.raises(NoSuchPoint, match="--full"):
        choose_base("auto", None, at_target=held, at_source={"system": old, "new": SourceDisk("b", [])})
    with pytest.raises(NoSuchPoint, match="was the image a, now it is b; take a full backup"):
        choose_base("since", point, at_target=held, at_source={"system": new})
    with pytest.raises(Refused):
        choose_base("since", None, at_target=held, at_source={})


@st.composite
def layers(draw):
    """A chain, newest first: (frames, size in sectors) per layer."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 40))
        cuts = sorted(draw(st.sets(st.integers(0, size), max_size=10)))
        frames = [
            (a * 512, (b - a) * 512, draw(st.sampled_from(list(FrameKind)[:3])))
            for a, b in zip(cuts[::2], cuts[1::2], strict=False)
        ]
        found.append((frames, size * 512))
    return found


@settings(max_examples=200)
@given(layers(), st.data())
def test_resolve_finds_the_newest_frame_of_every_sector(chain, data):
    size = chain[0][1]
    expected = np.full((size // 512, 2), -1)
    for depth, (frames, layer_size) in reversed(list(enumerate(chain))):
        expected[layer_size // 512 :] = -1  # nothing shows through from beyond a layer's end
        for number, (offset, length, _) in enumerate(frames):
            expected[offset // 512 : (offset + length) // 512] = (depth, number)
    indexed = [
        DiskFrames(
            layer_size,
            np.array([f[0] for f in frames], dtype=np.int64),
            np.array([f[1] for f in frames], dtype=np.int64),
            np.array([f[2] for f in frames], dtype=np.uint8),
            np.zeros((len(frames), 32), dtype=np.uint8),
        )
        for frames, layer_size in chain
    ]
    start = data.draw(st.integers(0, size // 512)) * 512
    length = data.draw(st.integers(0, (size - start) // 512)) * 512
    position = start
    for piece in resolve(indexed, start, length):
        assert piece.offset == position
        assert piece.length > 0
        for sector in range(piece.offset // 512, (piece.offset + piece.length) // 512):
            assert tuple(expected[sector]) == (piece.layer, piece.frame)
        position += piece.length
    assert position == start + length

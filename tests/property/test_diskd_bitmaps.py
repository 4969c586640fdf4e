"""Bitmap algebra and points against naive sets."""

import itertools
from uuid import UUID

from hypothesis import given, settings
from hypothesis import strategies as st

from diskd.core import extents, interval, points
from diskd.core.geometry import Geometry, Identity

BITS = 3 * 512 * 8
ranges = st.lists(
    st.tuples(st.integers(0, BITS - 1), st.integers(1, 600)).map(lambda r: (r[0], min(BITS, r[0] + r[1]))),
    max_size=12,
)


def bits_of(data: bytes) -> set[int]:
    return {index for index in range(8 * len(data)) if data[index >> 3] >> (index & 7) & 1}


def runs_of(blocks: set[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for block in sorted(blocks):
        if found and found[-1][1] == block:
            found[-1] = (found[-1][0], block + 1)
        else:
            found.append((block, block + 1))
    return found


def bitmap_of(spans: list[tuple[int, int]]) -> tuple[bytearray, set[int]]:
    data, model = bytearray(BITS // 8), set[int]()
    for first, end in spans:
        new = set(range(first, end)) - model
        assert extents.set_range(memoryview(data), first, end) == bool(new)
        model |= new
    return data, model


@given(ranges)
def test_set_range_sets_exactly_the_range_and_says_whether_anything_changed(spans) -> None:
    data, model = bitmap_of(spans)
    assert bits_of(data) == model


@given(st.integers(0, 100), st.integers(1, 300_000))
@settings(max_examples=30)
def test_set_range_over_many_bytes(first: int, length: int) -> None:
    data = bytearray(40_000)
    end = min(first + length, 8 * len(data))
    assert extents.set_range(memoryview(data), first, end)
    assert int.from_bytes(data, "little") == (1 << end) - (1 << first)
    assert not extents.set_range(memoryview(data), first, end)


@given(ranges)
def test_extents_are_the_runs_of_the_set(spans) -> None:
    data, model = bitmap_of(spans)
    pages = extents.page_map(data, 512)
    assert all(any(page) for page in pages.values())
    assert extents.count(pages) == len(model)
    size = BITS * 512 - 1000
    expected = [(a * 512, min(b * 512, size) - a * 512) for a, b in runs_of(model) if a * 512 < size]
    assert extents.extents(pages, 512, size) == expected


@given(ranges, ranges)
def test_unions(left, right) -> None:
    (one, first), (two, second) = bitmap_of(left), bitmap_of(right)
    pages = extents.page_map(one, 512)
    extents.union(pages, extents.page_map(two, 512))
    assert extents.count(pages) == len(first | second)
    extents.union_in_place(memoryview(one), memoryview(two))
    assert bits_of(one) == first | second
    assert extents.page_map(one, 512) == pages


@given(ranges)
def test_intervals_round_trip(spans) -> None:
    identity = Identity(UUID(int=1), Geometry.check(BITS * 512, 512, 4096, 512))
    pages = extents.page_map(bitmap_of(spans)[0], 512)
    data = interval.encode(identity, UUID(int=2), 9, pages, through=9)
    assert len(data) <= interval.size_bytes_max(identity)
    assert interval.decode(identity, UUID(int=2), points.Segment(9, 0, 9), data) == pages


@given(st.binary(max_size=400))
def test_random_bytes_are_refused_as_damage_only(data: bytes) -> None:
    from diskd.errors import Damaged

    identity = Identity(UUID(int=1), Geometry.check(BITS * 512, 512, 4096, 512))
    for decode in (
        lambda: interval.decode(identity, UUID(int=2), points.Segment(9, 0, 9), data),
        lambda: points.decode_catalogue(identity, data),
    ):
        try:
            decode()
        except Damaged:
            continue
        raise AssertionError("random bytes were believed")


class Model:
    """Every write since every point, by brute force."""

    def __init__(self) -> None:
        self.catalogue = points.empty(UUID(int=3))
        self.segments: dict[int, set[int]] = {}
        self.active: set[int] = set()
        self.since: dict[str, set[int]] = {}
        self.numbers = itertools.count(1)

    def write(self, block: int) -> None:
        self.active.add(block)
        for changed in self.since.values():
            changed.add(block)

    def cut(self) -> None:
        name = f"rp-{next(self.numbers):016x}"
        self.segments[self.catalogue.active] = self.active
        self.active = set()
        self.catalogue = points.validate(points.cut(self.catalogue, name, 4096, 0), name)
        self.since[name] = set()

    def delete(self, index: int) -> None:
        if self.since:
            name = sorted(self.since)[index % len(self.since)]
            del self.since[name]
            self.catalogue = points.delete(self.catalogue, name)

    def join(self) -> None:
        pair = points.joinable(self.catalogue)
        if pair is not None:
            left, right = pair
            self.segments[left.interval] |= self.segments.pop(right.interval)
            self.catalogue = points.joined(self.catalogue, left, right)


@given(
    st.lists(st.one_of(st.integers(0, 30), st.sampled_from(["cut", "join"]), st.tuples(st.integers(0, 9))))
)
def test_points_answer_what_was_written_since(actions) -> None:
    model = Model()
    for action in actions:
        if action == "cut":
            model.cut()
        elif action == "join":
            model.join()
        elif isinstance(action, tuple):
            model.delete(action[0])
        else:
            model.write(action)
        for name, changed in model.since.items():
            span = points.span(model.catalogue, name)
            found = set(model.active)
            for segment in span.segments:
                found |= model.segments[segment.interval]
            assert found == changed
        assert len(model.catalogue.segments) <= max(0, len(model.since) * 2 + 20)
    while points.joinable(model.catalogue):
        model.join()
    assert len(model.catalogue.segments) <= len(model.since)

"""Frames taken a buffer at a time are the frames taken one by one: same frames, refusals and digests."""

import random
from itertools import pairwise

import numpy as np
import pytest
from blake3 import blake3
from diskd_target import interleaved
from hypothesis import given, settings
from hypothesis import strategies as st

from diskd.core.stream import (
    DATA_BYTES_MAX,
    FRAME,
    STORED,
    DiskHeader,
    ExportHeader,
    Frame,
    FrameHeader,
    FrameKind,
    StreamDecoder,
    StreamEncoder,
    StreamError,
    Trailer,
)
from diskd.core.stream_frames import INFLATED_BYTES_MAX, FrameOrder, scan
from diskd.core.stream_zstd import Compressor, Decompressor

INFLATE = Decompressor().decompress
SECTOR = 512
SIZES = [64 * SECTOR, 40 * SECTOR, 2**30]
HEAD = ExportHeader(
    "web",
    "rp-" + "0" * 16,
    None,
    "full",
    "crash",
    "",
    [DiskHeader(name, name, size, 4096, 65536, 0, True, 0) for name, size in zip("abc", SIZES, strict=True)],
)


def header_of(kind, disk, number, offset, length, digest=bytes(32)):
    return FRAME.pack(kind, 0, disk, number, offset, length, digest)


@st.composite
def streams(draw, frames_max=40):
    """A good export: frames of three disks in any order among each other, some of them compressed."""
    encoder, compressor = StreamEncoder(HEAD), Compressor(1)
    parts = [[], [], []]
    for disk in range(3):
        cuts = sorted(draw(st.sets(st.integers(0, 40), max_size=frames_max)))
        for first, last in pairwise(cuts):
            kind = draw(st.sampled_from([FrameKind.DATA, FrameKind.ZERO, FrameKind.HOLE]))
            data = bytes([draw(st.integers(0, 255))]) * ((last - first) * SECTOR)
            is_data = kind is FrameKind.DATA
            packed = encoder.frame(kind, disk, first * SECTOR, len(data), data if is_data else None)
            stored = compressor.compress(data) if is_data and draw(st.booleans()) else None
            if stored is not None:
                packed, data = bytes([FrameKind.ZSTD]) + packed[1:] + STORED.pack(len(stored)), stored
            parts[disk].append(packed + data if is_data else packed)
    chance = random.Random(draw(st.integers(0, 1 << 30)))
    return b"".join([encoder.opening, *interleaved(parts, chance), encoder.finish()])


def one_by_one(stream):
    decoder, events = StreamDecoder(), []
    decoder.feed(stream)
    while (event := decoder.next_event()) is not None:
        if isinstance(event, Frame):
            event.check()
        events.append(event)
    decoder.finish()
    return events


def in_batches(stream, portions):
    """As the target does it: the header first, then whole frames out of a buffer that is refilled."""
    decoder, position = StreamDecoder(), 0
    while (head := decoder.next_event()) is None:
        if position >= len(stream):
            decoder.finish()
        decoder.feed(stream[position : position + 7])
        position += 7
    events, pending = [head], decoder.take_rest()
    portions = iter(portions)
    while True:
        batch, rows = decoder.batch(memoryview(pending))
        batch.check_data(rows, INFLATE)
        for number in range(len(batch)):
            kind, _, *rest = FRAME.unpack_from(batch.packed, number * FRAME.size)
            data = bytes(batch.payload(number, rest[3])) if kind == FrameKind.DATA else b""
            events.append(Frame(FrameHeader(FrameKind(kind), *rest), data))
        pending = pending[batch.used :]
        if pending and pending[0] not in (1, 2, 3, 4):
            decoder.feed(pending + stream[position:])
            event = decoder.next_event()
            decoder.finish()
            return [*events, event]
        if position >= len(stream):
            raise StreamError("the stream ends before its trailer: it is not complete")
        step = next(portions, 4096)
        pending += stream[position : position + step]
        position += step


@settings(deadline=None, max_examples=60)
@given(streams(), st.lists(st.integers(1, 30000), max_size=30))
def test_batches_hold_what_the_stream_holds(stream, portions):
    events = one_by_one(stream)
    assert in_batches(stream, portions) == events
    assert isinstance(events[-1], Trailer)


@settings(deadline=None, max_examples=150)
@given(streams(frames_max=20), st.data())
def test_one_flipped_bit_is_found_in_batches_too(stream, data):
    damaged = bytearray(stream)
    damaged[data.draw(st.integers(0, len(stream) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the same one as the plain reader's, whichever that is
        one_by_one(bytes(damaged))
    with pytest.raises((StreamError, type(caught.value))):
        in_batches(bytes(damaged), [])


integers = st.integers(0, 66).map(lambda n: n * SECTOR) | st.sampled_from(
    [1, 2**30, 2**40, 2**63, 2**64 - 512]
)
rows_of_headers = st.lists(
    st.tuples(
        st.sampled_from([1, 1, 2, 3, 4, 9]),
        st.sampled_from([0, 0, 0, 1]),
        st.integers(0, 3),
        st.sampled_from([0, 0, 0, 1]),
        integers,
        integers | st.just(DATA_BYTES_MAX + SECTOR),
        st.sampled_from([0, 0, 1]),
    ),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=400)
@given(rows_of_headers, st.integers(0, 20))
def test_both_speeds_refuse_the_same(rows, before):
    """``before`` good frames of each disk in front decide which of the two ways a batch is checked in."""
    quick, slow = FrameOrder(b"x", SIZES), FrameOrder(b"x", SIZES)
    parts = [header_of(3, disk, n, n * SECTOR, SECTOR) for n in range(before) for disk in range(3)]
    counts = [before] * 4
    for kind, reserved, disk, skew, offset, length, digest in rows:
        parts.append(
            FRAME.pack(kind, reserved, disk, counts[disk] + skew, offset, length, bytes([digest]) * 32)
        )
        counts[disk] += 1
    packed = b"".join(parts)

    def take_slowly():
        for start in range(0, len(packed), FRAME.size):
            slow.take_rows(packed[start : start + FRAME.size])

    try:
        take_slowly()
    except StreamError:
        with pytest.raises(StreamError):
            quick.take_rows(packed)
    else:
        quick.take_rows(packed)
        assert quick.trailer() == slow.trailer()


def test_a_payload_larger_than_any_buffer_is_refused_before_it_comes():
    with pytest.raises(StreamError, match="too long"):
        scan(memoryview(header_of(1, 0, 0, 0, DATA_BYTES_MAX + SECTOR)))


def test_the_numbers_of_a_batch_go_on_where_the_last_one_ended():
    order = FrameOrder(b"x", [2**30])
    many = b"".join(header_of(2, 0, n, n * SECTOR, SECTOR) for n in range(100))
    order.take_rows(many)
    again = b"".join(header_of(2, 0, n, (100 + n) * SECTOR, SECTOR) for n in range(100))
    with pytest.raises(StreamError):
        order.take_rows(again)
    assert np.array_equal(order.trailer().frames, 100)
    assert order.trailer().disk_digests == [blake3(many).digest()]


def test_headers_that_end_in_the_middle_are_refused():
    with pytest.raises(StreamError, match="in the middle"):
        FrameOrder(b"x", [2**30]).take_rows(header_of(2, 0, 0, 0, SECTOR) + b"x")


def test_a_small_buffer_of_compressed_frames_is_not_inflated_at_once():
    """Ten thousand of them fit a buffer of the target; what it holds at once is bounded all the same."""
    data = bytes([7]) * DATA_BYTES_MAX
    stored, digest = Compressor(3).compress(data), blake3(data).digest()
    count = 40
    frames = b"".join(
        bytes([FrameKind.ZSTD])
        + header_of(1, 2, n, n * DATA_BYTES_MAX, DATA_BYTES_MAX, digest)[1:]
        + STORED.pack(len(stored))
        + stored
        for n in range(count)
    )
    assert len(frames) < 10000
    order, taken = FrameOrder(b"x", SIZES), 0
    while frames:
        batch = scan(memoryview(frames))
        assert len(batch) * DATA_BYTES_MAX <= INFLATED_BYTES_MAX
        rows = order.take_rows(batch.packed)
        batch.check_data(rows, INFLATE)
        assert batch.payload(0, DATA_BYTES_MAX) == data
        taken += len(batch)
        frames = frames[batch.used :]
    assert taken == count
    assert order.trailer().data_bytes == count * DATA_BYTES_MAX

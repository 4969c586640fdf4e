"""Frames taken a buffer at a time are the frames taken one by one: same frames, refusals and digests."""

from itertools import pairwise

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from diskd.core.stream import (
    DATA_BYTES_MAX,
    FRAME,
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
from diskd.core.stream_frames import FrameOrder, scan

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
    """A good export, as (bytes, events)."""
    encoder = StreamEncoder(HEAD)
    parts = [encoder.opening]
    for disk in range(3):
        cuts = sorted(draw(st.sets(st.integers(0, 40), max_size=frames_max)))
        for first, last in pairwise(cuts):
            kind = draw(st.sampled_from([FrameKind.DATA, FrameKind.ZERO, FrameKind.HOLE]))
            data = bytes([draw(st.integers(0, 255))]) * ((last - first) * SECTOR)
            is_data = kind is FrameKind.DATA
            parts.append(encoder.frame(kind, disk, first * SECTOR, len(data), data if is_data else None))
            parts += [data] if is_data else []
    return b"".join([*parts, encoder.finish()])


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
        batch.check_data(rows)
        for number in range(len(batch)):
            kind, _, *rest = FRAME.unpack_from(batch.packed, number * FRAME.size)
            data = bytes(batch.payload(number, rest[3])) if kind == FrameKind.DATA else b""
            events.append(Frame(FrameHeader(FrameKind(kind), *rest), data))
        pending = pending[batch.used :]
        if pending and pending[0] not in (1, 2, 3):
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
        st.sampled_from([1, 1, 2, 3, 9]),
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
    """``before`` good frames in front decide which of the two ways a batch is checked in."""
    quick, slow = FrameOrder(b"x", SIZES), FrameOrder(b"x", SIZES)
    good = b"".join(header_of(3, 0, n, 0 if n == 0 else n * SECTOR, SECTOR) for n in range(before))
    packed = good + b"".join(
        FRAME.pack(kind, reserved, disk, before + n + skew, offset, length, bytes([digest]) * 32)
        for n, (kind, reserved, disk, skew, offset, length, digest) in enumerate(rows)
    )

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
    assert order.trailer().digest == blake3(b"x" + many).digest()

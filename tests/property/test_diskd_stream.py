"""The export stream: whole = byte by byte, decode of encode is the same, garbage raises only our errors."""

import attrs
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from diskd.core.frame_index import parse_index
from diskd.core.stream import (
    FRAME,
    Ack,
    Committed,
    DiskHeader,
    ExportHeader,
    Frame,
    FrameKind,
    Ready,
    RefusedReply,
    StreamAborted,
    StreamDecoder,
    StreamEncoder,
    StreamError,
    Trailer,
    Working,
    abort,
    decode_reply,
    encode_reply,
)
from diskd.errors import Damaged

SECTOR = 512
KINDS = [FrameKind.DATA, FrameKind.ZERO, FrameKind.HOLE]


def disk(name="system", size=64 * SECTOR):
    return DiskHeader(name, name, size, 4096, 65536, 0, True, 0)


def header(disks):
    return ExportHeader("web", "rp-" + "0" * 16, None, "full", "crash", "name = 'web'\n", disks)


@st.composite
def exports(draw):
    """(header, [(kind, disk, offset, data or length)])."""
    names = draw(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3, unique=True))
    frames = []
    for number, _ in enumerate(names):
        cuts = sorted(draw(st.sets(st.integers(0, 64), max_size=8)))
        for first, last in zip(cuts[::2], cuts[1::2], strict=False):
            kind = draw(st.sampled_from(KINDS))
            fill = draw(st.integers(0, 255))
            frames.append((kind, number, first * SECTOR, bytes([fill]) * ((last - first) * SECTOR)))
    return header([disk(name) for name in names]), frames


def encode_export(head, frames, *, payloads=True):
    encoder = StreamEncoder(head)
    parts = [encoder.opening]
    for kind, number, offset, data in frames:
        is_data = kind is FrameKind.DATA
        parts.append(encoder.frame(kind, number, offset, len(data), data if is_data else None))
        if is_data and payloads:
            parts.append(data)
    parts.append(encoder.finish())
    return b"".join(parts), encoder.summary()


def decode_all(data, portion, *, payloads=True):
    decoder, events = StreamDecoder(payloads=payloads), []
    for start in range(0, len(data), portion):
        decoder.feed(data[start : start + portion])
        while (event := decoder.next_event()) is not None:
            events.append(event)
    decoder.finish()
    return events


@settings(deadline=None, max_examples=50)
@given(exports(), st.integers(1, 5000))
def test_whole_equals_any_portions(export, portion):
    head, frames = export
    data, summary = encode_export(head, frames)
    events = decode_all(data, len(data))
    assert decode_all(data, portion) == events
    assert events[0] == head
    assert events[-1] == summary
    got = [(event.header.kind, event.header.disk, event.header.offset) for event in events[1:-1]]
    assert got == [(kind, number, offset) for kind, number, offset, _ in frames]
    for event, (kind, _, _, content) in zip(events[1:-1], frames, strict=True):
        event.check()
        assert event.data == (content if kind is FrameKind.DATA else b"")


@settings(deadline=None, max_examples=10)
@given(exports())
def test_byte_by_byte(export):
    head, frames = export
    small = [(kind, number, offset, data[:SECTOR]) for kind, number, offset, data in frames[:2]]
    data, _ = encode_export(head, small)
    assert decode_all(data, 1) == decode_all(data, len(data))


@settings(deadline=None, max_examples=50)
@given(exports())
def test_an_index_is_the_stream_without_its_data(export):
    head, frames = export
    _, summary = encode_export(head, frames)
    data, _ = encode_export(head, frames, payloads=False)
    events = decode_all(data, 333, payloads=False)
    assert events[-1] == summary
    # The parser that takes all at once finds the same.
    index = parse_index(data)
    assert (index.header, index.trailer) == (head, summary)
    for number, disk in enumerate(head.disks):
        mine = [event.header for event in events[1:-1] if event.header.disk == number]
        found = [index.disks[disk.name].header(place) for place in range(len(index.disks[disk.name]))]
        assert found == [attrs.evolve(one, disk=0, number=place) for place, one in enumerate(mine)]


@settings(deadline=None, max_examples=150)
@given(exports(), st.data())
def test_a_damaged_index_is_always_found(export, data):
    index, _ = encode_export(*export, payloads=False)
    where = data.draw(st.integers(0, len(index) - 1))
    damaged = bytearray(index)
    damaged[where] ^= 1 << data.draw(st.integers(0, 7))
    for bad in (bytes(damaged), index[:where], index + bytes(56), index + b"x"):
        with pytest.raises(Damaged):
            parse_index(bad)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_an_index_that_breaks_the_rules_is_refused_though_its_digests_match(data):
    """The two parsers agree on what is allowed: whoever could forge digests gains nothing."""
    head = header([disk("a"), disk("b")])
    integers = st.integers(0, 66).map(lambda n: n * SECTOR) | st.sampled_from(
        [1, 2**40, 2**63, 2**64 - SECTOR]
    )
    rows = data.draw(
        st.lists(
            st.tuples(st.sampled_from([1, 2, 3, 9]), st.integers(0, 2), integers, integers, st.booleans()),
            max_size=3,
        )
    )
    opening = StreamEncoder(head).opening
    packed = [
        FRAME.pack(kind, 0, where, number, offset, length, bytes([digest]) * 32)
        for number, (kind, where, offset, length, digest) in enumerate(rows)
    ]
    body = opening + b"".join(packed)
    total = sum(length for kind, _, _, length, _ in rows if kind == 1) % 2**64
    forged = body + FRAME.pack(255, 0, 0, len(rows), total, 0, blake3(body).digest())
    try:
        decode_all(forged, 4096, payloads=False)
    except StreamError:
        with pytest.raises(Damaged):
            parse_index(forged)
    else:
        assert len(parse_index(forged).disks) == 2


@settings(deadline=None, max_examples=100)
@given(exports(), st.data())
def test_one_flipped_bit_is_always_found(export, data):
    head, frames = export
    stream, _ = encode_export(head, frames)
    where = data.draw(st.integers(0, len(stream) - 1))
    damaged = bytearray(stream)
    damaged[where] ^= 1 << data.draw(st.integers(0, 7))

    def consume():
        for event in decode_all(bytes(damaged), 4096):
            if isinstance(event, Frame):
                event.check()

    with pytest.raises((StreamError, StreamAborted)):
        consume()


@settings(deadline=None, max_examples=50)
@given(exports(), st.data())
def test_a_truncated_stream_is_never_complete(export, data):
    head, frames = export
    stream, _ = encode_export(head, frames)
    end = data.draw(st.integers(0, len(stream) - 1))
    with pytest.raises(StreamError, match="not complete"):
        decode_all(stream[:end], 4096)


@given(st.binary(max_size=300), st.integers(1, 64))
def test_garbage_raises_only_our_errors(data, portion):
    with pytest.raises((StreamError, StreamAborted)):
        decode_all(data, portion)


@given(st.binary(max_size=100))
def test_garbage_replies_raise_only_our_errors(data):
    try:
        decode_reply(data)
    except StreamError:
        return


@pytest.mark.parametrize(
    "reply", [Ready(1), Ack(3, 2), Working(), Committed("rp-1", "ab"), RefusedReply("no")]
)
def test_replies_round_trip(reply):
    assert decode_reply(encode_reply(reply)) == reply


def test_an_abort_carries_the_reason():
    data, _ = encode_export(header([disk()]), [])
    decoder = StreamDecoder()
    decoder.feed(data[:-56] + abort("the disk is on fire"))
    assert isinstance(decoder.next_event(), ExportHeader)
    with pytest.raises(StreamAborted, match="on fire"):
        decoder.next_event()


def frame(encoder, offset, length=SECTOR, number=0):
    return encoder.frame(FrameKind.ZERO, number, offset, length)


@pytest.mark.parametrize(
    ("offsets", "reason"),
    [
        ([(0, 512), (0, 512)], "out of order"),
        ([(1024, 1024), (1536, 512)], "out of order"),
        ([(64 * SECTOR, 512)], "outside"),
        ([(0, 65 * SECTOR)], "outside"),
        ([(1, 512)], "whole sectors"),
        ([(0, 0)], "out of order"),
    ],
)
def test_frames_out_of_order_or_bounds_are_refused(offsets, reason):
    encoder = StreamEncoder(header([disk()]))

    def write():
        for offset, length in offsets:
            frame(encoder, offset, length)

    with pytest.raises(StreamError, match=reason):
        write()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vm": "../etc"}, "name"),
        ({"vm": "web/.."}, "name"),
        ({"point": "rp-1"}, "point"),
        ({"point": "../../../etc/passwd"}, "point"),
        ({"base": "rp-" + "1" * 16}, "base"),
        ({"kind": "differential"}, "base"),
        ({"disks": []}, "1 to"),
        ({"disks": [disk(), disk()]}, "one name"),
        ({"disks": [disk("..")]}, "name"),
        ({"disks": [disk(size=1000)]}, "multiple"),
        ({"disks": [disk(size=0)]}, "multiple"),
        ({"disks": [disk(size=1 << 60)]}, "multiple"),
        ({"config": "x" * (300 << 10)}, "too long"),
    ],
)
def test_impossible_headers_are_refused(change, reason):
    import attrs

    with pytest.raises(StreamError, match=reason):
        StreamEncoder(attrs.evolve(header([disk()]), **change))


def test_trailer_type():
    assert isinstance(encode_export(header([disk()]), [])[1], Trailer)

"""The export stream: whole = byte by byte, decode of encode is the same, garbage raises only our errors.

The frames of different disks come in any order, compressed or not; nothing but the order of what is read, and
the bytes on the wire, is different for that.
"""

import os
import random
import struct

import attrs
import pytest
import zstandard
from blake3 import blake3
from diskd_target import interleaved
from hypothesis import given, settings
from hypothesis import strategies as st

from diskd.core.frame_index import parse_index
from diskd.core.stream import (
    FRAME,
    STORED,
    Ack,
    Committed,
    DiskHeader,
    ExportHeader,
    Frame,
    FrameHeader,
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
from diskd.core.stream_zstd import Compressor, Decompressor
from diskd.errors import Damaged

SECTOR = 512
KINDS = [FrameKind.DATA, FrameKind.ZERO, FrameKind.HOLE]


def disk(name="system", size=64 * SECTOR):
    return DiskHeader(name, name, size, 4096, 65536, 0, True, 0)


def header(disks):
    return ExportHeader("web", "rp-" + "0" * 16, None, "full", "crash", "name = 'web'\n", disks)


@st.composite
def exports(draw):
    """(header, [(kind, disk, offset, data or length)]), the disks' frames in any order among each other."""
    names = draw(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3, unique=True))
    frames = []
    for number, _ in enumerate(names):
        cuts = sorted(draw(st.sets(st.integers(0, 64), max_size=8)))
        for first, last in zip(cuts[::2], cuts[1::2], strict=False):
            kind = draw(st.sampled_from(KINDS))
            fill = draw(st.integers(0, 255))
            frames.append((kind, number, first * SECTOR, bytes([fill]) * ((last - first) * SECTOR)))
    parts = [[frame for frame in frames if frame[1] == number] for number in range(len(names))]
    chance = random.Random(draw(st.integers(0, 1 << 30)))
    return header([disk(name) for name in names]), list(interleaved(parts, chance))


def grouped(frames):
    """As an index has them."""
    return sorted(frames, key=lambda frame: frame[1])


def zstd_frame(packed, stored):
    """A compressed frame, of a data frame's header."""
    return bytes([FrameKind.ZSTD]) + packed[1:] + STORED.pack(len(stored)) + stored


def encode_export(head, frames, *, payloads=True, packs=None):
    """(bytes, summary). ``packs``: which data frames are compressed, as far as that makes them shorter."""
    encoder = StreamEncoder(head)
    parts, compressor = [encoder.opening], Compressor(1)
    for kind, number, offset, data in frames:
        is_data = kind is FrameKind.DATA
        packed = encoder.frame(kind, number, offset, len(data), data if is_data else None)
        stored = compressor.compress(data) if packs is not None and is_data and packs() else None
        if stored is not None:
            parts.append(zstd_frame(packed, stored))
            continue
        parts.append(packed)
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


@settings(deadline=None, max_examples=20)
@given(exports(), st.booleans())
def test_byte_by_byte(export, is_packed):
    head, frames = export
    small = [(kind, number, offset, data[:SECTOR]) for kind, number, offset, data in frames[:2]]
    data, _ = encode_export(head, small, packs=(lambda: True) if is_packed else None)
    assert decode_all(data, 1) == decode_all(data, len(data))


@settings(deadline=None, max_examples=50)
@given(exports(), st.randoms(use_true_random=False), st.integers(1, 5000))
def test_compressed_frames_are_the_frames_that_they_stand_for(export, chance, portion):
    plain, summary = encode_export(*export)
    packed, again = encode_export(*export, packs=lambda: chance.random() < 0.7)
    assert again == summary
    assert decode_all(packed, portion) == decode_all(plain, len(plain))


@settings(deadline=None, max_examples=50)
@given(exports())
def test_the_digests_are_those_of_the_disks_whatever_the_order_of_their_frames(export):
    """Told the simple way: BLAKE3 over headers, disk by disk, then over what the disks amount to."""
    head, frames = export
    data, summary = encode_export(head, frames)
    assert encode_export(head, grouped(frames))[1] == summary
    whole = blake3(StreamEncoder(head).opening)
    for number in range(len(head.disks)):
        mine = [(kind, offset, content) for kind, at, offset, content in frames if at == number]
        headers = b"".join(
            FRAME.pack(
                kind,
                0,
                number,
                place,
                offset,
                len(content),
                blake3(content).digest() if kind is FrameKind.DATA else bytes(32),
            )
            for place, (kind, offset, content) in enumerate(mine)
        )
        assert summary.disk_digests[number] == blake3(headers).digest()
        sent = sum(len(content) for kind, _, content in mine if kind is FrameKind.DATA)
        whole.update(struct.pack(">QQ", len(mine), sent) + blake3(headers).digest())
    assert summary.digest == whole.digest()
    assert data[-FRAME.size :] == summary.pack()


@settings(deadline=None, max_examples=50)
@given(exports())
def test_an_index_is_the_stream_without_its_data(export):
    head, frames = export
    _, summary = encode_export(head, frames)
    data, _ = encode_export(head, grouped(frames), payloads=False)
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
    index, _ = encode_export(export[0], grouped(export[1]), payloads=False)
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
            st.tuples(
                st.sampled_from([1, 2, 3, 4, 9]),
                st.integers(0, 2),
                st.sampled_from([0, 0, 0, 1]),
                integers,
                integers,
                st.booleans(),
            ),
            max_size=4,
        )
    )
    rows.sort(key=lambda row: row[1])
    opening = StreamEncoder(head).opening
    packed = {0: [], 1: [], 2: []}
    for kind, where, skew, offset, length, digest in rows:
        number = len(packed[where]) + skew
        packed[where].append(FRAME.pack(kind, 0, where, number, offset, length, bytes([digest]) * 32))
    whole, total = blake3(opening), 0
    for where in (0, 1):
        mine = sum(length for kind, at, _, _, length, _ in rows if kind == 1 and at == where) % 2**64
        headers = b"".join(packed[where])
        whole.update(struct.pack(">QQ", len(packed[where]), mine) + blake3(headers).digest())
        total += mine
    end = FRAME.pack(255, 0, 0, len(rows), total % 2**64, 0, whole.digest())
    forged = opening + b"".join(header for where in packed for header in packed[where]) + end
    try:
        decode_all(forged, 4096, payloads=False)
    except StreamError:
        with pytest.raises(Damaged):
            parse_index(forged)
    else:
        assert len(parse_index(forged).disks) == 2


def test_an_index_whose_disks_are_mixed_is_no_index():
    """Its digests are those of a good one, but its readers look a disk's frames up in one place."""
    head = header([disk("a"), disk("b")])
    frames = [(FrameKind.HOLE, number, 0, bytes(SECTOR)) for number in (0, 1)]
    frames += [(FrameKind.HOLE, number, SECTOR, bytes(SECTOR)) for number in (0, 1)]
    mixed, summary = encode_export(head, frames, payloads=False)
    assert decode_all(mixed, 99, payloads=False)[-1] == summary
    with pytest.raises(Damaged, match="one disk after the other"):
        parse_index(mixed)
    assert parse_index(encode_export(head, grouped(frames), payloads=False)[0]).trailer == summary


@settings(deadline=None, max_examples=150)
@given(exports(), st.data())
def test_one_flipped_bit_is_always_found(export, data):
    head, frames = export
    stream, _ = encode_export(head, frames, packs=(lambda: True) if data.draw(st.booleans()) else None)
    where = data.draw(st.integers(0, len(stream) - 1))
    damaged = bytearray(stream)
    damaged[where] ^= 1 << data.draw(st.integers(0, 7))

    def consume():
        for event in decode_all(bytes(damaged), 4096):
            if isinstance(event, Frame):
                event.check()

    # In a compressed frame zstd's own header has bits that mean nothing: then nothing is different.
    try:
        consume()
    except (StreamError, StreamAborted):
        return
    assert decode_all(bytes(damaged), 4096) == decode_all(stream, 4096)
    assert FrameKind.ZSTD in {kind for kind, *_ in raw_frames(stream)}


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


def raw_frames(stream):
    """The headers as they are on the wire."""
    decoder = StreamDecoder()
    decoder.feed(stream)
    decoder.next_event()
    at = len(decoder.opening)
    while True:
        kind, _, _, _, _, length, _ = found = FRAME.unpack_from(stream, at)
        yield found
        if kind == FrameKind.END:
            return
        at += FRAME.size
        if kind == FrameKind.ZSTD:
            at += STORED.size + STORED.unpack_from(stream, at)[0]
        elif kind == FrameKind.DATA:
            at += length


def one_zstd_frame(stored, length=4096, told=None):
    """A stream that begins with one compressed frame, and what it is of."""
    encoder = StreamEncoder(header([disk(size=4 << 20)]))
    head = FrameHeader(FrameKind.DATA, 0, 0, 0, length, bytes(32)).pack()
    size = STORED.pack(len(stored) if told is None else told)
    return encoder.opening + bytes([FrameKind.ZSTD]) + head[1:] + size + stored


def zstd(data, **options):
    return zstandard.ZstdCompressor(level=3, **options).compress(data)


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        (zstd(bytes(8 << 20)), "says that it holds 8388608 bytes where 4096 are due"),
        (zstd(bytes(4097)), "says that it holds 4097"),
        (zstd(bytes(4095)), "says that it holds 4095"),
        (zstd(bytes(4096), write_content_size=False), "says that it holds -1"),
        (zstd(bytes(4096))[:-1], "cannot be decompressed"),
        (zstd(bytes(4096)) + b"x", "cannot be decompressed"),
        (zstd(bytes(4096)) * 2, "cannot be decompressed"),
        (b"\x28\xb5\x2f\xfd\x60\x00\x0f\x01\x00\x00", "holds 0 bytes|cannot be decompressed"),
        (b"no zstd frame at all", "cannot be decompressed"),
        (b"x" * 4096, "a compressed frame of 4096 bytes for 4096"),
        (b"", "a compressed frame of 0 bytes"),
    ],
)
def test_a_compressed_frame_that_is_not_what_it_says_is_refused(stored, reason):
    decoder = StreamDecoder()
    decoder.feed(one_zstd_frame(stored))
    assert isinstance(decoder.next_event(), ExportHeader)
    with pytest.raises(StreamError, match=reason):
        decoder.next_event()


def test_a_compressed_frame_is_refused_before_it_is_there():
    """By its header, so that nothing is gathered for it."""
    for length, told in ((4096, 1 << 31), (4096, 4096), (2 << 20, 100)):
        decoder = StreamDecoder()
        decoder.feed(one_zstd_frame(b"", length, told))
        decoder.next_event()
        with pytest.raises(StreamError):
            decoder.next_event()


@pytest.mark.parametrize("options", [{"payloads": False}, {"zstd": False}])
def test_compressed_frames_are_refused_by_who_did_not_ask_for_them(options):
    decoder = StreamDecoder(**options)
    decoder.feed(one_zstd_frame(zstd(bytes(4096))))
    decoder.next_event()
    with pytest.raises(StreamError, match="which nobody asked for"):
        decoder.next_event()


@given(st.binary(max_size=200), st.integers(1, 1 << 20))
def test_decompressing_garbage_raises_only_our_errors(data, length):
    with pytest.raises(StreamError):
        Decompressor().decompress(data, length)


@pytest.mark.parametrize("level", [1, 3, 19])
def test_what_does_not_shrink_is_not_compressed(level):
    compressor = Compressor(level)
    assert compressor.compress(os.urandom(4096)) is None
    stored = compressor.compress(memoryview(b"holdfast" * 1000))
    assert stored is not None
    assert Decompressor().decompress(stored, 8000) == b"holdfast" * 1000


def test_an_older_version_is_refused_with_what_to_do():
    decoder = StreamDecoder()
    decoder.feed(struct.pack(">8sII", b"HFEXPORT", 1, 100))
    with pytest.raises(StreamError, match="version 1 is not known here, only 2; make the export anew"):
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

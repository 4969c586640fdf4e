"""Which foreign disk files are believed, and which are not let near qemu-img (core/foreign.py)."""

import contextlib
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemonkit.errors import ProtocolError
from diskd.core import foreign, import_stream
from diskd.core.import_stream import Answer
from diskd.errors import Refused


def qcow2(*, version=3, backing=(0, 0), crypt=0, features=0) -> bytes:
    head = struct.pack(">4sIQIIQI", b"QFI\xfb", version, *backing, 16, 1 << 30, crypt)
    return (head + bytes(72 - len(head)) + struct.pack(">Q", features)).ljust(512, b"\0")


def vmdk(capacity: int) -> bytes:
    return struct.pack("<4sIIQ", b"KDMV", 1, 3, capacity).ljust(512, b"\0")


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (qcow2(), "qcow2"),
        (qcow2(version=2, features=1 << 2), "qcow2"),  # version 2 has no such field
        (vmdk(2048), "vmdk"),
        (b"vhdxfile" + bytes(504), "vhdx"),
        (bytes(0x40) + b"\x7f\x10\xda\xbe" + bytes(400), "vdi"),
        (bytes(512), "raw"),
        (b"", "raw"),
        (b"\xeb\x63\x90" + bytes(509), "raw"),
    ],
)
def test_the_first_bytes_tell_the_format(head, kind):
    assert foreign.identify(head) == kind


@pytest.mark.parametrize(
    ("head", "why"),
    [
        (qcow2(backing=(512, 11)), "backing file"),
        (qcow2(crypt=2), "encrypted"),
        (qcow2(features=1 << 2), "another file"),
        (qcow2()[:40], "cut short"),
        (vmdk(0), "other files"),
        (b"KDMV", "cut short"),
        (b"# Disk DescriptorFile\nversion=1\n", "descriptor"),
        (b"conectix" + bytes(504), "VHD"),
        (b"QED\0" + bytes(508), "QED"),
        (b"COWD" + bytes(508), "ESX"),
    ],
)
def test_what_names_other_files_is_refused_before_any_program_opens_it(head, why):
    with pytest.raises(Refused, match=why):
        foreign.identify(head)


def info(**changes) -> bytes:
    return json.dumps({"format": "qcow2", "virtual-size": 1 << 20, **changes}).encode()


def test_the_virtual_size_is_taken_from_what_qemu_img_says():
    assert foreign.virtual_size("qcow2", "/a", info()) == 1 << 20
    extents = {"format-specific": {"data": {"extents": [{"filename": "/a"}]}}}
    assert foreign.virtual_size("vmdk", "/a", info(format="vmdk", **extents)) == 1 << 20


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (info(**{"backing-filename": "/etc/shadow"}), "backing file"),
        (info(**{"full-backing-filename": "/etc/shadow"}), "backing file"),
        (info(encrypted=True), "encrypted"),
        (info(**{"format-specific": {"data": {"data-file": "/etc/shadow"}}}), "another file"),
        (info(**{"format-specific": {"data": {"extents": [{"filename": "/etc/shadow"}]}}}), "other files"),
        (info(**{"format-specific": {"data": {"extents": ["/etc/shadow"]}}}), "other files"),
        (info(format="raw"), "does not take it"),
        (info(**{"virtual-size": 0}), "size"),
        (info(**{"virtual-size": "1"}), "size"),
        (b"[]", "does not take it"),
        (b"{", "no JSON"),
        (b"\xff", "no JSON"),
    ],
)
def test_what_leads_to_another_file_is_refused_by_its_description_too(document, why):
    with pytest.raises(Refused, match=why):
        foreign.virtual_size("qcow2", "/a", document)


def test_a_converter_is_told_exactly_one_file_and_no_backing():
    told = json.loads(foreign.source_of("qcow2", '/a "b",c').removeprefix("json:"))
    assert told == {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": '/a "b",c'},
        "backing": None,
    }
    assert "backing" not in json.loads(foreign.source_of("vdi", "/a").removeprefix("json:"))


@pytest.mark.parametrize(
    ("text", "percent"),
    [
        ("    (0.00/100%)\r    (12.34/100%)\r", 12.34),
        ("    (0.00/100%)\r    (12.", 0.0),
        ("(100.00/100%)\n", 100.0),
        ("", None),
        ("(x/100%)", None),
        ("/100%)", None),
        ("(-3/100%)", None),
    ],
)
def test_progress_is_read_from_what_has_been_printed_so_far(text, percent):
    assert foreign.percent_of(text) == percent


@given(st.binary(max_size=600))
def test_any_head_is_judged_and_any_piece_decoded_or_refused(data):
    with contextlib.suppress(Refused):
        foreign.identify(data)
    for decode in (import_stream.decode_piece, import_stream.decode_answer):
        with contextlib.suppress(ProtocolError):
            decode(data)


@pytest.mark.parametrize("piece", [b"x", b"x" * import_stream.DATA_BYTES_MAX, 0, 1 << 40, None])
def test_pieces_arrive_as_they_were_sent(piece):
    assert import_stream.decode_piece(import_stream.encode_piece(piece)[4:]) == piece


@pytest.mark.parametrize(
    "piece", [b"", b"x" * (import_stream.DATA_BYTES_MAX + 1), -1, 1 << 60, True, "x", 1.5]
)
def test_pieces_out_of_bounds_are_refused(piece):
    with pytest.raises(ProtocolError):
        import_stream.decode_piece(import_stream.encode_piece(piece)[4:])


@pytest.mark.parametrize("answer", [Answer(None, "no"), Answer({"name": "a"}, None)])
def test_answers_arrive_as_they_were_sent(answer):
    assert import_stream.decode_answer(import_stream.encode_answer(answer)[4:]) == answer

"""daemonkit's pure parts: units, codec, frames, addresses, schema."""

import contextlib

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemonkit.codec import CodecError, decode, encode
from daemonkit.errors import OperatorError, plain, words_of
from daemonkit.frames import FrameError, FrameReader, frame
from daemonkit.ports import Address
from daemonkit.schema import SchemaError, structure, unstructure
from daemonkit.toml_text import NotToml, parse_toml
from daemonkit.units import (
    DURATION_NS_MAX,
    SECOND,
    SIZE_BYTES_MAX,
    GiB,
    UnitError,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
    to_seconds,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("250ms", 250_000_000),
        ("10s", 10 * SECOND),
        ("1.5s", 1_500_000_000),
        ("4m", 240 * SECOND),
        ("2h", 7200 * SECOND),
        ("0s", 0),
        ("1d", 86400 * SECOND),
        ("7us", 7000),
    ],
)
def test_durations(text: str, expected: int) -> None:
    assert parse_duration(text) == expected


@pytest.mark.parametrize(
    "text", ["", "10", "s", "-1s", "1.5ns", "1e3s", "10 parsecs", "١s", "9" * 20 + "s", "100000d"]
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UnitError):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4096", 4096),
        ("64KiB", 65536),
        ("10GiB", 10 * GiB),
        ("1.5GiB", GiB * 3 // 2),
        ("5B", 5),
        ("1 tib", 1 << 40),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["64KB", "1.3B", "-5", "KiB", "1000000TiB", "0x10"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UnitError):
        parse_size(text)


@given(st.integers(0, DURATION_NS_MAX))
def test_a_duration_is_read_back(duration_ns: int) -> None:
    assert parse_duration(format_duration(duration_ns)) == duration_ns


@given(st.integers(0, SIZE_BYTES_MAX))
def test_a_size_is_read_back_where_it_is_whole(size_bytes: int) -> None:
    text = format_size(size_bytes)
    if "." not in text:
        assert parse_size(text) == size_bytes


def test_seconds_for_json() -> None:
    assert to_seconds(1_500_000_000) == 1.5
    assert to_seconds(1) == 0.0


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@given(PLAIN)
def test_decode_inverts_encode(value: object) -> None:
    assert decode(encode(value)) == value


@given(st.binary(max_size=200))
def test_decoding_noise_raises_only_our_error(data: bytes) -> None:
    with contextlib.suppress(CodecError):
        decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xdd\xff\xff\xff\xff",  # an array that declares four milliard items
        b"\xc6\xff\xff\xff\xff",  # likewise bytes
        b"\x91" * 5000 + b"\xc0",  # nested too deeply
        b"\x01\x01",  # a second value behind the first
        b"\xa1\xff",  # text that is not UTF-8
        b"\x81\x91\x01\x01",  # a map key that cannot be one
        b"\xc1",
    ],
)
def test_hostile_messages(data: bytes) -> None:
    with pytest.raises(CodecError):
        decode(data)


def test_a_message_above_the_limit_is_refused_unread() -> None:
    with pytest.raises(CodecError, match="limit"):
        decode(b"\x00" * 11, size_bytes_max=10)


@given(st.lists(st.binary(max_size=50), max_size=5), st.integers(1, 7))
def test_frames_come_out_however_they_are_cut(payloads: list[bytes], step: int) -> None:
    wire = b"".join(map(frame, payloads))
    reader, out = FrameReader(), []
    for start in range(0, len(wire), step):
        reader.feed(wire[start : start + step])
        while (payload := reader.next_frame()) is not None:
            out.append(payload)
    reader.finish()
    assert out == payloads


def test_a_frame_above_the_limit_is_refused_by_its_length_alone() -> None:
    reader = FrameReader(frame_bytes_max=100)
    reader.feed((101).to_bytes(4, "big"))
    for _ in range(2):
        with pytest.raises(FrameError):
            reader.next_frame()


def test_a_stream_that_ends_inside_a_frame() -> None:
    reader = FrameReader()
    reader.feed(frame(b"abc")[:-1])
    assert reader.next_frame() is None
    with pytest.raises(FrameError):
        reader.finish()


@pytest.mark.parametrize(
    ("text", "host", "port", "loopback"),
    [
        ("127.0.0.1:7100", "127.0.0.1", 7100, True),
        ("[::1]:0", "::1", 0, True),
        ("db.example:65535", "db.example", 65535, False),
    ],
)
def test_addresses(text: str, host: str, port: int, loopback: bool) -> None:
    address = Address.parse(text)
    assert (address.host, address.port, address.is_loopback, str(address)) == (host, port, loopback, text)


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "h:65536", "h:-1", "::1:80", "h:x", "h:１"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(OperatorError, match="HOST:PORT"):
        Address.parse(text)


@attrs.frozen
class Leg:
    length: int
    note: str | None = None


@attrs.frozen
class Stool:
    name: str
    legs: list[Leg]
    weight: float = 1.0
    tags: dict[str, int] = attrs.field(factory=dict)


def test_structure_and_back() -> None:
    data = {"name": "s", "legs": [{"length": 3, "note": None}], "weight": 2, "tags": {"a": 1}}
    stool = structure(Stool, data)
    assert stool == Stool("s", [Leg(3)], 2.0, {"a": 1})
    assert structure(Stool, unstructure(stool)) == stool
    assert unstructure(stool)["legs"] == [{"length": 3, "note": None}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"nmae": "s", "legs": []}, "unknown key 'nmae', did you mean 'name'?"),
        ({"legs": []}, "'name' is missing"),
        ({"name": 5, "legs": []}, "name: expected str, found int"),
        ({"name": "s", "legs": [{"length": 1}, {"length": "2"}]}, "expected int, found str"),
        ({"name": "s", "legs": [{"length": True}]}, "expected int, found bool"),
        ({"name": "s", "legs": 7}, "legs"),
        ([], "expected a table, found list"),
    ],
)
def test_what_does_not_fit_is_named(data: object, message: str) -> None:
    with pytest.raises(SchemaError) as caught:
        structure(Stool, data, where="stool.toml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("stool.toml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("127.evil.example", False),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("::", False),
    ],
)
def test_loopback_is_never_a_name_that_looks_like_it(host: str, is_loopback: bool) -> None:
    assert Address(host, 1).is_loopback is is_loopback


def test_errors_are_told_in_words():
    assert plain("a: [Errno 28] No space left on device") == "a: No space left on device"
    assert words_of(OSError(2, "No such file", "/x")) == "No such file: '/x'"
    assert words_of(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    "text",
    [
        "a" + ".a" * 100_000 + " = 1",  # would take minutes
        "[a" + ".a" * 100_000 + "]",
        "x = {a" + ".a" * 100_000 + " = 1}",
        "x = " + "9" * 5000,
        "x = " + "[" * 10_000,
        "no toml",
    ],
)
def test_toml_from_a_wire_is_bounded(text: str) -> None:
    with pytest.raises(NotToml):
        parse_toml(text)


def test_dots_in_strings_are_just_dots() -> None:
    path = "/a.b" * 1000
    assert parse_toml(f'x = "{path}"\ny = [1.5, 2.5]') == {"x": path, "y": [1.5, 2.5]}

"""Whatever bytes come, in whatever portions: the NBD session sees the same, and breaks only as it says."""

from itertools import pairwise

import nbd_client as client
from hypothesis import given
from hypothesis import strategies as st

from diskd.core.nbd_haggling import ExportFacts, ExportWanted, NamesWanted
from diskd.core.nbd_session import Request, Session, State
from diskd.core.nbd_wire import (
    NbdError,
    OptionError,
    Rep,
    decode_context_request,
    decode_export_request,
    dirty_descriptors,
)

SIZE = 1 << 20
FACTS = ExportFacts(SIZE, is_read_only=False, multi_conn=False, preferred_block_bytes=4096, points=("rp-1",))


def run(portions: list[bytes]) -> tuple[list[object], bytes]:
    """All events and all output of a session that was fed these portions."""
    session = Session()
    seen: list[object] = []

    def drain() -> None:
        while (event := session.next_event()) is not None:
            seen.append(event)
            if isinstance(event, NamesWanted):
                session.names_found(["x"])
            elif isinstance(event, ExportWanted):
                if event.name == "no":
                    session.export_refused(Rep.ERR_UNKNOWN, "no")
                else:
                    session.export_found(FACTS)
            elif isinstance(event, Request):
                if event.command == client.READ:
                    session.reply_data(event, bytes(event.length))
                else:
                    session.reply_done(event)

    try:
        for portion in portions:
            rest = memoryview(portion)
            while rest and session.state is not State.ENDED:
                room = session.receive_buffer()
                assert room
                count = min(len(room), len(rest))
                room[:count] = rest[:count]
                session.received(count)
                rest = rest[count:]
                drain()
        session.finish()
    except NbdError as error:
        seen.append(str(error))
    return [_comparable(event) for event in seen], b"".join(session.take_output())


def _comparable(event: object) -> object:
    if isinstance(event, Request):
        return (event.command, event.flags, event.cookie, event.offset, event.length, bytes(event.data))
    return event


names = st.sampled_from(["disk", "no", "", "ünï"])
options = st.one_of(
    st.builds(client.go, names, st.integers(0, 5), number=st.sampled_from([client.INFO, client.GO])),
    st.builds(client.meta, names, st.sampled_from(["base:", "base:allocation", "qemu:"])),
    st.just(client.option(client.STRUCTURED)),
    st.just(client.option(client.LIST)),
    st.builds(client.option, st.integers(2, 12), st.binary(max_size=40)),
    st.just(client.option(77, bytes(66_000))),
)
requests = st.one_of(
    st.builds(
        client.request,
        st.just(client.WRITE),
        st.integers(0, SIZE + 9),
        data=st.binary(min_size=1, max_size=99),
    ),
    st.builds(
        client.request,
        st.sampled_from([0, 3, 4, 5, 6, 7, 9]),
        st.integers(0, SIZE + 9),
        st.integers(0, 5000),
        flags=st.integers(0, 31),
    ),
    st.just(client.request(client.WRITE, 0, data=b"p" * 300_000)),
    st.just(client.request(client.WRITE, SIZE, data=b"q" * 300_000)),
)
conversations = st.builds(
    lambda haggle, serve, tail: client.FIXED_NO_ZEROES + b"".join([*haggle, client.go("disk"), *serve, tail]),
    st.lists(options, max_size=6),
    st.lists(requests, max_size=8),
    st.one_of(st.just(b""), st.just(client.request(client.DISC)), st.binary(max_size=60)),
)


@given(conversations, st.lists(st.integers(0, 1 << 20), max_size=12))
def test_any_portions_give_the_same(data: bytes, cuts: list[int]) -> None:
    marks = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    assert run([data]) == run([data[a:b] for a, b in pairwise(marks)])


@given(st.lists(options, max_size=4), st.lists(requests.filter(lambda r: len(r) < 1000), max_size=4))
def test_byte_by_byte_gives_the_same(haggle: list[bytes], serve: list[bytes]) -> None:
    small = [item for item in haggle if len(item) < 1000]
    data = client.FIXED_NO_ZEROES + b"".join([*small, client.go("disk"), *serve])
    assert run([data]) == run([data[i : i + 1] for i in range(len(data))])


@given(
    st.binary(max_size=400),
    st.sampled_from([b"", client.FIXED_NO_ZEROES, client.FIXED_NO_ZEROES + client.go("disk")]),
)
def test_random_bytes_raise_only_our_error(data: bytes, prefix: bytes) -> None:
    run([prefix + data])


@given(st.binary(max_size=200))
def test_option_decoders_raise_only_option_errors(data: bytes) -> None:
    for decode in (decode_export_request, decode_context_request):
        try:
            decode(data)
        except OptionError as error:
            assert error.reply & 1 << 31  # noqa: PT017 - every error is an error reply; none is fine too


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), max_size=12),
    st.integers(0, 200),
    st.integers(1, 200),
    st.integers(1, 30),
)
def test_dirty_descriptors_are_what_a_set_says(
    gaps: list[tuple[int, int]], offset: int, length: int, count_max: int
) -> None:
    extents, position, dirty = [], 0, set()
    for gap, size in gaps:
        position += gap
        extents.append((position, size))
        dirty.update(range(position, position + size))
        position += size
    found = dirty_descriptors(extents, offset, length, count_max=count_max)
    assert 1 <= len(found) <= count_max
    for (_, a), (_, b) in pairwise(found):
        assert a != b
    at = offset
    for size, state in found:
        assert size > 0
        assert all((byte in dirty) == bool(state) for byte in range(at, at + size))
        at += size
    assert at <= offset + length
    if len(found) < count_max:
        assert at == offset + length

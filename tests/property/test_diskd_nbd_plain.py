"""Plain requests served many at a time get the answers that they would get one by one."""

import errno
from collections import defaultdict

import nbd_client as client
from hypothesis import given
from hypothesis import strategies as st

from diskd.core import nbd_plain
from diskd.core.nbd_haggling import ExportFacts, ExportWanted
from diskd.core.nbd_session import Request, Session, State

SIZE = 1 << 20
GRAIN = 32 << 10
FAILS_AT = 13 * 4096  # reads and writes that begin here fail
WAITS_AT = 17 * 4096  # and here they can not be done in place


class Disk:
    """ports.InPlace over a bytearray, with a bad and a slow spot."""

    def __init__(self) -> None:
        # Zeroes, a grain that only begins with zeroes, and data.
        self.content = bytearray(2 * GRAIN) + bytearray(4096) + b"\x05" * (SIZE - 2 * GRAIN - 4096)
        self.in_place = 0

    def begin_in_place(self) -> bool:
        return True

    def _is_quick(self, offset: int) -> bool:
        if offset == FAILS_AT:
            raise OSError(errno.EIO, "a bad spot")
        return offset != WAITS_AT

    def read_in_place(self, offset: int, buffer: memoryview) -> bool:
        buffer[:] = self.content[offset : offset + len(buffer)]
        self.in_place += 1
        return self._is_quick(offset)

    def write_in_place(self, offset: int, data: memoryview) -> bool:
        if not self._is_quick(offset):
            return False
        self.content[offset : offset + len(data)] = data
        self.in_place += 1
        return True

    def serve(self, session: Session, request: Request) -> None:
        """One by one, as the connection does."""
        if request.offset == FAILS_AT and request.length and request.command in (client.READ, client.WRITE):
            session.reply_error(request, errno.EIO, "a bad spot")
        elif request.command == client.READ:
            session.reply_data(request, bytes(self.content[request.offset : request.offset + request.length]))
        else:
            if request.command == client.WRITE:
                self.content[request.offset : request.offset + request.length] = request.data
            session.reply_done(request)


def converse(data: bytes, facts: ExportFacts, *, structured: bool, plain: bool) -> tuple[bytes, Disk]:
    """All output after the haggling, and the disk as it is then."""
    session, disk, replies, sent = Session(), Disk(), nbd_plain.Replies(), b""
    session.take_output()
    options = [client.option(client.STRUCTURED)] if structured else []
    rest = memoryview(client.FIXED_NO_ZEROES + b"".join(options) + client.go("disk") + data)
    while rest and session.state is not State.ENDED:
        room = session.receive_buffer()
        count = min(len(room), len(rest))
        room[:count] = rest[:count]
        session.received(count)
        rest = rest[count:]
        while True:
            if plain and nbd_plain.serve(session, disk, replies):
                sent += b"".join(session.take_output())
                replies.sent()
                continue
            event = session.next_event()
            if isinstance(event, ExportWanted):
                session.export_found(facts)
                session.take_output()
            elif isinstance(event, Request):
                disk.serve(session, event)
            else:
                break
        sent += b"".join(session.take_output())
        replies.sent()
    return sent, disk


offsets = st.one_of(
    st.integers(0, SIZE // 4096 - 1).map(lambda block: block * 4096),
    st.sampled_from([FAILS_AT, WAITS_AT, 2 * GRAIN, 3 * GRAIN - 512, SIZE - 512]),
    st.integers(0, SIZE),
)
requests = st.one_of(
    st.builds(
        client.request,
        st.just(client.READ),
        offsets,
        st.sampled_from([0, 1, 512, 4096, GRAIN, GRAIN + 1, 2 * GRAIN]),
        cookie=st.integers(0, 2**64 - 1),
        flags=st.sampled_from([0, 0, 0, client.DF, client.FUA]),
    ),
    st.builds(
        client.request,
        st.just(client.WRITE),
        offsets,
        cookie=st.integers(0, 2**64 - 1),
        flags=st.sampled_from([0, 0, 0, client.FUA]),
        data=st.sampled_from([b"\x07" * 512, b"\x08" * 4096, bytes(4096), b"\x09" * 90_000]),
    ),
    st.just(client.request(client.FLUSH, cookie=5)),
)


def by_cookie(data: bytes) -> dict[int, list[client.Reply]]:
    found = defaultdict(list)
    for reply in client.replies(data):
        found[reply.cookie].append(reply)
    # Requests in flight at once must differ in their cookies; here some share one, and an error among the
    # replies may overtake what was laid down before it.
    return {cookie: sorted(replies, key=repr) for cookie, replies in found.items()}


@given(st.lists(requests, max_size=40), st.booleans())
def test_structured_replies_are_the_same_and_so_is_the_disk(asked: list[bytes], is_read_only: bool) -> None:
    facts = ExportFacts(SIZE, is_read_only, multi_conn=True, preferred_block_bytes=4096)
    data = b"".join(asked)
    expected, plainly = (converse(data, facts, structured=True, plain=plain) for plain in (False, True))
    assert by_cookie(plainly[0]) == by_cookie(expected[0])
    assert plainly[1].content == expected[1].content


@given(st.lists(requests, max_size=40), st.booleans())
def test_simple_replies_are_the_same_byte_for_byte(asked: list[bytes], is_read_only: bool) -> None:
    facts = ExportFacts(SIZE, is_read_only, multi_conn=True, preferred_block_bytes=4096)
    # An error may overtake what was laid down before it: the same bytes, perhaps in another order.
    data = b"".join(asked)
    expected, plainly = (converse(data, facts, structured=False, plain=plain) for plain in (False, True))
    assert sorted(plainly[0]) == sorted(expected[0])
    assert plainly[1].content == expected[1].content


def test_what_is_plain_goes_in_place_even_when_the_replies_fill_up() -> None:
    facts = ExportFacts(SIZE, is_read_only=False, multi_conn=True, preferred_block_bytes=4096)
    count = 3 * nbd_plain.REPLIES_BYTES // 4096
    data = b"".join(
        client.request(client.READ, 4 * GRAIN + number % 8 * 4096, 4096, cookie=number)
        for number in range(count)
    )
    sent, disk = converse(data, facts, structured=True, plain=True)
    assert [reply.cookie for reply in client.replies(sent)] == list(range(count))
    assert disk.in_place == count

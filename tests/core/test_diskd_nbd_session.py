"""The NBD session as a table: what a client sends, what it is told."""

import errno
import struct

import attrs
import nbd_client as client
import pytest

from diskd.core import nbd_wire as wire
from diskd.core.nbd_haggling import Ended, ExportFacts, ExportWanted, NamesWanted
from diskd.core.nbd_session import Event, Request, RoomWanted, Session, State
from diskd.core.nbd_wire import Command, NbdError, Rep

MiB = 1 << 20
FACTS = ExportFacts(
    8 * MiB, is_read_only=False, multi_conn=True, preferred_block_bytes=4096, points=("rp-1",)
)
READ_ONLY = ExportFacts(8 * MiB, is_read_only=True, multi_conn=True, preferred_block_bytes=4096)


class Peer:
    """Feeds a session, answers its questions from ``facts``, keeps what it says."""

    def __init__(self, facts: ExportFacts | None = FACTS) -> None:
        self.session = Session()
        self.facts = facts
        assert len(self.output()) == client.GREETING_BYTES
        self.events: list[Event] = []
        self.rooms: list[int] = []
        self.has_room = True

    def output(self) -> bytes:
        return b"".join(self.session.take_output())

    def send(self, data: bytes) -> list[Event]:
        """The events that this brought, questions (which are answered at once) not among them."""
        self.events = []
        rest = memoryview(data)
        while rest and self.session.state is not State.ENDED:
            room = self.session.receive_buffer()
            count = min(len(room), len(rest))
            room[:count] = rest[:count]
            self.session.received(count)
            rest = rest[count:]
            self._drain()
        return self.events

    def _drain(self) -> None:
        while (event := self.session.next_event()) is not None:
            if isinstance(event, NamesWanted):
                self.session.names_found(["a", "b"])
            elif isinstance(event, ExportWanted):
                if self.facts is None or event.name == "secret":
                    self.session.export_refused(Rep.ERR_POLICY, "not for you")
                else:
                    self.session.export_found(self.facts)
            elif isinstance(event, RoomWanted):
                self.rooms.append(event.length)
                if self.has_room:
                    self.session.grant_room()
                else:
                    self.session.refuse_room(errno.ENOMEM, "no room")
            else:
                self.events.append(event)

    def options(self, data: bytes) -> list[client.OptionReply]:
        self.send(data)
        replies, rest = client.option_replies(self.output())
        assert rest == b""
        return replies

    def requests(self, data: bytes) -> list[client.Reply]:
        self.send(data)
        return client.replies(self.output())


def open_peer(facts: ExportFacts = FACTS, *, structured: bool = True, queries: tuple[str, ...] = ()) -> Peer:
    peer = Peer(facts)
    peer.send(client.FIXED_NO_ZEROES)
    if structured:
        peer.send(client.option(client.STRUCTURED))
    if queries:
        peer.send(client.meta("disk", *queries))
    peer.send(client.go("disk"))
    assert peer.session.state is State.TRANSMISSION
    peer.output()
    return peer


def haggling_peer(facts: ExportFacts | None = FACTS) -> Peer:
    peer = Peer(facts)
    peer.send(client.FIXED_NO_ZEROES)
    return peer


def test_go_tells_size_flags_and_block_sizes() -> None:
    peer = haggling_peer()
    replies = peer.options(client.go("disk", 1, 3))
    assert [(reply.option, reply.kind) for reply in replies] == [(7, 3), (7, 3), (7, 3), (7, 1)]
    kind, size, flags = struct.unpack(">HQH", replies[0].data)
    assert (kind, size) == (0, 8 * MiB)
    assert flags == 1 | 4 | 8 | 32 | 64 | 256 | 1024
    assert replies[1].data == b"\x00\x01disk"
    assert struct.unpack(">HIII", replies[2].data) == (3, 1, 4096, 64 * MiB)
    assert peer.session.state is State.TRANSMISSION


def test_fast_zero_only_where_it_was_offered() -> None:
    fast = attrs.evolve(FACTS, fast_zero=True)
    replies = haggling_peer(fast).options(client.go("disk"))
    assert struct.unpack(">HQH", replies[0].data)[2] & 1 << 11
    request = client.request(client.WRITE_ZEROES, 0, 512, flags=16 | client.NO_HOLE)
    (event,) = open_peer(fast).send(request)
    assert isinstance(event, Request)
    assert not event.may_trim
    assert open_peer(FACTS).requests(request)[0].error == errno.EINVAL
    assert open_peer(fast).requests(client.request(client.TRIM, 0, 512, flags=16))[0].error == errno.EINVAL


def test_info_leaves_the_client_haggling() -> None:
    peer = haggling_peer(READ_ONLY)
    replies = peer.options(client.option(client.STRUCTURED) + client.go("disk", number=client.INFO))
    assert [reply.kind for reply in replies] == [1, 3, 1]
    assert struct.unpack(">HQH", replies[1].data)[2] == 1 | 2 | 4 | 128 | 256 | 1024
    assert peer.session.state is State.OPTIONS


@pytest.mark.parametrize(("flags", "padding"), [(1, 124), (3, 0)])
def test_export_name_without_and_with_no_zeroes(flags: int, padding: int) -> None:
    peer = Peer()
    peer.send(struct.pack(">I", flags) + client.option(client.EXPORT_NAME, b"disk"))
    output = peer.output()
    assert len(output) == 10 + padding
    assert struct.unpack_from(">Q", output)[0] == 8 * MiB
    assert peer.session.state is State.TRANSMISSION


def test_a_refused_export_name_ends_and_a_refused_go_does_not() -> None:
    peer = haggling_peer(None)
    replies = peer.options(client.go("disk"))
    assert replies == [client.OptionReply(7, client.ERR_POLICY, b"not for you")]
    assert peer.session.state is State.OPTIONS
    assert peer.options(client.option(client.EXPORT_NAME, b"disk")) == []
    assert peer.session.state is State.ENDED


def test_list_names() -> None:
    replies = haggling_peer().options(client.option(client.LIST))
    assert [reply.data for reply in replies] == [client.string("a"), client.string("b"), b""]


BAD_OPTIONS = [
    (client.option(5), client.ERR_UNSUP),
    (client.option(11), client.ERR_UNSUP),
    (client.option(0x7FFFFFFF, b"x" * 100), client.ERR_UNSUP),
    (client.option(client.LIST, b"x"), client.ERR_INVALID),
    (client.option(client.STRUCTURED, b"x"), client.ERR_INVALID),
    (client.option(client.GO), client.ERR_INVALID),
    (client.option(client.GO, b"\xff\xff\xff\xff"), client.ERR_TOO_BIG),
    (client.option(client.GO, b"\x00\x00\x00\x05ab"), client.ERR_INVALID),
    (client.option(client.GO, client.string(b"\xff\xfe") + b"\x00\x00"), client.ERR_INVALID),
    (client.option(client.GO, client.string("a\0b") + b"\x00\x00"), client.ERR_INVALID),
    (client.option(client.GO, client.string("x") + b"\x00\x01"), client.ERR_INVALID),
    (client.option(client.GO, client.string("x") + b"\x00\x00more"), client.ERR_INVALID),
    (client.option(client.GO, client.string("x") + b"\xff\xff"), client.ERR_TOO_BIG),
    (client.go("n" * 4097), client.ERR_TOO_BIG),
    (client.meta("disk", "base:allocation"), client.ERR_INVALID),
    (client.option(client.INFO, b"\x00" * 65_000), client.ERR_INVALID),
    (client.option(client.INFO, b"\x00" * 70_000), client.ERR_TOO_BIG),
    (client.option(99, b"\x00" * 1_000_000), client.ERR_TOO_BIG),
    # PEEK_EXPORT, STARTTLS, EXTENDED_HEADERS.
    *(
        (client.option(number, data), client.ERR_UNSUP)
        for number in (4, 5, 11)
        for data in (b"", b"some data")
    ),
]


@pytest.mark.parametrize(("data", "error"), BAD_OPTIONS)
def test_a_bad_option_costs_only_itself(data: bytes, error: int) -> None:
    peer = haggling_peer()
    replies = peer.options(data + client.option(client.STRUCTURED))
    assert [reply.kind for reply in replies] == [error, client.ACK]


@pytest.mark.parametrize(
    "queries_data",
    [struct.pack(">I", 0xFFFFFFFF), struct.pack(">I", 2000), struct.pack(">II", 1, 5000)],
)
def test_hostile_query_counts(queries_data: bytes) -> None:
    peer = haggling_peer()
    peer.options(client.option(client.STRUCTURED))
    replies = peer.options(client.option(client.LIST_META, client.string("disk") + queries_data))
    assert [reply.kind for reply in replies] == [client.ERR_TOO_BIG]


FATAL = [
    struct.pack(">I", 4),
    client.FIXED_NO_ZEROES + b"GARBAGE!" * 2,
    client.FIXED_NO_ZEROES + struct.pack(">QII", client.IHAVEOPT, 99, 0xFFFFFFFF),
    client.FIXED_NO_ZEROES + struct.pack(">QII", client.IHAVEOPT, client.EXPORT_NAME, 70_000),
    client.FIXED_NO_ZEROES + client.option(client.EXPORT_NAME, b"\xff"),
    client.FIXED_NO_ZEROES + client.option(99) * 1025,
    client.FIXED_NO_ZEROES + client.go("disk") + b"\x00" * 28,
]


@pytest.mark.parametrize("data", FATAL)
def test_lost_framing_ends_the_connection(data: bytes) -> None:
    peer = Peer()
    with pytest.raises(NbdError):
        peer.send(data)
    assert peer.session.state is State.ENDED
    assert peer.session.next_event() is None


def test_abort_is_acknowledged() -> None:
    peer = haggling_peer()
    peer.send(client.option(client.ABORT, b"whatever"))
    assert isinstance(peer.events[0], Ended)
    assert client.option_replies(peer.output())[0][0].kind == client.ACK


CONTEXTS = [
    (client.LIST_META, (), ["base:allocation", "qemu:dirty-bitmap:rp-1"]),
    (client.LIST_META, ("base:",), ["base:allocation"]),
    (client.LIST_META, ("qemu:",), ["qemu:dirty-bitmap:rp-1"]),
    (
        client.LIST_META,
        ("qemu:dirty-bitmap:", "base:allocation"),
        ["base:allocation", "qemu:dirty-bitmap:rp-1"],
    ),
    (client.LIST_META, ("nonsense", "qemu:dirty-bitmap:rp-2", ""), []),
    (client.SET_META, (), []),
    (client.SET_META, ("base:",), []),
    (client.SET_META, ("base:allocation", "base:allocation"), ["base:allocation"]),
    (client.SET_META, ("qemu:dirty-bitmap:rp-1", "x-other:y"), ["qemu:dirty-bitmap:rp-1"]),
]


@pytest.mark.parametrize(("number", "queries", "expected"), CONTEXTS)
def test_metadata_contexts(number: int, queries: tuple[str, ...], expected: list[str]) -> None:
    peer = haggling_peer()
    peer.options(client.option(client.STRUCTURED))
    *contexts, last = peer.options(client.meta("disk", *queries, number=number))
    assert last.kind == client.ACK
    assert [reply.kind for reply in contexts] == [client.META_CONTEXT] * len(expected)
    assert [reply.data[4:].decode() for reply in contexts] == expected


def test_contexts_hold_for_the_export_they_were_chosen_for() -> None:
    peer = haggling_peer()
    peer.options(client.option(client.STRUCTURED) + client.meta("other", "base:allocation"))
    peer.send(client.go("disk"))
    peer.output()
    assert peer.requests(client.request(client.BLOCK_STATUS, 0, 512))[0].error == errno.EINVAL


def test_only_so_many_contexts_are_chosen_at_a_time() -> None:
    points = tuple(f"rp-{number}" for number in range(65))
    peer = Peer(attrs.evolve(FACTS, points=points))
    peer.send(client.FIXED_NO_ZEROES + client.option(client.STRUCTURED))
    queries = ["base:allocation", *(f"qemu:dirty-bitmap:{point}" for point in points)]
    assert peer.options(client.meta("disk", *queries[:64]))[-1].kind == client.ACK
    assert len(peer.session.contexts) == 64
    assert [reply.kind for reply in peer.options(client.meta("disk", *queries[:65]))] == [client.ERR_TOO_BIG]
    assert peer.session.contexts == ()


def test_a_context_whose_point_has_gone_is_never_answered_for() -> None:
    peer = haggling_peer()
    peer.options(client.option(client.STRUCTURED) + client.meta("disk", "qemu:dirty-bitmap:rp-1"))
    peer.facts = READ_ONLY
    assert [reply.kind for reply in peer.options(client.go("disk"))] == [client.ERR_UNKNOWN]
    assert peer.session.state is State.OPTIONS
    replies = peer.options(client.meta("disk", "base:allocation") + client.go("disk"))
    assert replies[-1].kind == client.ACK


END = 8 * MiB
BAD_REQUESTS = [
    (FACTS, client.request(client.READ, END, 1), errno.EINVAL),
    (FACTS, client.request(client.READ, 2**64 - 1, 0xFFFFFFFF), errno.EINVAL),
    (FACTS, client.request(client.READ, 0, 64 * MiB + 1), errno.EINVAL),
    (FACTS, client.request(client.READ, 0, 1, flags=client.NO_HOLE), errno.EINVAL),
    (FACTS, client.request(client.WRITE, END, data=b"x"), errno.ENOSPC),
    (FACTS, client.request(client.WRITE, END - 1, data=b"xy"), errno.ENOSPC),
    (FACTS, client.request(client.WRITE, 0, data=b"x", flags=client.DF), errno.EINVAL),
    (FACTS, client.request(client.WRITE_ZEROES, 1, END), errno.ENOSPC),
    (FACTS, client.request(client.WRITE_ZEROES, 0, 1, flags=16), errno.EINVAL),
    (FACTS, client.request(client.TRIM, 1, END), errno.EINVAL),
    (FACTS, client.request(client.CACHE, 1, END), errno.EINVAL),
    (FACTS, client.request(client.BLOCK_STATUS, 0, 512), errno.EINVAL),
    (FACTS, client.request(8, 0, 0), errno.EINVAL),
    (FACTS, client.request(0xFFFF, 0, 0), errno.EINVAL),
    (READ_ONLY, client.request(client.WRITE, 0, data=b"x" * 600_000), errno.EPERM),
    (READ_ONLY, client.request(client.TRIM, 0, 512), errno.EPERM),
    (READ_ONLY, client.request(client.WRITE_ZEROES, 0, 512), errno.EPERM),
    # NBD_CMD_FLAG_PAYLOAD_LEN belongs to extended headers, which are not offered: WRITE alone has a payload.
    (FACTS, client.request(client.WRITE, 0, data=b"x" * 100, flags=32), errno.EINVAL),
    (FACTS, client.request(client.BLOCK_STATUS, 0, 512, flags=32), errno.EINVAL),
    (FACTS, client.request(client.READ, 0, 512, flags=32), errno.EINVAL),
]


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize(("facts", "data", "error"), BAD_REQUESTS)
def test_a_bad_request_costs_only_itself(
    facts: ExportFacts, data: bytes, error: int, structured: bool
) -> None:
    peer = open_peer(facts, structured=structured)
    events = peer.send(data + client.request(client.READ, 0, 1, cookie=2))
    assert [(event.command, event.cookie) for event in events if isinstance(event, Request)] == [(0, 2)]
    (reply,) = client.replies(peer.output())
    assert (reply.cookie, reply.error, reply.done) == (1, error, True)


def test_thousands_of_rejected_writes_in_one_go() -> None:
    peer = open_peer(READ_ONLY)
    replies = peer.requests(client.request(client.WRITE, 0, data=b"x") * 20_000)
    assert len(replies) == 20_000


def test_an_oversized_write_is_skipped_without_being_kept() -> None:
    peer = open_peer()
    peer.send(client.request(client.WRITE, 0, 0xFFFFFFFF))
    chunk = bytes(200_000)
    for _ in range(20):
        assert peer.send(chunk) == []
    assert [reply.error for reply in client.replies(peer.output())] == [errno.EINVAL]
    assert len(peer.session.receive_buffer()) <= 256 << 10


def test_a_large_payload_arrives_whole() -> None:
    data = bytes(range(256)) * (3 * MiB // 256)
    peer = open_peer()
    events = peer.send(
        client.request(client.WRITE, 4096, data=data, flags=client.FUA) + client.request(client.FLUSH)
    )
    assert [event.command for event in events if isinstance(event, Request)] == [Command.WRITE, Command.FLUSH]
    write = events[0]
    assert isinstance(write, Request)
    assert write.fua
    assert bytes(write.data) == data


def test_a_large_payload_is_asked_about_before_any_memory_is_taken() -> None:
    peer = open_peer()
    peer.has_room = False
    large = client.request(client.WRITE, 4096, data=bytes(MiB + 1), cookie=5)
    small = client.request(client.WRITE, 4096, data=bytes(MiB), cookie=6)
    events = peer.send(large + small + large + client.request(client.FLUSH, cookie=7))
    assert peer.rooms == [MiB + 1, MiB + 1]
    assert [event.cookie for event in events if isinstance(event, Request)] == [6, 7]
    assert [(reply.cookie, reply.error) for reply in client.replies(peer.output())] == [(5, errno.ENOMEM)] * 2


def test_replies_of_both_kinds() -> None:
    for structured in (False, True):
        peer = open_peer(structured=structured)
        read, flush, empty = peer.send(
            client.request(client.READ, 512, 5, cookie=7)
            + client.request(client.FLUSH, cookie=8)
            + client.request(client.READ, 0, 0, cookie=9)
        )
        assert isinstance(read, Request)
        assert isinstance(flush, Request)
        assert isinstance(empty, Request)
        peer.session.reply_data(read, b"hello")
        (reply,) = client.replies(peer.output(), read_bytes=5)
        assert (reply.cookie, reply.error, reply.done) == (7, 0, True)
        assert reply.payload == (struct.pack(">Q", 512) if structured else b"") + b"hello"
        peer.session.reply_done(flush)
        peer.session.reply_data(empty, b"")
        answers = client.replies(peer.output())
        assert [(answer.cookie, answer.error, answer.payload) for answer in answers] == [
            (8, 0, b""),
            (9, 0, b""),
        ]
        peer.session.reply_error(read, errno.ESHUTDOWN, "fenced: épochs")
        assert client.replies(peer.output())[0].error == 108


def read_chunks(
    peer: Peer, offset: int, data: bytes, *, flags: int = 0
) -> list[tuple[int, int, bytes | int]]:
    """(kind, offset, data or hole's length) of the answer to a read of ``data``."""
    (read,) = peer.send(client.request(client.READ, offset, len(data), flags=flags))
    assert isinstance(read, Request)
    peer.session.reply_data(read, data)
    replies = client.replies(peer.output())
    assert [reply.done for reply in replies] == [False] * (len(replies) - 1) + [True]
    found: list[tuple[int, int, bytes | int]] = []
    for reply in replies:
        (start,) = struct.unpack_from(">Q", reply.payload)
        rest = reply.payload[8:]
        found.append((reply.kind or 0, start, int.from_bytes(rest, "big") if reply.kind == 2 else rest))
    return found


def test_zeroes_of_a_structured_read_go_as_holes() -> None:
    peer = open_peer()
    grain = wire.HOLE_BYTES
    assert read_chunks(peer, 512, bytes(1024)) == [(2, 512, 1024)]
    assert read_chunks(peer, 0, b"x") == [(1, 0, b"x")]
    # The grains are aligned on the disk, so the first and the last piece are short here.
    data = bytes(grain - 512) + bytes(grain) + b"\1" * grain + bytes(grain) + bytes(512)
    assert read_chunks(peer, 512, data) == [
        (2, 512, 2 * grain - 512),
        (1, 2 * grain, b"\1" * grain),
        (2, 3 * grain, grain + 512),
    ]


def test_a_read_that_must_not_be_fragmented_is_one_chunk_of_data() -> None:
    peer = open_peer()
    data = bytes(100_000) + b"x" + bytes(100_000)
    assert read_chunks(peer, 0, data, flags=client.DF) == [(1, 0, data)]
    assert read_chunks(peer, 0, bytes(4096), flags=client.DF) == [(1, 0, bytes(4096))]


def test_block_status_reports_every_context() -> None:
    peer = open_peer(queries=("base:allocation", "qemu:dirty-bitmap:rp-1"))
    (status,) = peer.send(client.request(client.BLOCK_STATUS, 0, 4096, flags=client.REQ_ONE))
    assert isinstance(status, Request)
    assert status.wants_one
    assert peer.session.contexts == ((1, "base:allocation"), (2, "qemu:dirty-bitmap:rp-1"))
    peer.session.reply_status(status, [(1, [(4096, 3)]), (2, [(1024, 1), (3072, 0)])])
    first, second = client.replies(peer.output())
    assert not first.done
    assert second.done
    assert struct.unpack(">III", first.payload) == (1, 4096, 3)
    assert struct.unpack(">IIIII", second.payload) == (2, 1024, 1, 3072, 0)


def test_disc_and_the_end_of_the_stream() -> None:
    peer = open_peer()
    assert isinstance(peer.send(client.request(client.DISC))[0], Ended)
    peer.session.finish()
    half = open_peer()
    half.send(client.request(client.WRITE, 0, data=b"abcdef")[:-3])
    with pytest.raises(NbdError, match="middle"):
        half.session.finish()
    open_peer().session.finish()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.EPERM, 1), (errno.EROFS, 1), (errno.EIO, 5), (errno.ENOMEM, 12), (errno.EINVAL, 22),
        (errno.ENOSPC, 28), (errno.EDQUOT, 28), (errno.EOVERFLOW, 5), (errno.EOPNOTSUPP, 5),
        (errno.ESHUTDOWN, 108), (errno.EBADF, 5), (None, 5), (0, 5),
    ],
)  # fmt: skip
def test_errors_on_the_wire(code: int | None, expected: int) -> None:
    assert wire.wire_error(code) == expected


def test_a_message_is_cut_at_a_character() -> None:
    assert len(wire.error_text("é" * 5000)) == 4096
    assert wire.error_text("x" + "é" * 5000).decode()[-1] == "é"


def test_a_server_that_goes_refuses_options() -> None:
    peer = haggling_peer()
    peer.session.shut_down("going")
    for data in (client.option(client.LIST), client.go("disk"), client.option(99, b"x")):
        (reply,) = peer.options(data)
        assert (reply.kind, reply.data) == (7 | 1 << 31, b"going")
    (reply,) = peer.options(client.option(client.ABORT))
    assert reply.kind == client.ACK


def test_fua_only_where_it_was_offered() -> None:
    peer = open_peer(READ_ONLY)
    (reply,) = peer.requests(client.request(client.READ, 0, 512, flags=client.FUA))
    assert reply.error == errno.EINVAL
    (reply,) = peer.requests(client.request(client.WRITE, 0, data=b"x", flags=client.FUA))
    assert reply.error == errno.EPERM

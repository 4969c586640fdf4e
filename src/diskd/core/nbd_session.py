"""One NBD connection as a machine without I/O: fixed newstyle haggling, then transmission.

Theory of operation. The owner moves bytes and answers questions; this machine knows the protocol:

    view = session.receive_buffer(); session.received(socket.recv_into(view))
    while (event := session.next_event()) is not None: ...
    socket.sendmsg(session.take_output())

    FLAGS         the client's 32 bits                              -> OPTIONS
    OPTIONS       one option at a time (nbd_haggling); while a
                  question waits for its answer, nothing is parsed  -> TRANSMISSION, ENDED
    TRANSMISSION  requests are validated once, here: what next_event
                  hands out lies within the image and the limits and
                  is allowed by the export. Anything else is answered
                  with an error here, and the payload of a rejected
                  WRITE is skipped, so that the framing survives    -> ENDED
    ENDED         nothing more is parsed; output may remain to be sent

A request that cannot be granted costs only itself. NbdError, raised by next_event, means that the framing
is lost: the connection must be closed. A large payload is received straight into a buffer of its own:
receive_buffer points into it until it is full. That memory is asked for only after the header was
validated, and is at most REQUEST_BYTES_MAX; of more than PAYLOAD_FREE_MAX the owner is asked first
(``RoomWanted``), and nothing is parsed until he has answered.
"""

import enum
import errno
from collections.abc import Sequence
from typing import Final, NamedTuple, TypeAlias

import attrs

from diskd.core import nbd_wire as wire
from diskd.core.nbd_haggling import Ended, ExportFacts, Haggling, Question
from diskd.core.nbd_wire import (
    Chunk,
    Command,
    CommandFlag,
    Descriptor,
    HandshakeFlag,
    NbdError,
    Option,
    Rep,
)

# Holds any whole option, and a batch of some 60 writes of 4 KiB.
BUFFER_BYTES: Final = 256 << 10
# A longer payload that is not complete yet gets memory of its own, into which the rest is received.
PAYLOAD_BUFFERED_MAX: Final = 64 << 10
# What a payload may take without a question.
PAYLOAD_FREE_MAX: Final = 1 << 20
# After such a payload another one is likely: little of it is taken before its header says where it belongs.
_PEEK_BYTES: Final = 16 << 10


class State(enum.Enum):
    FLAGS = "waiting for the client's flags"
    OPTIONS = "haggling"
    TRANSMISSION = "serving requests"
    ENDED = "no more is read"


# Plain numbers, since an enum's operators take longer than all else that is done to a small request.
_FUA: Final = int(CommandFlag.FUA)
_NO_HOLE: Final = int(CommandFlag.NO_HOLE)
_DF: Final = int(CommandFlag.DF)
_REQ_ONE: Final = int(CommandFlag.REQ_ONE)
_FAST_ZERO: Final = int(CommandFlag.FAST_ZERO)


class Request(NamedTuple):
    """A validated request. ``data`` is the payload of a WRITE, else empty.

    A tuple, because one is made for every request: a frozen attrs class takes four times as long to make.
    """

    command: Command
    flags: int
    cookie: int
    offset: int
    length: int
    data: bytes | memoryview = b""

    @property
    def fua(self) -> bool:
        return self.flags & _FUA != 0

    @property
    def may_trim(self) -> bool:
        return self.flags & _NO_HOLE == 0

    @property
    def wants_one(self) -> bool:
        return self.flags & _REQ_ONE != 0


class RoomWanted(NamedTuple):
    """A WRITE with a payload of ``length`` bytes: answer with grant_room or refuse_room."""

    length: int


Event: TypeAlias = Question | Request | RoomWanted | Ended

# The complement of an IntFlag leaves out unknown bits, and these are just what must be found: plain numbers.
_CLIENT_FLAGS_UNKNOWN: Final = ~int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
_FLAGS_ALLOWED: Final = {
    Command.READ: CommandFlag.FUA | CommandFlag.DF,
    Command.WRITE: CommandFlag.FUA,
    Command.FLUSH: CommandFlag.FUA,
    Command.TRIM: CommandFlag.FUA,
    Command.CACHE: CommandFlag.FUA,
    Command.WRITE_ZEROES: CommandFlag.FUA | CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO,
    Command.BLOCK_STATUS: CommandFlag.FUA | CommandFlag.REQ_ONE,
}
_FLAGS_REFUSED: Final = {command: ~int(allowed) for command, allowed in _FLAGS_ALLOWED.items()}
_COMMANDS: Final = {command.value: command for command in Command}
_WRITING: Final = frozenset((Command.WRITE, Command.WRITE_ZEROES))
_MODIFYING: Final = frozenset((Command.WRITE, Command.TRIM, Command.WRITE_ZEROES))
# Module constants: a lookup in an enum class takes as long as the comparison that it is for.
_READ: Final = Command.READ
_WRITE: Final = Command.WRITE
_FLUSH: Final = Command.FLUSH
_DISC: Final = Command.DISC
_BLOCK_STATUS: Final = Command.BLOCK_STATUS
_WITH_PAYLOAD: Final = frozenset((Command.READ, Command.WRITE))
_REASONS: Final = {
    errno.EINVAL: "unknown command or flag, beyond the end, or longer than this server takes",
    errno.EPERM: "this export is read-only",
    errno.ENOSPC: "beyond the end of this export",
}


_pack_simple: Final = wire.SIMPLE_REPLY.pack


@attrs.define
class _Payload:
    """A WRITE whose payload is still arriving."""

    header: Request
    data: bytearray
    filled: int


class Session:
    """See the module. Every method is synchronous and touches nothing but this object."""

    def __init__(self) -> None:
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self._skip = 0
        self._payload: _Payload | None = None
        self._spare: bytearray | None = None
        self._room_asked = self._has_room = False
        self._had_payload = False
        self._out: list[bytes | bytearray | memoryview] = [wire.greeting()]
        self._state = State.FLAGS
        self._haggling = Haggling(self._out)
        self.facts = ExportFacts(0, True, False, 4096)
        self.structured = False

    @property
    def state(self) -> State:
        return self._state

    @property
    def contexts(self) -> tuple[tuple[int, str], ...]:
        """The metadata contexts that BLOCK_STATUS reports, as (id, name)."""
        return self._haggling.contexts

    # --- bytes in and out

    def receive_buffer(self) -> memoryview:
        """Where the peer's next bytes belong. Never empty once next_event has returned None."""
        if self._payload is not None:
            return memoryview(self._payload.data)[self._payload.filled :]
        if self._start == self._end:
            self._start = self._end = 0
            return self._view[:_PEEK_BYTES] if self._had_payload else self._view
        if self._start and self._end > BUFFER_BYTES // 2:
            rest = self._end - self._start
            self._buffer[:rest] = self._buffer[self._start : self._end]
            self._start, self._end = 0, rest
        return self._view[self._end :]

    def received(self, count: int) -> None:
        """``count`` bytes were put at the beginning of the last receive_buffer."""
        if self._payload is not None:
            self._payload.filled += count
        else:
            self._end += count
            self._had_payload = False

    # What nbd_plain needs in order to serve from the buffer directly.

    def unparsed(self) -> tuple[bytearray, memoryview, int, int]:
        """(the buffer, the same as a view, begin and end of what next_event has not looked at yet)."""
        if self._state is not State.TRANSMISSION or self._payload is not None or self._skip:
            return self._buffer, self._view, 0, 0
        return self._buffer, self._view, self._start, self._end

    def parsed_to(self, start: int) -> None:
        """Everything before ``start`` has been answered, or will be."""
        if start:
            self._start = start

    def take_output(self) -> list[bytes | bytearray | memoryview]:
        """What is to be sent, in order, as one batch."""
        taken = self._out[:]
        self._out.clear()
        return taken

    @property
    def has_output(self) -> bool:
        return bool(self._out)

    def shut_down(self, message: str) -> None:
        """From now on every option, also one that waits for its answer, is refused with ERR_SHUTDOWN.
        (Requests are the owner's to refuse.)"""
        self._haggling.shut_down(message)

    def finish(self) -> None:
        """The peer has closed its side. Raises NbdError where that was in the middle of something."""
        if self._state is State.ENDED:
            return
        inside = self._start != self._end or self._skip or self._payload is not None
        self._state = State.ENDED
        if inside:
            raise NbdError("the connection ended in the middle of a message")

    # --- parsing

    def next_event(self) -> Event | None:
        """The next event, or None when bytes (or an answer) are needed. Raises NbdError, then ends."""
        if self._start == self._end and self._payload is None:
            return None
        try:
            if self._state is State.FLAGS:
                self._client_flags()
            if self._state is State.OPTIONS:
                return self._next_option()
            if self._state is State.TRANSMISSION:
                return self._next_request()
            return None
        except NbdError:
            self._state = State.ENDED
            raise

    def _has(self, count: int) -> bool:
        """Are ``count`` bytes there, behind those to be skipped?"""
        if self._skip:
            dropped = min(self._skip, self._end - self._start)
            self._start += dropped
            self._skip -= dropped
        return not self._skip and self._end - self._start >= count

    def _client_flags(self) -> None:
        if not self._has(wire.CLIENT_FLAGS.size):
            return
        (flags,) = wire.CLIENT_FLAGS.unpack_from(self._buffer, self._start)
        self._start += wire.CLIENT_FLAGS.size
        if flags & _CLIENT_FLAGS_UNKNOWN:
            # "the server MUST close the TCP connection if it does not recognize the client's flags"
            raise NbdError(f"unknown client flags {flags:#x}")
        self._haggling.no_zeroes = bool(flags & HandshakeFlag.NO_ZEROES)
        self._state = State.OPTIONS

    def _next_option(self) -> Event | None:
        while not self._haggling.is_waiting and self._has(wire.OPTION.size):
            magic, option, length = wire.OPTION.unpack_from(self._buffer, self._start)
            if magic != wire.IHAVEOPT:
                raise NbdError("an option does not begin with IHAVEOPT")
            if length > wire.OPTION_BYTES_MAX:
                self._skip_option(option, length)
                continue
            end = self._start + wire.OPTION.size + length
            if end > self._end:
                return None
            data = bytes(self._view[self._start + wire.OPTION.size : end])
            self._start = end
            self._haggling.count_option()
            event = self._haggling.handle(option, data)
            if isinstance(event, Ended):
                self._state = State.ENDED
            if event is not None:
                return event
        return None

    def _skip_option(self, option: int, length: int) -> None:
        if length > wire.OPTION_SKIP_BYTES_MAX or option == Option.EXPORT_NAME:
            raise NbdError(f"an option of {length} bytes")
        self._start += wire.OPTION.size
        self._skip = length
        self._haggling.count_option()
        self._haggling.refuse_oversized(option)

    def names_found(self, names: Sequence[str]) -> None:
        """The answer to NamesWanted."""
        self._haggling.names_found(names)

    def export_refused(self, reply: Rep, message: str) -> None:
        """The answer to ExportWanted where the catalog says no. The state may be ENDED afterwards."""
        if not self._haggling.export_refused(reply, message):
            self._state = State.ENDED

    def export_found(self, facts: ExportFacts) -> bool:
        """The answer to ExportWanted. True: the session is in transmission with this export now."""
        if not self._haggling.export_found(facts):
            return False
        self.facts = facts
        self.structured = self._haggling.structured
        self._state = State.TRANSMISSION
        return True

    # --- requests

    def _next_request(self) -> Event | None:
        if self._payload is not None:
            return self._whole_payload()
        while not self._room_asked and self._has(wire.REQUEST.size):
            magic, flags, number, cookie, offset, length = wire.REQUEST.unpack_from(self._buffer, self._start)
            if magic != wire.REQUEST_MAGIC:
                raise NbdError("a request does not begin with its magic")
            self._start += wire.REQUEST.size
            command = _COMMANDS.get(number)
            if command is _DISC:
                self._state = State.ENDED
                return Ended("the client disconnected")
            problem = self._problem(command, flags, offset, length)
            if command is None or problem:
                if command is _WRITE:
                    # Without extended headers no other command carries a payload.
                    self._skip = length
                self.reply_failure(cookie, problem, _REASONS[problem])
                continue
            if command is _WRITE and length:
                return self._begin_payload(flags, cookie, offset, length)
            return Request(command, flags, cookie, offset, length)
        return None

    def _problem(self, command: Command | None, flags: int, offset: int, length: int) -> int:
        """The errno for a request that cannot be served; 0 for a good one."""
        if command is None:
            return errno.EINVAL
        if flags:
            if flags & _FLAGS_REFUSED[command]:
                return errno.EINVAL
            if flags & _FUA and self.facts.is_read_only and command not in _MODIFYING:
                # "valid for all commands, provided NBD_FLAG_SEND_FUA has been negotiated"
                return errno.EINVAL
            if flags & _DF and not self.structured:
                return errno.EINVAL
            if flags & _FAST_ZERO and not self.facts.fast_zero:
                return errno.EINVAL
        if length > wire.REQUEST_BYTES_MAX and command in _WITH_PAYLOAD:
            return errno.EINVAL
        if self.facts.is_read_only and command in _MODIFYING:
            return errno.EPERM
        if command is _BLOCK_STATUS and not (length and self.contexts):
            return errno.EINVAL
        if offset + length > self.facts.size_bytes and command is not _FLUSH:
            return errno.ENOSPC if command in _WRITING else errno.EINVAL
        return 0

    def _begin_payload(self, flags: int, cookie: int, offset: int, length: int) -> Event | None:
        start = self._start
        have = self._end - start
        if have >= length:
            self._start = start + length
            return Request(_WRITE, flags, cookie, offset, length, bytes(self._view[start : self._start]))
        if length <= PAYLOAD_BUFFERED_MAX:
            # The rest arrives behind it, and more requests with it: the header is looked at again then.
            self._start = start - wire.REQUEST.size
            return None
        if length > PAYLOAD_FREE_MAX and not self._has_room:
            self._start = start - wire.REQUEST.size
            self._room_asked = True
            return RoomWanted(length)
        self._has_room = False
        payload, self._spare = self._spare, None
        if payload is None or len(payload) != length:
            payload = bytearray(length)
        payload[:have] = self._view[start : self._end]
        self._start = self._end
        self._payload = _Payload(Request(_WRITE, flags, cookie, offset, length), payload, have)
        return None

    def grant_room(self) -> None:
        """The answer to RoomWanted: that payload is received next."""
        self._room_asked, self._has_room = False, True

    def refuse_room(self, code: int, message: str) -> None:
        """The answer to RoomWanted: that request fails, by errno, and its payload is skipped."""
        self._room_asked = False
        _, _, _, cookie, _, length = wire.REQUEST.unpack_from(self._buffer, self._start)
        self._start += wire.REQUEST.size
        self._skip = length
        self.reply_failure(cookie, code, message)

    def _whole_payload(self) -> Event | None:
        payload = self._payload
        if payload is None or payload.filled < len(payload.data):
            return None
        self._payload, self._had_payload = None, True
        return payload.header._replace(data=memoryview(payload.data))

    # --- replies, in any order

    def reply_done(self, request: Request) -> None:
        """Success without data."""
        if self.structured and request.command is _READ:
            # "a simple reply MAY be used as a reply to any request other than NBD_CMD_READ"
            self._out.append(_chunk(Chunk.NONE, request.cookie, 0))
        else:
            self._out.append(_pack_simple(wire.SIMPLE_REPLY_MAGIC, 0, request.cookie))

    def reply_written(self, request: Request) -> None:
        """Success of a WRITE whose payload nobody needs any more: its memory may take the next one."""
        self._out.append(_pack_simple(wire.SIMPLE_REPLY_MAGIC, 0, request.cookie))
        data = request.data
        if isinstance(data, memoryview) and isinstance(data.obj, bytearray):
            self._spare = data.obj if len(data) <= PAYLOAD_FREE_MAX else None

    def reply_data(self, request: Request, data: bytes | bytearray) -> None:
        """The bytes that a READ asked for. Zeroes go as holes, where the client can take them."""
        assert len(data) == request.length
        if not data:
            self.reply_done(request)
        elif not self.structured:
            self._out += (_pack_simple(wire.SIMPLE_REPLY_MAGIC, 0, request.cookie), data)
        elif request.flags & _DF:
            # "the server MUST send at most one content chunk"
            self._out += (wire.data_header(request.cookie, request.offset, len(data)), data)
        else:
            self._out += wire.content_chunks(request.cookie, request.offset, data)

    def reply_status(self, request: Request, contexts: Sequence[tuple[int, Sequence[Descriptor]]]) -> None:
        """The answer to BLOCK_STATUS, one (id, descriptors) per chosen context."""
        for position, (context_id, descriptors) in enumerate(contexts, start=1):
            payload = wire.descriptor_payload(context_id, descriptors)
            flags = wire.CHUNK_DONE if position == len(contexts) else 0
            self._out.append(_chunk(Chunk.BLOCK_STATUS, request.cookie, len(payload), flags) + payload)

    def reply_laid(self, replies: memoryview) -> None:
        """Whole replies, as they go out."""
        self._out.append(replies)

    def reply_error(self, request: Request, code: int | None, message: str) -> None:
        """A failure, by errno; the message goes where the protocol has room for one."""
        self.reply_failure(request.cookie, code, message)

    def reply_failure(self, cookie: int, code: int | None, message: str) -> None:
        """As reply_error, for a request of which only the cookie is at hand."""
        error = wire.wire_error(code)
        if not self.structured:
            self._out.append(_pack_simple(wire.SIMPLE_REPLY_MAGIC, error, cookie))
            return
        text = wire.error_text(message)
        payload = wire.CHUNK_ERROR.pack(error, len(text)) + text
        self._out.append(_chunk(Chunk.ERROR, cookie, len(payload)) + payload)


def _chunk(kind: Chunk, cookie: int, length: int, flags: int = wire.CHUNK_DONE) -> bytes:
    return wire.CHUNK.pack(wire.CHUNK_MAGIC, flags, kind, cookie, length)

"""The NBD protocol's numbers and byte layouts, named as in its specification.

That is doc/proto.md of NetworkBlockDevice/nbd; quotations in these modules are from there.

Everything is big-endian. Layouts:

    greeting        u64 NBDMAGIC, u64 IHAVEOPT, u16 handshake flags
    option          u64 IHAVEOPT, u32 option, u32 length, data
    option reply    u64 magic, u32 option, u32 reply type, u32 length, data
    request         u32 magic, u16 flags, u16 command, u64 cookie, u64 offset, u32 length, (WRITE: data)
    simple reply    u32 magic, u32 error, u64 cookie, (READ: data)
    reply chunk     u32 magic, u16 flags, u16 type, u64 cookie, u32 length, payload

Decoders raise ``OptionError``: that option is answered with an error and the haggling goes on. What
breaks the framing itself is ``NbdError``, and the connection ends.
"""

import enum
import errno
import struct
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Final

import attrs

from daemonkit.errors import ProtocolError
from daemonkit.units import MiB
from diskd.core.ports import Allocation

NBDMAGIC: Final = 0x4E42444D41474943
IHAVEOPT: Final = 0x49484156454F5054
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
CHUNK_MAGIC: Final = 0x668E33EF

GREETING: Final = struct.Struct(">QQH")
CLIENT_FLAGS: Final = struct.Struct(">I")
OPTION: Final = struct.Struct(">QII")
OPTION_REPLY: Final = struct.Struct(">QIII")
REQUEST: Final = struct.Struct(">IHHQQI")
SIMPLE_REPLY: Final = struct.Struct(">IIQ")
CHUNK: Final = struct.Struct(">IHHQI")
EXPORT_SIZE_FLAGS: Final = struct.Struct(">QH")
OFFSET: Final = struct.Struct(">Q")
DESCRIPTOR: Final = struct.Struct(">II")
CHUNK_DATA: Final = struct.Struct(">IHHQIQ")
CHUNK_HOLE: Final = struct.Struct(">IHHQIQI")
CHUNK_ERROR: Final = struct.Struct(">IH")
U32: Final = struct.Struct(">I")
U16: Final = struct.Struct(">H")
_INFO_EXPORT: Final = struct.Struct(">HQH")
_INFO_BLOCK_SIZE: Final = struct.Struct(">HIII")

# The specification's limit for every string.
STRING_BYTES_MAX: Final = 4096
# An option holds at most an export name and some queries; qemu and libnbd send well under 1 KiB.
OPTION_BYTES_MAX: Final = 64 << 10
# Above this a length is garbage rather than a big option: skipping it would wait for ever.
OPTION_SKIP_BYTES_MAX: Final = 16 * MiB
# Each query may name one reference point, of which an image keeps at most 511.
QUERIES_MAX: Final = 1024
# Each chosen one costs memory with every block status: a backup asks for one point, seldom for two.
CONTEXTS_MAX: Final = 64
INFO_REQUESTS_MAX: Final = 64
# A client needs a handful of options; a thousand means that it will never come to an end.
OPTIONS_MAX: Final = 1024
# DESIGN.md section 7. It bounds READ and WRITE; TRIM, WRITE_ZEROES, CACHE and BLOCK_STATUS carry no payload.
REQUEST_BYTES_MAX: Final = 64 * MiB
# 128 KiB of descriptors in one reply: enough for a coarse map, and no client has to take more at once.
DESCRIPTORS_MAX: Final = 16 << 10
# The grain, in bytes and aligned, in which zeroes within a larger read are sent as holes.
HOLE_BYTES: Final = 32 << 10

BASE_ALLOCATION: Final = "base:allocation"
DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"


class NbdError(ProtocolError):
    """The peer broke the framing or the order of the protocol: its connection ends."""


class HandshakeFlag(enum.IntFlag):
    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(enum.IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Rep(enum.IntEnum):
    """Types of option replies; errors have the highest bit set."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 1 | 1 << 31
    ERR_POLICY = 2 | 1 << 31
    ERR_INVALID = 3 | 1 << 31
    ERR_UNKNOWN = 6 | 1 << 31
    ERR_SHUTDOWN = 7 | 1 << 31
    ERR_TOO_BIG = 9 | 1 << 31


class Info(enum.IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(enum.IntFlag):
    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


class Command(enum.IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(enum.IntFlag):
    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4


class Chunk(enum.IntEnum):
    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 1 | 1 << 15


CHUNK_DONE: Final = 1
STATE_HOLE: Final = 1
STATE_ZERO: Final = 2
STATE_DIRTY: Final = 1

_ERRORS: Final = {
    errno.EPERM: 1,
    errno.EROFS: 1,
    errno.EACCES: 1,
    errno.EIO: 5,
    errno.ENOMEM: 12,
    errno.EINVAL: 22,
    errno.ENOSPC: 28,
    errno.EDQUOT: 28,
    errno.EFBIG: 28,
    errno.ESHUTDOWN: 108,
}
_EIO: Final = 5


def wire_error(code: int | None) -> int:
    """The protocol's error number for an errno; what it has no number for is an I/O error.

    The server should not send EOVERFLOW but for a DF read that is too long for it, which none is here, nor
    ENOTSUP but for a fast zero, which we offer only where it is one: these are I/O errors too.
    """
    return _ERRORS.get(code or 0, _EIO)


class OptionError(Exception):
    """One option cannot be granted; ``reply`` and the message go to the client, the haggling goes on."""

    def __init__(self, reply: Rep, message: str) -> None:
        super().__init__(message)
        self.reply = reply


@attrs.frozen
class ExportRequest:
    """The data of NBD_OPT_INFO and NBD_OPT_GO."""

    name: str
    infos: tuple[int, ...]


@attrs.frozen
class ContextRequest:
    """The data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT."""

    name: str
    queries: tuple[str, ...]


class _Cursor:
    """Reads an option's data; every length is checked against what is there before it is used."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def _take(self, length: int) -> bytes:
        end = self._position + length
        if end > len(self._data):
            raise OptionError(Rep.ERR_INVALID, "the option's data is shorter than it says")
        taken = self._data[self._position : end]
        self._position = end
        return taken

    def u16(self) -> int:
        (value,) = U16.unpack(self._take(U16.size))
        return int(value)

    def u32(self) -> int:
        (value,) = U32.unpack(self._take(U32.size))
        return int(value)

    def string(self) -> str:
        length = self.u32()
        if length > STRING_BYTES_MAX:
            raise OptionError(Rep.ERR_TOO_BIG, f"a string may have at most {STRING_BYTES_MAX} bytes")
        return decode_name(self._take(length))

    def finish(self) -> None:
        if self._position != len(self._data):
            raise OptionError(Rep.ERR_INVALID, "the option's data is longer than it says")


def decode_name(data: bytes) -> str:
    """An export name or query. Raises OptionError where it is not UTF-8 or too long."""
    if len(data) > STRING_BYTES_MAX:
        raise OptionError(Rep.ERR_TOO_BIG, f"a name may have at most {STRING_BYTES_MAX} bytes")
    try:
        name = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(Rep.ERR_INVALID, "a name is not UTF-8") from error
    if "\0" in name:
        # "that string ... MUST NOT contain NUL characters"
        raise OptionError(Rep.ERR_INVALID, "a name contains a NUL character")
    return name


def decode_export_request(data: bytes) -> ExportRequest:
    """Raises OptionError, and nothing else."""
    cursor = _Cursor(data)
    name = cursor.string()
    count = cursor.u16()
    if count > INFO_REQUESTS_MAX:
        raise OptionError(Rep.ERR_TOO_BIG, f"more than {INFO_REQUESTS_MAX} information requests")
    infos = tuple(cursor.u16() for _ in range(count))
    cursor.finish()
    return ExportRequest(name, infos)


def decode_context_request(data: bytes) -> ContextRequest:
    """Raises OptionError, and nothing else."""
    cursor = _Cursor(data)
    name = cursor.string()
    count = cursor.u32()
    if count > QUERIES_MAX:
        raise OptionError(Rep.ERR_TOO_BIG, f"more than {QUERIES_MAX} queries")
    queries = tuple(cursor.string() for _ in range(count))
    cursor.finish()
    return ContextRequest(name, queries)


def greeting() -> bytes:
    """The server's first bytes."""
    return GREETING.pack(NBDMAGIC, IHAVEOPT, HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)


def option_reply(option: int, reply: Rep, data: bytes = b"") -> bytes:
    """One reply to an option; ``data`` of an error reply is a message for people."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data)) + data


def error_text(message: str) -> bytes:
    """A message cut to the protocol's limit, at a character's boundary."""
    return message.encode("utf-8", "replace")[:STRING_BYTES_MAX].decode("utf-8", "ignore").encode("utf-8")


def info_export(size_bytes: int, flags: TransmissionFlag) -> bytes:
    """The data of NBD_REP_INFO, NBD_INFO_EXPORT."""
    return _INFO_EXPORT.pack(Info.EXPORT, size_bytes, flags)


def info_name(name: str) -> bytes:
    """The data of NBD_REP_INFO, NBD_INFO_NAME."""
    return U16.pack(Info.NAME) + name.encode()


def info_block_size(preferred_bytes: int) -> bytes:
    """The data of NBD_REP_INFO, NBD_INFO_BLOCK_SIZE: any alignment is served."""
    return _INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, 1, preferred_bytes, REQUEST_BYTES_MAX)


def server_entry(name: str) -> bytes:
    """The data of NBD_REP_SERVER."""
    data = name.encode()
    return U32.pack(len(data)) + data


def meta_context(context_id: int, name: str) -> bytes:
    """The data of NBD_REP_META_CONTEXT."""
    return U32.pack(context_id) + name.encode()


_WILDCARDS: Final = frozenset(("base:", "qemu:", DIRTY_BITMAP))


def matching_contexts(queries: Sequence[str], points: Iterable[str], *, listing: bool) -> list[str]:
    """The metadata contexts that ``queries`` ask for, each once, in the order in which we list them.

    Listing with no query means all; only a listing takes wildcards (``base:``, ``qemu:``,
    ``qemu:dirty-bitmap:``). What we do not know is ignored, as the specification demands.
    """
    known = [BASE_ALLOCATION, *(DIRTY_BITMAP + point for point in points)]
    if listing and not queries:
        return known
    asked = set(queries)
    beginnings = tuple(asked & _WILDCARDS) if listing else ()
    return [context for context in known if context in asked or context.startswith(beginnings)]


Descriptor = tuple[int, int]


def _coalesce(runs: Iterable[Descriptor], *, count_max: int) -> list[Descriptor]:
    """Join neighbours of one state; at most ``count_max`` of (length, state)."""
    joined: list[Descriptor] = []
    for length, state in runs:
        if joined and joined[-1][1] == state:
            joined[-1] = (joined[-1][0] + length, state)
        elif len(joined) == count_max:
            break
        else:
            joined.append((length, state))
    return joined


_ALLOCATION_STATES: Final = {"data": 0, "zero": STATE_ZERO, "hole": STATE_HOLE | STATE_ZERO}


def allocation_descriptors(
    allocations: Iterable[Allocation], *, count_max: int = DESCRIPTORS_MAX
) -> list[Descriptor]:
    """``base:allocation`` of a gapless sequence, as (length, state)."""
    runs = ((run.length, _ALLOCATION_STATES[run.kind]) for run in allocations if run.length)
    return _coalesce(runs, count_max=count_max)


def dirty_descriptors(
    extents: Sequence[tuple[int, int]], offset: int, length: int, *, count_max: int = DESCRIPTORS_MAX
) -> list[Descriptor]:
    """``qemu:dirty-bitmap`` over exactly (offset, length), of ascending disjoint extents, as (length, state).

    extents          [====]      [==]   [=======]
    range               <-------------------->
    descriptors         [=]......[==]...[=====]
    """
    end = offset + length
    position = offset
    runs: list[Descriptor] = []
    index = max(0, bisect_right(extents, (offset, 0)) - 1)
    while position < end and index < len(extents) and len(runs) <= count_max:
        start, extent_length = extents[index]
        index += 1
        stop = min(end, start + extent_length)
        if stop <= position:
            continue
        if start >= end:
            break
        if start > position:
            runs.append((start - position, 0))
        position = max(start, position)
        runs.append((stop - position, STATE_DIRTY))
        position = stop
    if position < end and len(runs) <= count_max:
        runs.append((end - position, 0))
    return _coalesce(runs, count_max=count_max)


_OFFSET_DATA: Final = int(Chunk.OFFSET_DATA)


def data_header(cookie: int, offset: int, length: int, *, done: int = CHUNK_DONE) -> bytes:
    """The header of a content chunk with ``length`` bytes of data, which follow."""
    return CHUNK_DATA.pack(CHUNK_MAGIC, done, _OFFSET_DATA, cookie, OFFSET.size + length, offset)


_ZEROES: Final = bytes(HOLE_BYTES)


def content_chunks(cookie: int, offset: int, data: bytes | bytearray) -> list[bytes | bytearray | memoryview]:
    """The chunks that carry the bytes of a read, ascending, zeroes as holes.

    A grain of which the first byte is not zero is data: mostly one look at these bytes is all that it costs.

    grains      |  0  |  0  | ### |  0  |
    chunks      [    hole   ][data][hole]
    """
    end = offset + len(data)
    if data[0] and 0 not in data[-offset % HOLE_BYTES :: HOLE_BYTES]:
        return [data_header(cookie, offset, len(data)), data]
    runs: list[tuple[bool, int]] = []
    position = offset
    while position < end:
        stop = min(end, (position // HOLE_BYTES + 1) * HOLE_BYTES)
        length = stop - position
        zeroes = _ZEROES if length == HOLE_BYTES else _ZEROES[:length]
        is_zero = data.startswith(zeroes, position - offset)
        if runs and runs[-1][0] == is_zero:
            runs[-1] = (is_zero, stop)
        else:
            runs.append((is_zero, stop))
        position = stop
    chunks: list[bytes | bytearray | memoryview] = []
    position = offset
    for is_zero, stop in runs:
        done = CHUNK_DONE if stop == end else 0
        length = stop - position
        if is_zero:
            size = CHUNK_HOLE.size - CHUNK.size
            chunks.append(
                CHUNK_HOLE.pack(CHUNK_MAGIC, done, Chunk.OFFSET_HOLE, cookie, size, position, length)
            )
        else:
            chunks.append(data_header(cookie, position, length, done=done))
            whole = len(runs) == 1
            chunks.append(data if whole else memoryview(data)[position - offset : stop - offset])
        position = stop
    return chunks


def descriptor_payload(context_id: int, descriptors: Sequence[Descriptor]) -> bytes:
    """The payload of a BLOCK_STATUS chunk."""
    flat = [number for descriptor in descriptors for number in descriptor]
    return U32.pack(context_id) + struct.pack(f">{len(flat)}I", *flat)

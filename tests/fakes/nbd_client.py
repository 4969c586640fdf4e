"""The client's half of NBD, bare: builds messages and takes replies apart, for tests of the server's half."""

import struct
from typing import NamedTuple

IHAVEOPT = 0x49484156454F5054
GREETING_BYTES = 18
FIXED_NO_ZEROES = struct.pack(">I", 3)

EXPORT_NAME, ABORT, LIST, INFO, GO, STRUCTURED, LIST_META, SET_META = 1, 2, 3, 6, 7, 8, 9, 10
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE = 1, 2, 4, 8
ACK, SERVER, REP_INFO, META_CONTEXT = 1, 2, 3, 4
ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_UNKNOWN, ERR_TOO_BIG = (code | 1 << 31 for code in (1, 2, 3, 6, 9))


def option(number: int, data: bytes = b"") -> bytes:
    return struct.pack(">QII", IHAVEOPT, number, len(data)) + data


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack(">I", len(data)) + data


def go(name: str, *infos: int, number: int = GO) -> bytes:
    return option(number, string(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos))


def meta(name: str, *queries: str, number: int = SET_META) -> bytes:
    data = string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries))
    return option(number, data)


def request(
    command: int, offset: int = 0, length: int = 0, *, cookie: int = 1, flags: int = 0, data: bytes = b""
) -> bytes:
    length = len(data) if data else length
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length) + data


class OptionReply(NamedTuple):
    option: int
    kind: int
    data: bytes


class Reply(NamedTuple):
    """A simple reply (``kind`` None; its data, if any, is not part of it) or one structured chunk."""

    cookie: int
    error: int
    kind: int | None
    payload: bytes
    done: bool


def option_replies(data: bytes) -> tuple[list[OptionReply], bytes]:
    """All option replies at the beginning of ``data``, and the rest."""
    replies = []
    while len(data) >= 20 and data[:8] == struct.pack(">Q", 0x3E889045565A9):
        _, number, kind, length = struct.unpack_from(">QIII", data)
        if len(data) < 20 + length:
            break
        replies.append(OptionReply(number, kind, data[20 : 20 + length]))
        data = data[20 + length :]
    return replies, data


def replies(data: bytes, *, read_bytes: int = 0) -> list[Reply]:
    """All replies that ``data`` is made of; a successful simple one carries ``read_bytes`` of data."""
    found = []
    while data:
        (magic,) = struct.unpack_from(">I", data)
        if magic == 0x67446698:
            _, error, cookie = struct.unpack_from(">IIQ", data)
            count = 0 if error else read_bytes
            found.append(Reply(cookie, error, None, data[16 : 16 + count], done=True))
            data = data[16 + count :]
        else:
            assert magic == 0x668E33EF, hex(magic)
            _, flags, kind, cookie, length = struct.unpack_from(">IHHQI", data)
            payload = data[20 : 20 + length]
            assert len(payload) == length
            error = struct.unpack_from(">I", payload)[0] if kind & 1 << 15 else 0
            found.append(Reply(cookie, error, kind, payload, done=bool(flags & 1)))
            data = data[20 + length :]
    return found

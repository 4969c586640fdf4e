"""The common requests of a connection, many in one go: small reads and writes without flags.

Nearly all that a guest asks for is of this kind, and making an event of each would cost more than serving
it. ``serve`` works through the session's buffer up to the first request that is anything else (or must wait,
or is not complete yet), carries out each on the device in place, and lays the replies down one behind the
other in one buffer, reads straight from the file:

    received   | header | header, 4 KiB | header | header with FUA ...
               '-- READ-'----- WRITE ---'-- READ-'  stops here: the session's next_event goes on
    replies    | chunk, 4 KiB | reply | chunk, 4 KiB |

All this is one step of the loop. So what can change only between steps is asked for once, by
``begin_in_place`` (S1: the epoch); what each write needs (T1: its mark, no hold) the device does in
``write_in_place``.
"""

import struct
from typing import Final

from diskd.core import nbd_wire as wire
from diskd.core.nbd_session import Session
from diskd.core.ports import InPlace
from diskd.core.statistics import IoCounts

# What is laid down before it is sent: about sixty reads of 4 KiB. A batch ends here at the latest.
REPLIES_BYTES: Final = 256 << 10
# Within one grain of zeroes: what crosses one may be several chunks.
READ_BYTES_MAX: Final = wire.HOLE_BYTES

# Magic, flags and command as one number: one comparison says that a request is plain.
_REQUEST: Final = struct.Struct(">QQQI")
_READ: Final = wire.REQUEST_MAGIC << 32 | int(wire.Command.READ)
_WRITE: Final = wire.REQUEST_MAGIC << 32 | int(wire.Command.WRITE)
_HEAD_BYTES: Final = _REQUEST.size

_SIMPLE: Final = struct.Struct(">QQ")
_DONE: Final = wire.SIMPLE_REPLY_MAGIC << 32
_CHUNK: Final = struct.Struct(">QQIQ")
_DATA: Final = wire.CHUNK_MAGIC << 32 | wire.CHUNK_DONE << 16 | int(wire.Chunk.OFFSET_DATA)
_HOLE: Final = struct.Struct(">QQIQI")
_ZEROES: Final = wire.CHUNK_MAGIC << 32 | wire.CHUNK_DONE << 16 | int(wire.Chunk.OFFSET_HOLE)
_HOLE_PAYLOAD: Final = wire.CHUNK_HOLE.size - wire.CHUNK.size
_NOTHING: Final = bytes(READ_BYTES_MAX)
# Up to here the longest reply still fits.
_ROOM: Final = REPLIES_BYTES - READ_BYTES_MAX - _CHUNK.size


class Replies:
    """Where replies are laid down, behind those that were not sent yet. ``sent``: all of them were.

    ``counts``: what the requests amounted to, added up once for each batch."""

    def __init__(self, counts: IoCounts | None = None) -> None:
        self.counts = counts or IoCounts()
        self.requests = 0
        self.buffer = bytearray(REPLIES_BYTES)
        self.view = memoryview(self.buffer)
        self.end = 0

    def sent(self) -> None:
        self.end = 0


def serve(session: Session, device: InPlace, replies: Replies) -> bool:
    """Serve what is plain. True: ``replies`` is full, send it and call again. False: what follows is for
    the session's next_event.
    """
    buffer, received, start, end = session.unparsed()
    facts, structured = session.facts, session.structured
    size_bytes, may_write = facts.size_bytes, not facts.is_read_only
    head = _CHUNK.size if structured else _SIMPLE.size
    unpack, out, laid, position = _REQUEST.unpack_from, replies.buffer, replies.view, replies.end
    begun = start
    reads = read_bytes = writes = failed = 0
    while end - start >= _HEAD_BYTES and position <= _ROOM:
        word, cookie, offset, length = unpack(buffer, start)
        stop = start + _HEAD_BYTES
        if not length or offset + length > size_bytes:
            break
        try:
            if word == _WRITE and may_write:
                stop += length
                if stop > end or not device.write_in_place(offset, received[stop - length : stop]):
                    break
                _SIMPLE.pack_into(out, position, _DONE, cookie)
                position += _SIMPLE.size
                writes += 1
            elif word == _READ and length <= READ_BYTES_MAX - offset % READ_BYTES_MAX:
                data = position + head
                if not device.read_in_place(offset, laid[data : data + length]):
                    break
                reads += 1
                read_bytes += length
                if not structured:
                    _SIMPLE.pack_into(out, position, _DONE, cookie)
                    position = data + length
                elif not out[data] and out.startswith(_NOTHING[:length], data):
                    _HOLE.pack_into(out, position, _ZEROES, cookie, _HOLE_PAYLOAD, offset, length)
                    position += _HOLE.size
                else:
                    _CHUNK.pack_into(out, position, _DATA, cookie, wire.OFFSET.size + length, offset)
                    position = data + length
            else:
                break
        except OSError as error:
            session.reply_failure(cookie, error.errno, error.strerror or str(error))
            failed += 1
            begun += stop - start  # no part of what was written
        start = stop
    session.parsed_to(start)
    if start != begun or failed:
        replies.requests += reads + writes + failed
        counts = replies.counts
        counts.reads += reads
        counts.read_bytes += read_bytes
        counts.writes += writes
        counts.written_bytes += start - begun - (reads + writes) * _HEAD_BYTES
        counts.errors += failed
    if position > replies.end:
        session.reply_laid(laid[replies.end : position])
        replies.end = position
    return position > _ROOM

"""The export stream: one backup, or one difference, as bytes (docs/formats/export-stream.md).

    prefix   magic "HFEXPORT", version, length of the header            16 bytes
    header   msgpack: vm, point, base, kind, consistency, config, disks
    frame    kind, disk, number, offset, length, BLAKE3                 56 bytes, then the data if any
    ...      of each disk in order of offset, never overlapping; of different disks in any order
    trailer  the same 56 bytes: kind "end", the count of frames, the bytes of data, the whole digest

The digest of a disk covers its frame headers in order, and through the digests in them every byte of its
data; the whole digest covers prefix, header and the digests of all disks: so a stream without its payloads
(``export.index`` in the repository) still proves what the payloads were, and the order in which several
disks were read makes no difference. The same codec serves the socket, ``diskctl export -o FILE`` and the
repository.

Both directions are sans-I/O. ``StreamDecoder`` refuses, before it takes memory, whatever is out of
order, out of bounds or incomplete; after an error it stays in error. Digests of payloads are checked by
whoever holds the payload (``Frame.check``), which is a worker thread's job.

The receiver answers with small msgpack messages in length-prefixed frames (``Reply``): flow control is
a window of bytes that may be on their way.
"""

import struct
from typing import Any, Final, Literal, TypeAlias

import attrs
from blake3 import blake3

from daemonkit.codec import decode, encode
from daemonkit.errors import OperatorError, ProtocolError
from daemonkit.schema import structure, unstructure
from daemonkit.units import SIZE_BYTES_MAX, KiB, MiB
from diskd.core.inventory import CONFIG_BYTES_MAX, DISKS_MAX, NAME_PATTERN, POINT_PATTERN
from diskd.core.stream_frames import DATA_BYTES_MAX as DATA_BYTES_MAX
from diskd.core.stream_frames import DIGEST_BYTES as DIGEST_BYTES
from diskd.core.stream_frames import FRAME as FRAME
from diskd.core.stream_frames import NO_DIGEST as NO_DIGEST
from diskd.core.stream_frames import SECTOR_BYTES as SECTOR_BYTES
from diskd.core.stream_frames import STORED as STORED
from diskd.core.stream_frames import DiskOrder as DiskOrder
from diskd.core.stream_frames import FrameBatch as FrameBatch
from diskd.core.stream_frames import FrameHeader as FrameHeader
from diskd.core.stream_frames import FrameKind as FrameKind
from diskd.core.stream_frames import FrameOrder as FrameOrder
from diskd.core.stream_frames import Places as Places
from diskd.core.stream_frames import Rows as Rows
from diskd.core.stream_frames import StreamError as StreamError
from diskd.core.stream_frames import Trailer as Trailer
from diskd.core.stream_frames import by_disk as by_disk
from diskd.core.stream_frames import mismatch as mismatch
from diskd.core.stream_frames import plain_header, stored_length
from diskd.core.stream_frames import refuse as refuse
from diskd.core.stream_frames import scan as scan
from diskd.core.stream_zstd import Decompressor

MAGIC: Final = b"HFEXPORT"
VERSION: Final = 2
PREFIX: Final = struct.Struct(">8sII")

HEADER_BYTES_MAX: Final = 1 * MiB
TEXT_BYTES_MAX: Final = 4 * KiB
REPLY_BYTES_MAX: Final = 64 * KiB
# So many headers fit one reply.
HAVE_BYTES_MAX: Final = 1000 * FRAME.size

ExportKind: TypeAlias = Literal["full", "differential"]


class SourceLost(StreamError):
    """The stream ends before its trailer: it can go on in another connection."""


class StreamAborted(OperatorError):
    """The sender gave up in the middle, and said why."""


@attrs.frozen
class DiskHeader:
    """One disk. ``cluster_bytes``: the source's advice for a differential's grain, which only it can
    give, since it has the whole change map before the first frame."""

    name: str
    image: str
    size_bytes: int
    block_bytes: int
    cluster_bytes: int
    changed_bytes: int
    exact: bool
    over_report_bytes: int


@attrs.frozen
class ExportHeader:
    """What the stream is of. ``config`` is the VM file's text, verbatim."""

    vm: str
    point: str
    base: str | None
    kind: ExportKind
    consistency: str
    config: str
    disks: list[DiskHeader]


@attrs.frozen
class Frame:
    """A frame as received; ``data`` is empty unless its kind is data."""

    header: FrameHeader
    data: bytes

    def check(self) -> None:
        """Raises StreamError unless the payload is what the source digested (B4)."""
        if self.header.kind is FrameKind.DATA and blake3(self.data).digest() != self.header.digest:
            raise mismatch(self.header)


def is_point(text: str) -> bool:
    """``rp-`` and 16 hex digits."""
    return POINT_PATTERN.fullmatch(text) is not None


def check_header(header: ExportHeader) -> None:
    """Raises StreamError for what no export of ours says: names become paths, so they are checked here."""
    if not NAME_PATTERN.fullmatch(header.vm):
        refuse(f"{header.vm[:80]!r} is not a VM's name")
    if not is_point(header.point) or (header.base is not None and not is_point(header.base)):
        refuse("a point is rp- and 16 hex digits")
    if (header.kind == "full") != (header.base is None) or header.base == header.point:
        refuse("a full has no base, a differential has another point")
    if len(header.config.encode("utf-8", "replace")) > CONFIG_BYTES_MAX or len(header.consistency) > 64:
        refuse("the configuration is too long")
    if not 0 < len(header.disks) <= DISKS_MAX:
        refuse(f"a VM has 1 to {DISKS_MAX} disks, this one {len(header.disks)}")
    if len({disk.name for disk in header.disks}) != len(header.disks):
        refuse("two disks have one name")
    for disk in header.disks:
        if not NAME_PATTERN.fullmatch(disk.name) or not NAME_PATTERN.fullmatch(disk.image):
            refuse(f"{disk.name[:80]!r} is not a disk's name")
        if not 0 < disk.size_bytes <= SIZE_BYTES_MAX or disk.size_bytes % SECTOR_BYTES:
            refuse(f"disk {disk.name}: a size of {disk.size_bytes} bytes is not a multiple of {SECTOR_BYTES}")
        if min(disk.block_bytes, disk.cluster_bytes, disk.changed_bytes + 1, disk.over_report_bytes + 1) <= 0:
            refuse(f"disk {disk.name}: negative numbers")


class StreamEncoder:
    """Writes a stream. The caller sends ``opening``, then the frames of each disk in order, then
    ``finish()``.

    ``disks`` accounts for each disk's own frames: those who read several at once share nothing else.
    """

    def __init__(self, header: ExportHeader) -> None:
        """Raises StreamError for a header that the other side would refuse."""
        check_header(header)
        body = encode(unstructure(header))
        if len(body) > HEADER_BYTES_MAX:
            refuse("the header is too long")
        self.opening: Final = PREFIX.pack(MAGIC, VERSION, len(body)) + body
        self._order = FrameOrder(self.opening, [disk.size_bytes for disk in header.disks])
        self.disks: Final = self._order.disks

    @property
    def data_bytes(self) -> int:
        """How many bytes of data have been framed so far."""
        return self._order.data_bytes

    @property
    def frames(self) -> int:
        """How many frames have been framed so far."""
        return self._order.frames

    def frame(self, kind: FrameKind, disk: int, offset: int, length: int, data: Any = None) -> bytes:
        """The header of the disk's next frame; ``data`` is the payload, which follows it on the wire."""
        digest = NO_DIGEST if data is None else blake3(data).digest()
        header = FrameHeader(kind, disk, self.disks[disk].frames, offset, length, digest)
        packed = header.pack()
        self._order.take(packed, header)
        return packed

    def take_rows(self, packed: bytes) -> Rows:
        """Account for headers that a receiver has from an earlier connection. Raises StreamError where they
        are no export: its memory of it is wrong."""
        return self._order.take_rows(packed)

    def finish(self) -> bytes:
        """The trailer."""
        return self._order.trailer().pack()

    def summary(self) -> Trailer:
        """The digests so far; after the last frame, those of the whole."""
        return self._order.trailer()


def abort(reason: str) -> bytes:
    """What a sender says in place of the next frame when it cannot go on."""
    text = reason.encode("utf-8", "replace")[:TEXT_BYTES_MAX]
    return FRAME.pack(FrameKind.ABORT, 0, 0, 0, 0, len(text), NO_DIGEST) + text


class StreamDecoder:
    """Feed bytes in any portions; take events out until None means "more bytes are needed".

    ``payloads=False`` reads an index: the same stream without its data. ``zstd=False`` is for who asked for
    no compressed frames, and has no thread to spare for them. ``opening`` holds prefix and header,
    verbatim, once the header has been taken.
    """

    def __init__(self, *, payloads: bool = True, zstd: bool = True) -> None:
        self._buffer = bytearray()
        self._taken = 0
        self._payloads = payloads
        self._zstd = Decompressor() if zstd and payloads else None
        self._order: FrameOrder | None = None
        self._frame: FrameHeader | None = None
        # Of a compressed frame: whether the frame is one, and how much of it follows once that is known.
        self._is_stored = False
        self._stored: int | None = None
        self._complete = False
        self.opening = b""

    @property
    def complete(self) -> bool:
        """True once the trailer has been taken."""
        return self._complete

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Raises StreamError for bytes behind the trailer."""
        if self._complete and data:
            refuse("bytes behind the end of the stream")
        if self._taken:
            del self._buffer[: self._taken]
            self._taken = 0
        self._buffer += data

    def finish(self) -> None:
        """The stream has ended. Raises StreamError unless it was complete."""
        if not self._complete:
            refuse("the stream ends before its trailer: it is not complete")

    def next_event(self) -> ExportHeader | Frame | Trailer | None:
        """Raises StreamError, or StreamAborted with the sender's reason."""
        if self._complete:
            return None
        if self._order is None:
            return self._opening()
        if self._frame is None:
            packed = self._take(FRAME.size)
            if packed is None:
                return None
            event = self._frame_header(self._order, packed)
            if not isinstance(event, FrameHeader):
                return event
            self._frame = event
        data = self._payload(self._frame)
        if data is None:
            return None
        frame, self._frame = self._frame, None
        if frame.kind is FrameKind.ABORT:
            raise StreamAborted(data.decode("utf-8", "replace"))
        return Frame(frame, data)

    def _payload(self, frame: FrameHeader) -> bytes | None:
        """What follows the header, once all of it is there."""
        if self._is_stored:
            return self._inflated(frame)
        if frame.kind is FrameKind.ABORT or (frame.kind is FrameKind.DATA and self._payloads):
            return self._take(frame.length)
        return b""

    def _inflated(self, frame: FrameHeader) -> bytes | None:
        if self._stored is None:
            length = self._take(STORED.size)
            if length is None:
                return None
            self._stored = stored_length(length, 0, frame.length)
        data = self._take(self._stored)
        if data is None:
            return None
        self._is_stored, self._stored = False, None
        assert self._zstd is not None
        return self._zstd.decompress(data, frame.length)

    def take_rest(self) -> bytes:
        """What was fed and not yet taken, for whoever goes on with ``batch``."""
        if self._frame is not None:
            refuse("a frame is half taken")
        rest = bytes(memoryview(self._buffer)[self._taken :])
        self._buffer, self._taken = bytearray(), 0
        return rest

    def known(self, packed: bytes) -> None:
        """The sender goes on behind these headers, which were taken from it before. Raises StreamError."""
        if self._order is None:
            refuse("the header comes first")
        self._order.take_rows(packed)

    def batch(self, view: memoryview) -> tuple[FrameBatch, Rows]:
        """The whole frames at the beginning of a caller's own buffer, without copying them. What is there
        instead of a frame (trailer, abort) is left to ``feed`` and ``next_event``. Raises StreamError."""
        if self._order is None or self._frame is not None or len(self._buffer) > self._taken:
            refuse("the header comes first")
        found = scan(view)
        return found, self._order.take_rows(found.packed)

    def _opening(self) -> ExportHeader | None:
        if self._buffer[:1] == bytes([FrameKind.ABORT]):
            self._abort_at_once()
            return None
        view = memoryview(self._buffer)
        if len(view) < PREFIX.size:
            if not MAGIC.startswith(bytes(view[: len(MAGIC)])):
                refuse("this is not an export stream")
            view.release()
            return None
        magic, version, length = PREFIX.unpack_from(view)
        if magic != MAGIC:
            refuse("this is not an export stream")
        if version != VERSION:
            refuse(f"export stream version {version} is not known here, only {VERSION}; make the export anew")
        if length > HEADER_BYTES_MAX:
            refuse(f"a header of {length} bytes is too long")
        view.release()
        opening = self._take(PREFIX.size + length)
        if opening is None:
            return None
        try:
            header = structure(ExportHeader, decode(opening[PREFIX.size :]), where="export header")
        except (OperatorError, ProtocolError) as error:
            raise StreamError(str(error)) from error
        check_header(header)
        self.opening = opening
        self._order = FrameOrder(opening, [disk.size_bytes for disk in header.disks])
        return header

    def _abort_at_once(self) -> None:
        """A sender that cannot even begin says why in the first record."""
        if len(self._buffer) < FRAME.size:
            return
        length = FRAME.unpack_from(self._buffer)[5]
        if length > TEXT_BYTES_MAX:
            refuse("the reason for giving up is too long")
        if len(self._buffer) >= FRAME.size + length:
            raise StreamAborted(self._buffer[FRAME.size : FRAME.size + length].decode("utf-8", "replace"))

    def _frame_header(self, order: FrameOrder, packed: bytes) -> FrameHeader | Trailer:
        number, reserved, disk, sequence, offset, length, digest = FRAME.unpack(packed)
        try:
            kind = FrameKind(number)
        except ValueError:
            refuse(f"frame {order.frames}: unknown kind {number}")
        if reserved:
            refuse(f"frame {order.frames}: reserved bits are set")
        if kind is FrameKind.END:
            end = order.trailer()
            if (disk, sequence, offset, length, digest) != (0, end.frames, end.data_bytes, 0, end.digest):
                refuse("the whole digest does not match: the stream was damaged on its way")
            self._complete = True
            if len(self._buffer) > self._taken:
                refuse("bytes behind the end of the stream")
            return end
        if kind is FrameKind.ZSTD:
            if self._zstd is None:
                refuse(f"frame {sequence} of disk {disk} is compressed, which nobody asked for")
            kind, packed, self._is_stored = FrameKind.DATA, plain_header(packed), True
        header = FrameHeader(kind, disk, sequence, offset, length, digest)
        if kind is FrameKind.ABORT:
            if length > TEXT_BYTES_MAX:
                refuse("the reason for giving up is too long")
            return header
        order.take(packed, header)
        return header

    def _take(self, size: int) -> bytes | None:
        if len(self._buffer) - self._taken < size:
            return None
        data = bytes(memoryview(self._buffer)[self._taken : self._taken + size])
        self._taken += size
        return data


# What the receiver says, each in a frame of daemonkit.frames.


@attrs.frozen
class Ready:
    """Send frames; at most ``window_bytes`` may be unacknowledged."""

    window_bytes: int


@attrs.frozen
class Have:
    """Before ``Ready``, to a source that resumes: the headers of the frames that are durable here, those of
    each disk in order, as many messages as it takes. The source goes on behind them, disk by disk."""

    headers: bytes


@attrs.frozen
class Ack:
    """``taken`` frames are verified and written, the first ``durable`` of them synced: counted in the order
    in which they came, those that ``Have`` told first."""

    taken: int
    durable: int


@attrs.frozen
class Working:
    """Still verifying or syncing: a sign of life."""


@attrs.frozen
class Committed:
    """The point is complete and durable at the receiver; ``digest`` is the whole digest that it holds."""

    point: str
    digest: str


@attrs.frozen
class RefusedReply:
    """The receiver keeps nothing of this stream, and says why in one line. ``busy``: it has not even looked
    at it; what it has of earlier connections stands, and the same may be sent later."""

    reason: str
    busy: bool = False


Reply: TypeAlias = Ready | Have | Ack | Working | Committed | RefusedReply
_REPLIES: Final[dict[str, type[Any]]] = {
    "ready": Ready,
    "have": Have,
    "ack": Ack,
    "working": Working,
    "committed": Committed,
    "refused": RefusedReply,
}
_REPLY_NAMES: Final = {cls: name for name, cls in _REPLIES.items()}


def encode_reply(reply: Reply) -> bytes:
    """msgpack ``[NAME, FIELDS]``; the caller frames it."""
    return encode([_REPLY_NAMES[type(reply)], unstructure(reply)])


def decode_reply(payload: bytes) -> Reply:
    """Raises StreamError."""
    try:
        message = decode(payload, size_bytes_max=REPLY_BYTES_MAX)
    except ProtocolError as error:
        raise StreamError(str(error)) from error
    if not isinstance(message, list) or len(message) != 2 or message[0] not in _REPLIES:
        refuse("the receiver answered in an unknown form")
    try:
        reply: Reply = structure(_REPLIES[message[0]], message[1], where=message[0])
    except OperatorError as error:
        raise StreamError(str(error)) from error
    return reply

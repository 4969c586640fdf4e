"""Sans-I/O framing of a byte stream: a big-endian 32-bit length, then that many bytes.

``FrameReader`` refuses a length above its limit as soon as the four bytes are there, before any
memory is taken for the payload.
"""

import struct
from typing import Final

from daemonkit.errors import ProtocolError

_LENGTH: Final = struct.Struct(">I")
FRAME_BYTES_MAX: Final = 16 << 20


class FrameError(ProtocolError):
    """A frame that is longer than the reader's limit, or a stream that ends inside one."""


def frame(payload: bytes) -> bytes:
    """The bytes on the wire of one frame."""
    if len(payload) > FRAME_BYTES_MAX:
        raise FrameError(f"a frame of {len(payload)} bytes exceeds the limit of {FRAME_BYTES_MAX}")
    return _LENGTH.pack(len(payload)) + payload


class FrameReader:
    """Feed bytes in any portions; take whole frames out."""

    def __init__(self, *, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._limit = frame_bytes_max
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        self._buffer += data

    def next_frame(self) -> bytes | None:
        """The next whole payload, or None when more bytes are needed. Raises FrameError, then always."""
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > self._limit:
            raise FrameError(f"a frame of {length} bytes exceeds the limit of {self._limit}")
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        payload = bytes(self._buffer[_LENGTH.size : end])
        del self._buffer[:end]
        return payload

    def take_rest(self) -> bytes:
        """The bytes behind the last frame, for whoever reads on in another protocol."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    def finish(self) -> None:
        """The stream has ended. Raises FrameError if that was inside a frame."""
        if self._buffer:
            raise FrameError(f"the stream ended inside a frame ({len(self._buffer)} bytes left over)")

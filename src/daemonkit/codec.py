"""msgpack, wrapped once with fixed options and bounds: every byte from outside passes through here.

The unpacker's own limits are set from the size of the input, so that a declared length can never
make it take memory which the sender did not send. Depth is bounded by msgpack itself (StackError).
"""

from typing import Any, Final

import msgpack  # type: ignore[import-untyped] # msgpack ships no types

from daemonkit.errors import ProtocolError

MESSAGE_BYTES_MAX: Final = 16 << 20


class CodecError(ProtocolError):
    """Bytes that are not one complete msgpack value within the bounds."""


def encode(value: Any) -> bytes:
    """msgpack bytes of plain data (None, bool, int, float, str, bytes, list, tuple, dict)."""
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def decode(data: bytes | bytearray | memoryview, *, size_bytes_max: int = MESSAGE_BYTES_MAX) -> Any:
    """The one value that ``data`` holds. Raises CodecError, and nothing else, for anything wrong with it."""
    if len(data) > size_bytes_max:
        raise CodecError(f"message of {len(data)} bytes exceeds the limit of {size_bytes_max}")
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=True, use_list=True)
    except (
        ValueError,  # includes ExtraData, FormatError, StackError and UnicodeDecodeError
        msgpack.UnpackException,
        RecursionError,
        OverflowError,
        TypeError,  # an unhashable map key
    ) as error:
        raise CodecError(f"not a msgpack message: {type(error).__name__}") from error

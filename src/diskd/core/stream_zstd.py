"""Compressed frames: one frame of data, one zstd frame, nothing shared between two of them.

A compressed frame comes from outside, so nothing that it says of itself is believed: the caller knows how
long the data is (at most DATA_BYTES_MAX), and whatever does not become exactly that is refused, before
memory is taken for more. Both directions run without the interpreter's lock, so they belong in worker
threads; an object serves one thread at a time.
"""

import zstandard

from daemonkit.diskd_api import COMPRESS_LEVEL_MAX
from diskd.core.stream_frames import DATA_BYTES_MAX, STORED, refuse
from diskd.errors import Refused


def check_level(level: int) -> None:
    """Raises Refused for a level that there is not."""
    if not 0 <= level <= COMPRESS_LEVEL_MAX:
        raise Refused(f"zstd has the levels 1 to {COMPRESS_LEVEL_MAX} here (0 is none), not {level}")


class Compressor:
    """At one level: 1 (fast) to COMPRESS_LEVEL_MAX."""

    def __init__(self, level: int) -> None:
        self._zstd = zstandard.ZstdCompressor(level=level)

    def compress(self, data: memoryview | bytes) -> bytes | None:
        """What is stored for ``data``, or None where that would not be shorter."""
        stored = self._zstd.compress(data)
        return stored if len(stored) + STORED.size < len(data) else None


class Decompressor:
    """The other direction."""

    def __init__(self) -> None:
        # A frame cannot make us keep a window that is larger than the data it stands for.
        self._zstd = zstandard.ZstdDecompressor(max_window_size=DATA_BYTES_MAX)

    def decompress(self, stored: memoryview | bytes, length: int) -> bytes:
        """The ``length`` bytes that ``stored`` stands for. Raises StreamError for anything else than one
        zstd frame of exactly that: its own word for its length is what the library takes memory by."""
        try:
            told = zstandard.frame_content_size(stored)
            if told != length:
                refuse(f"a compressed frame says that it holds {told} bytes where {length} are due")
            data = self._zstd.decompress(stored, max_output_size=length, allow_extra_data=False)
        except zstandard.ZstdError as error:
            refuse(f"a compressed frame cannot be decompressed: {error}")
        if len(data) != length:
            refuse(f"a compressed frame holds {len(data)} bytes where {length} are due")
        return data

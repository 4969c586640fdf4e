"""The shared bitmap: a file on tmpfs, mapped shared, that outlives the daemon and not the boot (T3).

    | header page (4096 bytes) | bitmap, in whole pages |

It is allocated in full before use. Its name carries a random nonce, which the MRT's header repeats: so a
file left over by an earlier opening is never mistaken for the current one. The fixed part of the header is
under a checksum; the two numbers after it change in place (aligned 8-byte stores).

Byte layout in docs/formats/image.md.
"""

import struct
import zlib
from typing import Final, Protocol
from uuid import UUID

from diskd.core.geometry import Identity

MAGIC: Final = b"HFSHM001"
HEADER_BYTES: Final = 4096
NONCE_BYTES: Final = 16
# magic, crc of the rest, padding, image, generation, boot, nonce, interval, bitmap bytes
_FIXED: Final = struct.Struct("<8sI4s16s16s16s16sQQ")
_TIME: Final = 256
_OVER_REPORT: Final = 264
_NUMBER: Final = struct.Struct("<q")


class SharedMemory(Protocol):
    """Where shared bitmaps live: tmpfs, or a dictionary in the simulator."""

    def create(self, nonce: bytes, size_bytes: int) -> memoryview:
        """New, zeroed, allocated in full. Raises OSError."""
        ...

    def open(self, nonce: bytes, size_bytes: int) -> memoryview | None:
        """None where there is none of that name and size."""
        ...

    def remove(self, nonce: bytes) -> None:
        """Absent is fine. Views that are open stay usable."""
        ...


def area_bytes(identity: Identity) -> int:
    """The size of one shared file."""
    return HEADER_BYTES + identity.geometry.bitmap_bytes


class SharedArea:
    """One shared bitmap in memory: ``bits`` and the changing numbers of its header."""

    def __init__(self, view: memoryview, nonce: bytes, interval: int) -> None:
        self._view = view
        self.bits = view[HEADER_BYTES:]
        self.nonce = nonce
        self.interval = interval

    @property
    def time_ns(self) -> int:
        """Wall clock at the last write to the raw file."""
        return int(_NUMBER.unpack_from(self._view, _TIME)[0])

    @time_ns.setter
    def time_ns(self, value: int) -> None:
        _NUMBER.pack_into(self._view, _TIME, value)

    @property
    def over_report_bytes(self) -> int:
        return int(_NUMBER.unpack_from(self._view, _OVER_REPORT)[0])

    @over_report_bytes.setter
    def over_report_bytes(self, value: int) -> None:
        _NUMBER.pack_into(self._view, _OVER_REPORT, value)

    def release(self) -> None:
        """Let go of the memory, so that its mapping can be closed."""
        self.bits.release()
        self._view.release()


def _fixed(identity: Identity, generation: UUID, boot_id: UUID, nonce: bytes, interval: int) -> bytes:
    data = bytearray(
        _FIXED.pack(
            MAGIC,
            0,
            bytes(4),
            identity.uuid.bytes,
            generation.bytes,
            boot_id.bytes,
            nonce,
            interval,
            identity.geometry.bitmap_bytes,
        )
    )
    data[8:12] = zlib.crc32(data).to_bytes(4, "little")
    return bytes(data)


def create_area(
    memory: SharedMemory, identity: Identity, generation: UUID, boot_id: UUID, nonce: bytes, interval: int
) -> SharedArea:
    """A fresh, empty bitmap. Raises OSError where it cannot be allocated in full."""
    view = memory.create(nonce, area_bytes(identity))
    fixed = _fixed(identity, generation, boot_id, nonce, interval)
    view[: len(fixed)] = fixed
    return SharedArea(view, nonce, interval)


def open_area(
    memory: SharedMemory, identity: Identity, generation: UUID, boot_id: UUID, nonce: bytes
) -> SharedArea | None:
    """What an earlier daemon of this boot left under this nonce; None for anything else."""
    if nonce == bytes(NONCE_BYTES):
        return None
    view = memory.open(nonce, area_bytes(identity))
    if view is None:
        return None
    interval = int(_FIXED.unpack_from(view)[7])
    fixed = _fixed(identity, generation, boot_id, nonce, interval)
    if bytes(view[: len(fixed)]) != fixed:
        view.release()
        return None
    return SharedArea(view, nonce, interval)

"""The states of an AVHD's blocks in shared memory: what a killed daemon's successor takes up again.

A guest goes on after its ``diskd`` was killed, and has had writes acknowledged since its last flush. Their
bytes are in the page cache; without their entries in the map, though, they would be lost to it. So the map
lives in a MAP_SHARED file on tmpfs, allocated in full before use (touching a hole on a full tmpfs is a
SIGBUS). It is believed only under the same boot, and only the file that ``checkpoint/live`` names.

    64 bytes: magic, boot id; then two bits per block as in core.avhd
"""

import contextlib
import mmap
import os
import secrets
from pathlib import Path
from typing import Final
from uuid import UUID

from diskd.errors import Refused

_PREFIX: Final = "holdfast-"
_SUFFIX: Final = ".avhd"
_HEADER_BYTES: Final = 64
_MAGIC: Final = b"HFLIVE01"


class LiveMap:
    """One mapped file. ``cells`` is writable memory, zero at first."""

    def __init__(self, path: Path, memory: mmap.mmap) -> None:
        self._path = path
        self._memory = memory
        self.cells = memoryview(memory)[_HEADER_BYTES:]

    @classmethod
    def create(cls, directory: Path, nonce: str, cells: bytes, boot_id: str) -> "LiveMap":
        """Raises Refused where the memory cannot be had."""
        path = _path(directory, nonce)
        size = _HEADER_BYTES + len(cells)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Refused(f"no shared memory for the checkpoint's map: {path}: {error.strerror}") from error
        try:
            os.posix_fallocate(descriptor, 0, size)
            memory = mmap.mmap(descriptor, size, mmap.MAP_SHARED)
        except OSError as error:
            os.unlink(path)
            raise Refused(
                f"no shared memory for the checkpoint's map: {size} bytes in {directory}: {error.strerror}"
            ) from error
        finally:
            os.close(descriptor)
        live = cls(path, memory)
        live.cells[:] = cells
        memory[:_HEADER_BYTES] = _header(boot_id)
        return live

    def close(self) -> None:
        """Forget it: the durable map says everything (or will be believed instead)."""
        self.abandon()
        with contextlib.suppress(OSError):
            os.unlink(self._path)

    def abandon(self) -> None:
        """Let go of the memory, as the end of the process does; the file stays for a successor."""
        # A numpy view over the memory keeps the mapping alive until it is collected; closing is then its.
        with contextlib.suppress(BufferError):
            self.cells.release()
            self._memory.close()


def recover(directory: Path, nonce: str, cell_bytes: int, boot_id: str) -> bytes | None:
    """The states that an earlier process of this boot left behind, or None."""
    try:
        with _path(directory, nonce).open("rb") as file:
            data = file.read(_HEADER_BYTES + cell_bytes + 1)
    except OSError:
        return None
    if len(data) != _HEADER_BYTES + cell_bytes or data[:_HEADER_BYTES] != _header(boot_id):
        return None
    return data[_HEADER_BYTES:]


def new_nonce(image: UUID) -> str:
    """A name for another mapped copy of an image's map, which tells whose it is."""
    return f"{image.hex}{secrets.token_hex(16)}"


def forget_others(directory: Path, image: UUID, keep: str | None) -> None:
    """Remove what a killed daemon had made before a head named it, or not yet removed after."""
    for path in directory.glob(f"{_PREFIX}{image.hex}*{_SUFFIX}"):
        if keep is None or path != _path(directory, keep):
            with contextlib.suppress(OSError):
                path.unlink()


def _path(directory: Path, nonce: str) -> Path:
    return directory / f"{_PREFIX}{nonce}{_SUFFIX}"


def _header(boot_id: str) -> bytes:
    return (_MAGIC + boot_id.encode()).ljust(_HEADER_BYTES, b"\0")[:_HEADER_BYTES]

"""Shared bitmaps on tmpfs: files mapped shared, allocated in full before anybody touches them (T3).

A hole on a full tmpfs would be a SIGBUS at the first mark, so the whole file is reserved, or refused.
"""

import contextlib
import errno
import mmap
import os
import weakref
from pathlib import Path
from typing import Final
from uuid import UUID

_PREFIX: Final = "holdfast-"


class SharedDirectory:
    """core.shared.SharedMemory for one image. ``close`` unmaps; views must have been released before."""

    def __init__(self, directory: Path, image: UUID) -> None:
        self._directory = directory
        self._prefix = f"{_PREFIX}{image.hex}-"
        # A mapping lives exactly as long as somebody has a view of it: every cut takes another one.
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    def _path(self, nonce: bytes) -> Path:
        return self._directory / f"{self._prefix}{nonce.hex()}"

    def create(self, nonce: bytes, size_bytes: int) -> memoryview:
        path = self._path(nonce)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size_bytes)
            return self._map(descriptor, size_bytes)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(path)
            error.filename = str(path)
            raise
        finally:
            os.close(descriptor)

    def open(self, nonce: bytes, size_bytes: int) -> memoryview | None:
        try:
            descriptor = os.open(self._path(nonce), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(descriptor)
            # Nobody but us makes holes in it; a file with holes is not ours, and could not be written safely.
            if status.st_size != size_bytes or status.st_blocks * 512 < size_bytes:
                return None
            return self._map(descriptor, size_bytes)
        finally:
            os.close(descriptor)

    def remove(self, nonce: bytes) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(nonce))

    def remove_others(self, keep: bytes) -> None:
        """Remove what earlier openings of this image left, which no header names any more."""
        for path in self._directory.glob(f"{self._prefix}*"):
            if path != self._path(keep):
                with contextlib.suppress(OSError):
                    path.unlink()

    def remove_all(self) -> None:
        """Remove whatever any opening of this image left; nobody has it open."""
        self.remove_others(b"")

    def close(self) -> None:
        """Unmap everything. The files stay."""
        for mapped in list(self._maps):
            # A view still held by a running call keeps its mapping until that call ends.
            with contextlib.suppress(BufferError):
                mapped.close()

    def _map(self, descriptor: int, size_bytes: int) -> memoryview:
        if size_bytes <= 0:
            raise OSError(errno.EINVAL, "an empty shared bitmap")
        mapped = mmap.mmap(descriptor, size_bytes, mmap.MAP_SHARED)
        self._maps.add(mapped)
        return memoryview(mapped)

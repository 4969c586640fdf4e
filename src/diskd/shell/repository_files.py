"""Everything that the repository does to its file system, in one place.

The order of these calls is what B5 rests on: tests pass a variant that stops after every single one.
"""

import ctypes
import errno
import fcntl
import os
import shutil
import struct
from pathlib import Path
from typing import Final

from blake3 import blake3

from daemonkit.durable import sync_directory, write_all
from diskd.errors import Refused
from diskd.shell.work import Poll, count

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
_SYNC_FILE_RANGE_WRITE: Final = 2
_READ_BYTES: Final = 1 << 20
# linux/fs.h: _IOW(0x94, 13, struct file_clone_range).
_FICLONERANGE: Final = 0x4020940D
_CLONE_RANGE: Final = struct.Struct("=qQQQ")
_CANNOT_SHARE: Final = (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EXDEV, errno.EINVAL)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class RepositoryFiles:
    """Durable file operations; every method is one step that a crash may precede or follow."""

    def make_directory(self, path: Path) -> None:
        """Durable in its parent."""
        path.mkdir()
        self.sync_directory(path.parent)

    def create(self, path: Path) -> int:
        """A descriptor of a new, empty file."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def reopen(self, path: Path) -> int:
        """A descriptor of a file that is there. Raises OSError."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def remove(self, path: Path) -> None:
        """Unlink; durable once the directory is synced."""
        os.unlink(path)

    def write(self, descriptor: int, offset: int, data: bytes | memoryview) -> None:
        """All of it. Raises OSError (ENOSPC among others)."""
        write_all(descriptor, data, offset)

    def set_size(self, descriptor: int, size: int) -> None:
        """Sparse."""
        os.ftruncate(descriptor, size)

    def start_writeback(self, descriptor: int, offset: int, length: int) -> None:
        """Have a range's dirty pages on their way, so that a later sync has little left to wait for. No
        promise of any kind, and so no error."""
        _libc.sync_file_range(descriptor, offset, length, _SYNC_FILE_RANGE_WRITE)

    def clone(self, source: int, offset: int, descriptor: int, to: int, length: int) -> bool:
        """Have ``descriptor`` share a range's extents with another file, as if it had been copied; False
        where this file system, or this range, cannot be shared. Raises OSError (ENOSPC among others)."""
        try:
            fcntl.ioctl(descriptor, _FICLONERANGE, _CLONE_RANGE.pack(source, offset, length, to))
        except OSError as error:
            if error.errno in _CANNOT_SHARE:
                return False
            raise
        return True

    def sync(self, descriptor: int) -> None:
        """Final if it fails."""
        os.fsync(descriptor)

    def write_file(self, path: Path, data: bytes) -> None:
        """A new small file, durable; its name is durable once the directory is synced."""
        descriptor = self.create(path)
        try:
            self.write(descriptor, 0, data)
            self.sync(descriptor)
        finally:
            os.close(descriptor)

    def sync_directory(self, path: Path) -> None:
        """Make its names durable."""
        sync_directory(path)

    def publish(self, temporary: Path, final: Path) -> None:
        """The commit: the directory gets its name, atomically. Raises OSError if the name is taken."""
        if final.exists():
            raise FileExistsError(errno.EEXIST, "the point exists already", str(final))
        os.rename(temporary, final)

    def exchange(self, one: Path, other: Path) -> None:
        """Swap two directories, atomically. Raises Refused where the file system cannot."""
        result = _libc.renameat2(
            _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)
        )
        if result != 0:
            code = ctypes.get_errno()
            if code in (errno.EINVAL, errno.ENOSYS):
                raise Refused(
                    f"the file system of {one.parent} cannot exchange two directories; use ext4, xfs or btrfs"
                )
            raise OSError(code, os.strerror(code), str(other))

    def retire(self, point: Path, temporary: Path) -> None:
        """The point loses its name, atomically and durably."""
        os.rename(point, temporary)
        self.sync_directory(point.parent)

    def remove_tree(self, path: Path) -> None:
        """Remove a directory that nothing names any more."""
        shutil.rmtree(path)
        self.sync_directory(path.parent)


def digest_file(path: Path, poll: Poll) -> tuple[int, str]:
    """(size, BLAKE3 in hex) of a file's bytes; ``poll`` is called about once a megabyte and may raise."""
    digest, size = blake3(), 0
    buffer = bytearray(_READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while taken := file.readinto(buffer):
            digest.update(memoryview(buffer)[:taken])
            size += taken
            count(poll, taken)
            poll()
    return size, digest.hexdigest()

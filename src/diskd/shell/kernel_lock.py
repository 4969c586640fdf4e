"""Open-file-description locks: held as long as a descriptor is open, by whichever thread, gone with a crash.

Over NFS and its like they are the server's; a file system that does not pass them on keeps them to one host.
"""

import fcntl
import os
import struct
from pathlib import Path
from typing import Final

_FLOCK: Final = "hhqqi4x"  # struct flock: type, whence, start, length, pid


def _flock(kind: int, start: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, start, 1, 0)


def take(descriptor: int, byte: int = 0, *, shared: bool = False) -> bool:
    """Lock one byte; False where somebody else's lock conflicts."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK if shared else fcntl.F_WRLCK, byte))
    except (BlockingIOError, PermissionError):
        return False
    return True


def is_free(descriptor: int, byte: int = 0) -> bool:
    """Whether nobody else has any lock on the byte; nothing is locked."""
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
    return bool(struct.unpack(_FLOCK, answer)[0] == fcntl.F_UNLCK)


def is_still_held(descriptor: int, path: Path) -> bool:
    """Whether the lock taken on byte 0 is still there, and on the file of that name."""
    try:
        other = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return os.path.sameopenfile(descriptor, other) and not is_free(other)
    finally:
        os.close(other)

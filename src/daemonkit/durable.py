"""Small files that are either the old or the new version after a crash, never a mixture.

The order is write to a temporary name in the same directory, fsync, rename, fsync the directory.
A failed fsync is final (Linux forgets it on retry): the error goes to the caller, the temporary file
is removed, the old version stays.
"""

import contextlib
import errno
import fcntl
import os
import secrets
from pathlib import Path

from daemonkit.errors import OperatorError

SMALL_FILE_BYTES_MAX = 1 << 20


class LockHeldError(OperatorError):
    """Another process holds the lock; the message says which file."""


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview, offset: int = 0) -> None:
    """pwrite until everything is written; raises OSError (ENOSPC among others)."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        if written == 0:
            raise OSError(errno.EIO, "a write made no progress")
        view, offset = view[written:], offset + written


def replace_file(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Durably make ``path`` hold ``data``. Raises OSError; then the old content is still there.

    But for EIO: then the new content may be there, and nobody knows which of them a power loss would leave.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        try:
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a failed write or fsync knows its descriptor only
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    try:
        sync_directory(path.parent)
    except OSError as error:
        # Also where that says ENOSPC: a caller must not take it for a refusal that has changed nothing.
        raise OSError(errno.EIO, f"renamed, but not for sure: {error.strerror}", str(path)) from error


def create_file(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Durably make a new file hold ``data``. Raises FileExistsError where there is one, else OSError.

    By a link to a whole file: so nobody ever sees half of it, and of several that try at once, on one host
    or on several that share a file system, exactly one succeeds.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        try:
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _link(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    sync_directory(path.parent)


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        # Over NFS an answer may be lost and the call be sent again: then what exists already is ours.
        if temporary.stat().st_nlink == 1:
            raise


def remove_file(path: Path) -> None:
    """Durably remove ``path``; absent is fine."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
        sync_directory(path.parent)


def read_small_file(path: Path, *, size_bytes_max: int = SMALL_FILE_BYTES_MAX) -> bytes:
    """The whole content. Raises OperatorError above the bound, OSError as open and read do."""
    with path.open("rb") as file:
        data = file.read(size_bytes_max + 1)
    if len(data) > size_bytes_max:
        raise OperatorError(f"{path}: larger than {size_bytes_max} bytes, which no such file of ours is")
    return data


def lock_file(path: Path) -> int:
    """A descriptor that holds an exclusive lock on ``path`` until it is closed in every process that has it.

    Raises LockHeldError where somebody else holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise LockHeldError(f"{path}: in use by another process") from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor

"""Runs scripts (diskd.core.steps) on the real files of one directory, a whole script in one thread hop.

Descriptors stay open until ``close``; every step after it fails with ESHUTDOWN: the files may be another
daemon's by then, and a call that was late here must not write to them. A failed Sync is final: the kernel
reports it once and forgets, so from then on every step on that file fails with EIO until the files are opened
anew. Syncs of one file take turns, so that of two at once not only one learns of a failure.
"""

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import trio

from daemonkit import durable
from diskd.core.steps import (
    Allocate,
    Create,
    Names,
    Punch,
    Read,
    Remove,
    Replace,
    Script,
    Size,
    Step,
    Sync,
    Truncate,
    Write,
)

T = TypeVar("T")

SCRIPT_THREADS_MAX: Final = 16
# The page cache keeps what one write brought in units as large as that write, and a later small write walks
# all blocks of the unit that it hits: after writes of 1 MiB it takes twice as long as after these (ADR 0030).
WRITE_PIECE_BYTES: Final = 256 << 10
KEEP_SIZE: Final = 0x01
PUNCH_HOLE: Final = 0x02
ZERO_RANGE: Final = 0x10
_UNSUPPORTED: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def _resident_zeroes() -> memoryview:
    """1 MiB of zeroes that lie in memory, from the start of a page on.

    Of ``bytes(n)`` the kernel has only the first page, with the object's head in it. A write of it copies up
    to where that page ends, which is anywhere in a sector of the file, before it fetches the next one: killed
    between the two, it leaves half a sector zeroed.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    return memoryview(mmap.mmap(-1, 1 << 20, flags=flags)).toreadonly()


ZEROES: Final = _resident_zeroes()

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), which os lacks. Raises OSError. Lets other threads run meanwhile."""
    while _libc.fallocate(descriptor, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def write_data(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """pwrite all of a disk's data, in pieces that keep later small writes fast. Raises OSError."""
    view = memoryview(data)
    for start in range(0, len(view), WRITE_PIECE_BYTES):
        durable.write_all(descriptor, view[start : start + WRITE_PIECE_BYTES], offset + start)


def zeroes(length: int) -> memoryview:
    """That many to write from, whatever kills the process meanwhile."""
    if length <= len(ZEROES):
        return ZEROES[:length]
    data = bytearray(length)
    data[:] = bytes(length)  # written once, it is in memory
    return memoryview(data)


def write_zeroes(descriptor: int, offset: int, length: int) -> None:
    """Plain zeroes, where the file system can do nothing better."""
    end = offset + length
    while offset < end:
        part = min(len(ZEROES), end - offset)
        write_data(descriptor, zeroes(part), offset)
        offset += part


def zeroes_fast(descriptor: int) -> bool:
    """Whether the file system of an open file punches holes and zeroes ranges without writing them.

    Tried on a nameless file beside it: the open one must not be touched.
    """
    try:
        directory = os.path.dirname(os.readlink(f"/proc/self/fd/{descriptor}"))
        probe = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return False
    try:
        os.ftruncate(probe, 1 << 16)
        fallocate(probe, ZERO_RANGE | KEEP_SIZE, 0, 1 << 16)
        fallocate(probe, PUNCH_HOLE | KEEP_SIZE, 0, 1 << 16)
    except OSError:
        return False
    finally:
        os.close(probe)
    return True


def punch(descriptor: int, offset: int, length: int) -> None:
    """Deallocate a range inside the file; zeroes are written where the file system cannot."""
    try:
        fallocate(descriptor, PUNCH_HOLE | KEEP_SIZE, offset, length)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        end = min(offset + length, os.fstat(descriptor).st_size)
        if end > offset:
            write_zeroes(descriptor, offset, end - offset)


def read_all(descriptor: int, offset: int, length: int) -> bytes:
    """pread until ``length`` bytes or the end of the file."""
    data = os.pread(descriptor, length, offset)
    if len(data) == length:
        return data
    parts = [data]
    while parts[-1] and (length := length - len(parts[-1])):
        offset += len(parts[-1])
        parts.append(os.pread(descriptor, length, offset))
    return b"".join(parts)


class Files:
    """One directory's files. ``run_blocking`` may be called from several threads at once."""

    def __init__(self, directory: Path, *, sync: Callable[[int], None] = os.fdatasync) -> None:
        self.directory = directory
        self._sync = sync
        self._lock = threading.Lock()
        self._descriptors: dict[str, int] = {}
        self._sync_locks: dict[str, threading.Lock] = {}
        self._failed: set[str] = set()
        self._is_closed = False
        self._limiter = trio.CapacityLimiter(SCRIPT_THREADS_MAX)

    async def run(self, script: Script[T]) -> T:
        """The script's result. Raises what it raises: OSError of a step, or its own errors."""
        return await trio.to_thread.run_sync(self.run_blocking, script, limiter=self._limiter)

    def run_blocking(self, script: Script[T]) -> T:
        """As ``run``, in this thread."""
        try:
            step = next(script)
            while True:
                try:
                    result = self._step(step)
                except OSError as error:
                    if error.filename is None:
                        error.filename = str(self.directory / step.file)
                    step = script.throw(error)
                else:
                    step = script.send(result)
        except StopIteration as stop:
            value: T = stop.value
            return value

    def descriptor(self, name: str) -> int:
        """The open descriptor of an existing file; valid until ``close``, Replace or Remove of it."""
        return self._open(name, os.O_RDWR)

    def sync(self, name: str) -> None:
        """fdatasync; a failure is final for this file."""
        descriptor = self.descriptor(name)
        with self._lock:
            lock = self._sync_locks.setdefault(name, threading.Lock())
        with lock:
            self._check(name)
            try:
                self._sync(descriptor)
            except OSError:
                self._failed.add(name)
                raise

    def close(self) -> None:
        """Idempotent. No step may be under way; a script that still runs fails at its next one."""
        with self._lock:
            self._is_closed = True
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def _check(self, name: str) -> None:
        if self._is_closed:
            raise OSError(errno.ESHUTDOWN, "the files are closed", str(self.directory / name))
        if name in self._failed:
            raise OSError(errno.EIO, "an earlier sync failed; reopen the image", str(self.directory / name))

    def _open(self, name: str, flags: int) -> int:
        with self._lock:
            self._check(name)
            descriptor = self._descriptors.get(name)
            if descriptor is None:
                path = self.directory / name
                created = bool(flags & os.O_CREAT) and not path.exists()
                descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
                self._descriptors[name] = descriptor
                if created:
                    durable.sync_directory(self.directory)
            return descriptor

    def _forget(self, name: str) -> None:
        with self._lock:
            descriptor = self._descriptors.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)

    def _step(self, step: Step) -> Any:
        if self._is_closed:
            raise OSError(errno.ESHUTDOWN, "the files are closed")
        match step:
            case Write(name, offset, data):
                return write_data(self._open(name, os.O_RDWR), data, offset)
            case Read(name, offset, length):
                return read_all(self._open(name, os.O_RDWR), offset, length)
            case Sync(name):
                return self.sync(name)
            case Punch(name, offset, length):
                return punch(self._open(name, os.O_RDWR), offset, length)
            case Allocate(name, size):
                return os.posix_fallocate(self._open(name, os.O_RDWR | os.O_CREAT), 0, size)
            case Truncate(name, size):
                return os.ftruncate(self._open(name, os.O_RDWR | os.O_CREAT), size)
            case Replace(name, data):
                self._forget(name)
                return durable.replace_file(self.directory / name, data)
            case Create(name, data):
                return durable.create_file(self.directory / name, data)
            case Names(prefix):
                return sorted(name for name in os.listdir(self.directory) if name.startswith(prefix))
            case Remove(name):
                self._forget(name)
                return durable.remove_file(self.directory / name)
            case Size(name):
                try:
                    return os.stat(self.directory / name).st_size
                except FileNotFoundError:
                    return None

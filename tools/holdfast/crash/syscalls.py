"""The system calls with which a process changes files, each preceded by a note of what it changes.

``install`` puts them where Python keeps the real ones, in module ``os``, before anything of diskd is
imported: so nothing that diskd does to a file under its root gets past them, and diskd has no code for tests.
fallocate(2), which os lacks, is taken over where diskd binds it. A file under the root that is opened for
writing in another way ends the call: a change without a note would be one that no power loss takes back.
"""

import json
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from holdfast.crash.journal import SECTOR, Journal, Place

_TAKEN: Final = (
    "open", "write", "pwrite", "pwritev", "ftruncate", "posix_fallocate", "fsync", "fdatasync", "fstat",
    "stat", "rename", "replace", "unlink", "remove", "mkdir", "rmdir", "link", "symlink", "truncate",
    "copy_file_range",
)  # fmt: skip
_REAL: Final[dict[str, Callable[..., Any]]] = {name: getattr(os, name) for name in _TAKEN}
_PIECE: Final = 1 << 20


class Moment:
    """When the process kills itself with -9: right before it changes, syncs or renames to a file of a certain
    name for the so-many-th time from when that was asked for. Where a change goes wrong between two others,
    a kill at random hardly ever meets it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._asked: tuple[str, int] | None = None

    @staticmethod
    def ask(path: Path, name: str, count: int) -> None:
        """By whoever starts the process: let it die before the change that follows ``count`` others."""
        new = path.with_suffix(".new")
        new.write_text(f"{name} {count}")
        new.rename(path)

    def comes(self, name: str) -> None:
        """Such a change is next."""
        if self._asked is None:
            if not os.path.exists(self._path):
                return
            asked, count = self._path.read_text().split()
            self._asked = asked, int(count)
        asked, left = self._asked
        if name == asked:
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self._asked = asked, left - 1


class SystemCalls:
    """One process's calls; every method but the last few has the name and the meaning of the one in os."""

    def __init__(self, root: Path, place: Place) -> None:
        self._root = os.path.realpath(root)
        self._saved = place.saved
        self._lock = threading.RLock()
        self._journal = Journal(place)
        self._moment = Moment(place.moment)
        self._files: set[int] = set()
        self._names = 0
        times = json.loads(place.times.read_text()) if place.times.exists() else {}
        self._times = {int(inode): tuple(pair) for inode, pair in times.items()}
        for directory, _, names in os.walk(self._root):
            for name in names:
                self._files.add(_REAL["stat"](os.path.join(directory, name)).st_ino)

    def install(self) -> None:
        """From now on for this whole process."""
        for name in _TAKEN:
            setattr(os, name, getattr(self, name))
        sys.addaudithook(self._watch)

    # --- files

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        full = self._full(path, dir_fd)
        if full is None or flags & os.O_TMPFILE == os.O_TMPFILE:
            return int(_REAL["open"](path, flags, mode, dir_fd=dir_fd))
        with self._lock:
            exists = os.path.lexists(full)
            if flags & os.O_CREAT and not exists:
                self._note("create", *self._entry(full))
            elif flags & os.O_TRUNC and exists:
                descriptor = _REAL["open"](full, os.O_RDWR)
                self.ftruncate(descriptor, 0)
                os.close(descriptor)
            descriptor = int(_REAL["open"](path, flags, mode, dir_fd=dir_fd))
            status = _REAL["fstat"](descriptor)
            if stat.S_ISREG(status.st_mode):
                self._files.add(status.st_ino)
            return descriptor

    def write(self, descriptor: int, data: Any) -> int:
        if self._tracked(descriptor):
            return self.pwrite(descriptor, data, os.lseek(descriptor, 0, os.SEEK_CUR))
        return int(_REAL["write"](descriptor, data))

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        if not self._tracked(descriptor):
            return int(_REAL["pwrite"](descriptor, data, offset))
        with self._lock:
            self._before(descriptor, offset, memoryview(data).nbytes)
            return int(_REAL["pwrite"](descriptor, data, offset))

    def pwritev(self, descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if not self._tracked(descriptor):
            return int(_REAL["pwritev"](descriptor, buffers, offset, flags))
        with self._lock:
            self._before(descriptor, offset, sum(memoryview(data).nbytes for data in buffers))
            return int(_REAL["pwritev"](descriptor, buffers, offset, flags))

    def copy_file_range(self, src: int, dst: int, count: int, *offsets: Any) -> int:
        self._refuse(dst)
        return int(_REAL["copy_file_range"](src, dst, count, *offsets))

    def ftruncate(self, descriptor: int, size: int) -> None:
        if not self._tracked(descriptor):
            _REAL["ftruncate"](descriptor, size)
            return
        with self._lock:
            old = _REAL["fstat"](descriptor).st_size
            if size < old:
                self._before(descriptor, size, old - size, sparse=True)
            self._before_resize(descriptor)
            _REAL["ftruncate"](descriptor, size)

    def truncate(self, path: Any, length: int) -> None:
        descriptor = self.open(path, os.O_RDWR)
        try:
            self.ftruncate(descriptor, length)
        finally:
            os.close(descriptor)

    def posix_fallocate(self, descriptor: int, offset: int, length: int) -> None:
        if not self._tracked(descriptor):
            _REAL["posix_fallocate"](descriptor, offset, length)
            return
        with self._lock:
            self._before_resize(descriptor)
            _REAL["posix_fallocate"](descriptor, offset, length)

    def fallocate(self, real: Callable[..., int]) -> Callable[..., int]:
        """fallocate(2) as ctypes calls it: here only for punching and zeroing inside the size."""

        def call(descriptor: int, mode: int, offset: int, length: int) -> int:
            if not self._tracked(descriptor):
                return real(descriptor, mode, offset, length)
            with self._lock:
                self._before(descriptor, offset, length, sparse=True)
                return real(descriptor, mode, offset, length)

        return call

    def exchange(self, real: Callable[..., int]) -> Callable[..., int]:
        """renameat2(2) as ctypes calls it: here only for swapping two names."""

        def call(_at: int, one: bytes, _at_too: int, other: bytes, flags: Any) -> int:
            first, second = self._full(one, None), self._full(other, None)
            if first is None or second is None:
                return real(_at, one, _at_too, other, flags)
            with self._lock:
                self._note("exchange", *self._entry(first), *self._entry(second))
                return real(_at, one, _at_too, other, flags)

        return call

    def fsync(self, descriptor: int) -> None:
        self._sync("fsync", descriptor)

    def fdatasync(self, descriptor: int) -> None:
        self._sync("fdatasync", descriptor)

    def fstat(self, descriptor: int) -> os.stat_result:
        return self._as_it_was(_REAL["fstat"](descriptor))

    def stat(self, path: Any, **options: Any) -> os.stat_result:
        return self._as_it_was(_REAL["stat"](path, **options))

    # --- names

    def rename(
        self, src: Any, dst: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None
    ) -> None:
        source, target = self._full(src, src_dir_fd), self._full(dst, dst_dir_fd)
        if source is None and target is None:
            _REAL["rename"](src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            return
        if source is None or target is None:
            raise RuntimeError(f"a rename across the root: {src} to {dst}")
        with self._lock:
            self._moment.comes(os.path.basename(target))
            saved = self._save(target) if os.path.isfile(target) else None
            self._note("rename", *self._entry(source), *self._entry(target), saved)
            _REAL["rename"](source, target)

    replace = rename

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        full = self._full(path, dir_fd)
        if full is None or not os.path.lexists(full):
            _REAL["unlink"](path, dir_fd=dir_fd)
            return
        with self._lock:
            self._note("remove", *self._entry(full), self._save(full))
            _REAL["unlink"](full)

    remove = unlink

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        full = self._full(path, dir_fd)
        if full is None or os.path.lexists(full):
            _REAL["mkdir"](path, mode, dir_fd=dir_fd)
            return
        with self._lock:
            self._note("create", *self._entry(full))
            _REAL["mkdir"](full, mode)

    def rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        full = self._full(path, dir_fd)
        if full is None or not os.path.isdir(full) or os.listdir(full):
            _REAL["rmdir"](path, dir_fd=dir_fd)
            return
        with self._lock:
            name = self._saved_name()
            self._note("remove", *self._entry(full), name)
            _REAL["rename"](full, self._saved / name)  # an empty directory that keeps its inode

    def link(self, src: Any, dst: Any, **options: Any) -> None:
        full = self._full(dst, options.get("dst_dir_fd"))
        if full is None or os.path.lexists(full):
            _REAL["link"](src, dst, **options)
            return
        with self._lock:
            self._note("create", *self._entry(full))
            _REAL["link"](src, dst, **options)

    def symlink(self, src: Any, dst: Any, **options: Any) -> None:
        if self._full(dst, options.get("dir_fd")) is not None:
            raise RuntimeError(f"a symbolic link under the root, which has no note: {dst}")
        _REAL["symlink"](src, dst, **options)

    # --- notes

    def _note(self, *record: Any) -> None:
        self._journal.add(_REAL["write"], *record)

    def _full(self, path: Any, dir_fd: int | None) -> str | None:
        """The path under the root, or None for one elsewhere."""
        if isinstance(path, int):
            return None
        text = os.fsdecode(path)
        if dir_fd is not None and not os.path.isabs(text):
            text = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), text)
        directory, name = os.path.split(os.path.abspath(text))
        full = os.path.join(os.path.realpath(directory), name)
        return full if full.startswith(self._root + "/") else None

    def _entry(self, full: str) -> tuple[int, str]:
        directory, name = os.path.split(full)
        return _REAL["stat"](directory).st_ino, name

    def _saved_name(self) -> str:
        self._names += 1
        return f"{self._journal.number}.{self._names}"

    def _save(self, full: str) -> str:
        name = self._saved_name()
        _REAL["link"](full, self._saved / name, follow_symlinks=False)
        return name

    @staticmethod
    def _name_of(descriptor: int) -> str:
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    def _tracked(self, descriptor: int) -> bool:
        status = _REAL["fstat"](descriptor)
        return status.st_ino in self._files and stat.S_ISREG(status.st_mode)

    def _refuse(self, descriptor: int) -> None:
        if self._tracked(descriptor):
            raise RuntimeError("a change under the root by a system call that has no note")

    def _before(self, descriptor: int, offset: int, length: int, *, sparse: bool = False) -> None:
        """Note the old content, in whole sectors; ``sparse``: what is a hole is zero before and after."""
        self._moment.comes(self._name_of(descriptor))
        # The descriptor itself may be for writing only.
        reader = _REAL["open"](f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._note_old(reader, offset, length, sparse=sparse)
        finally:
            os.close(reader)

    def _note_old(self, descriptor: int, offset: int, length: int, *, sparse: bool) -> None:
        status = _REAL["fstat"](descriptor)
        first, end = offset // SECTOR * SECTOR, -(-(offset + length) // SECTOR) * SECTOR
        if sparse:
            end = min(end, -(-status.st_size // SECTOR) * SECTOR)
        position = first
        while position < end:
            if sparse:
                try:
                    data = os.lseek(descriptor, position, os.SEEK_DATA)
                except OSError:
                    return
                position = max(position, data // SECTOR * SECTOR)
                if position >= end:
                    return
            part = min(_PIECE, end - position)
            old = os.pread(descriptor, part, position).ljust(part, b"\0")
            self._note("data", status.st_ino, status.st_size, status.st_mtime_ns, position, old)
            position += part

    def _before_resize(self, descriptor: int) -> None:
        status = _REAL["fstat"](descriptor)
        self._note("size", status.st_ino, status.st_size, status.st_mtime_ns)

    def _sync(self, name: str, descriptor: int) -> None:
        status = _REAL["fstat"](descriptor)
        with self._lock:
            self._moment.comes(self._name_of(descriptor))
            position = self._journal.position
        _REAL[name](descriptor)
        with self._lock:
            self._note("sync", status.st_ino, position)

    def _as_it_was(self, status: os.stat_result) -> os.stat_result:
        """Undoing changes a file's ctime, which nobody can set: until it changes again, the one before."""
        after, before = self._times.get(status.st_ino, (None, 0))
        if status.st_ctime_ns != after:
            return status
        fields = {name: getattr(status, name) for name in dir(status) if name.startswith("st_")}
        return os.stat_result(tuple(status), {**fields, "st_ctime_ns": before})

    def _watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str | bytes):
            return
        _, mode, flags = arguments
        if mode is not None and flags & (os.O_WRONLY | os.O_RDWR) and self._full(arguments[0], None):
            raise RuntimeError(f"{arguments[0]!r} is opened for writing in a way that leaves no note")

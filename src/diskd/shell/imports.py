"""Brings the content of a disk into the raw file of a new image: from a file, or from a client's pipe.

Raw files are copied as they are; what another format's signature names goes through ``qemu-img convert``,
straight into the new raw file. The format is never guessed from a name. Holes and blocks of zeroes become
holes. Which files are refused, and why, is told in core/foreign.py; here qemu-img is kept within limits: its
memory, the size of what it writes, the time without progress, and the room that others' images need.

What fills the file knows nothing of images: whoever calls throws everything away if it raises.
"""

import contextlib
import os
import resource
import shutil
import stat
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import trio

from daemonkit.errors import ProtocolError
from daemonkit.frames import FrameReader
from daemonkit.units import GiB, MiB, format_size
from diskd.core import foreign, import_stream
from diskd.core.foreign import SourceFormat
from diskd.errors import Refused
from diskd.shell.files import write_data

Progress = Callable[[int, int], None]  # bytes done, bytes in total
SizeCheck = Callable[[int], None]  # raises Refused for a size that no image here can have

SECTOR_BYTES: Final = 512
_CHUNK_BYTES: Final = 1 * MiB
# Smaller holes save nothing: it is the block of the file systems that images lie on.
_ZERO_GRAIN_BYTES: Final = 4096
_INFO_SECONDS_MAX: Final = 60.0
# qemu-img tells every hundredth of a percent; of the largest image that is 6.5 GiB.
_STALLED_SECONDS_MAX: Final = 600.0
# Measured with images of 1 TiB: a few hundred MiB of address space.
_ADDRESS_SPACE_MAX: Final = 2 * GiB
# Running guests' writes need room too: an import stops before it takes the last of it.
_FREE_BYTES_MIN: Final = 1 * GiB
_FREE_SHARE_MIN: Final = 0.02
_WATCH_SECONDS: Final = 0.5
_OUTPUT_BYTES_MAX: Final = 64 << 10


def whole_sectors(size_bytes: int) -> int:
    """The size that an image of so many bytes gets."""
    return -(-size_bytes // SECTOR_BYTES) * SECTOR_BYTES


async def fill_from_file(source: Path, raw: Path, check: SizeCheck, progress: Progress | None) -> None:
    """Make ``raw`` the content of ``source``, whatever of our formats it is in. Raises Refused, OSError."""
    async with room_kept(raw.parent):
        kind = await trio.to_thread.run_sync(_identify, source)
        if kind == "raw":
            await _copy_raw(source, raw, check, progress)
        else:
            await _convert(source, kind, raw, check, progress)


def _identify(source: Path) -> SourceFormat:
    descriptor = _open(source)
    try:
        return foreign.identify(os.pread(descriptor, foreign.HEAD_BYTES, 0))
    except Refused as error:
        raise Refused(f"{source} is not imported: {error}") from error
    finally:
        os.close(descriptor)


def _open(source: Path) -> int:
    """Raises Refused for what is no file or block device: a FIFO or a terminal would never end."""
    try:
        descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Refused(f"{source} (on diskd's host): {error.strerror}") from error
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        os.close(descriptor)
        raise Refused(
            f"{source} is neither a file nor a block device; to read a pipe: diskctl image import NAME -"
        )
    return descriptor


# --- raw -----------------------------------------------------------------------------------------------


async def _copy_raw(source: Path, raw: Path, check: SizeCheck, progress: Progress | None) -> None:
    descriptor = await trio.to_thread.run_sync(_open, source)
    try:
        size = await trio.to_thread.run_sync(os.lseek, descriptor, 0, os.SEEK_END)
        if size == 0:
            raise Refused(f"{source}: the file is empty")
        check(whole_sectors(size))
        file = await trio.to_thread.run_sync(SparseFile, raw)
        try:
            offset = 0
            while offset < size:
                offset = await trio.to_thread.run_sync(_copy_next, descriptor, offset, size, file)
                if progress is not None:
                    progress(offset, size)
            await trio.to_thread.run_sync(file.finish, whole_sectors(size))
        finally:
            file.close()
    finally:
        os.close(descriptor)


def _copy_next(descriptor: int, offset: int, size: int, file: "SparseFile") -> int:
    """Copy the next chunk that is not a hole; where to go on."""
    try:
        start = os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError:
        # ENXIO: only a hole is left. A block device knows none, and is all data.
        start = size if stat.S_ISREG(os.fstat(descriptor).st_mode) else offset
    start = max(offset, start // _ZERO_GRAIN_BYTES * _ZERO_GRAIN_BYTES)
    if start >= size:
        return size
    data = os.pread(descriptor, min(_CHUNK_BYTES, size - start), start)
    if not data:
        raise Refused("the file shrank while it was read: import it when nobody writes to it")
    file.write(start, data)
    return start + len(data)


class SparseFile:
    """A new file in which blocks of zeroes stay holes. Blocking; ``finish`` gives it its size, durably."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, offset: int, data: bytes) -> None:
        """Write what is not zero. Raises OSError."""
        view = memoryview(data)
        for start, end in _runs_of_data(data, offset % _ZERO_GRAIN_BYTES):
            write_data(self._descriptor, view[start:end], offset + start)

    def finish(self, size_bytes: int) -> None:
        os.ftruncate(self._descriptor, size_bytes)
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def _runs_of_data(data: bytes, skew: int) -> list[tuple[int, int]]:
    """Where data other than zeroes lies, in blocks; ``skew``: how far into a block all this begins."""
    if not skew and not any(data[:64]) and data.count(0) == len(data):
        return []
    lead, tail = skew, -(skew + len(data)) % _ZERO_GRAIN_BYTES
    padded = bytes(lead) + data + bytes(tail) if lead or tail else data
    used = np.frombuffer(padded, np.uint64).reshape(-1, _ZERO_GRAIN_BYTES // 8).any(axis=1)
    edges = (
        np.flatnonzero(np.diff(used, prepend=False, append=False)).reshape(-1, 2) * _ZERO_GRAIN_BYTES - lead
    )
    return [(max(0, int(start)), min(len(data), int(end))) for start, end in edges]


# --- other formats, through qemu-img ---------------------------------------------------------------------


async def _convert(
    source: Path, kind: SourceFormat, raw: Path, check: SizeCheck, progress: Progress | None
) -> None:
    program = qemu_img(f"{source} is {kind}: importing that")
    path = str(source)
    try:
        document = await _info(program, kind, path)
        size = whole_sectors(foreign.virtual_size(kind, path, document))
        check(size)
    except Refused as error:
        raise Refused(f"{source} is not imported: {error}") from error
    file = await trio.to_thread.run_sync(SparseFile, raw)
    try:
        argv = [
            program,
            "convert",
            "-n",
            "-p",
            "-t",
            "writeback",
            "-O",
            "raw",
            foreign.source_of(kind, path),
            str(raw),
        ]
        await trio.to_thread.run_sync(file.finish, size)
        await run_qemu_img(argv, str(source), size, progress, file_bytes_max=size)
        await trio.to_thread.run_sync(file.finish, size)
    finally:
        file.close()


async def _info(program: str, kind: SourceFormat, path: str) -> bytes:
    try:
        with trio.fail_after(_INFO_SECONDS_MAX):
            done = await trio.run_process(
                [program, "info", "--output=json", "-f", kind, path],
                stdin=subprocess.DEVNULL,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
    except trio.TooSlowError:
        raise Refused(f"qemu-img info did not end within {_INFO_SECONDS_MAX:g} s") from None
    if done.returncode != 0:
        raise Refused(f"qemu-img cannot read it: {_last_line(done.stderr, done.returncode)}")
    return done.stdout


def qemu_img(what: str) -> str:
    """The program's path. Raises Refused where it is not installed."""
    program = shutil.which("qemu-img")
    if program is None:
        raise Refused(f"{what} needs qemu-img (Debian: apt install qemu-utils)")
    return program


async def run_qemu_img(
    argv: list[str], source: str, size: int, progress: Progress | None, *, file_bytes_max: int | None = None
) -> None:
    """qemu-img convert, within its limits. Raises Refused with its own words."""
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                check=False,
            )
        )
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(process.pid, resource.RLIMIT_AS, (_ADDRESS_SPACE_MAX, _ADDRESS_SPACE_MAX))
            if file_bytes_max is not None:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (file_bytes_max, file_bytes_max))
            resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))
        said = bytearray()
        nursery.start_soon(_collect, process, said)
        await _follow(process, source, size, progress)
    code = process.returncode
    if code != 0:
        raise Refused(f"qemu-img could not convert {source}: {_last_line(bytes(said), code)}")


async def _collect(process: trio.Process, said: bytearray) -> None:
    assert process.stderr is not None
    async for part in process.stderr:
        said += part
        del said[:-_OUTPUT_BYTES_MAX]


async def _follow(process: trio.Process, source: str, size: int, progress: Progress | None) -> None:
    """Its progress; returns at the end of its output."""
    assert process.stdout is not None
    text, told = "", -1.0
    with trio.CancelScope() as scope:
        scope.deadline = trio.current_time() + _STALLED_SECONDS_MAX
        async for part in process.stdout:
            text = (text + part.decode("ascii", "replace"))[-256:]
            percent = foreign.percent_of(text)
            if percent is not None and percent > told:
                told = percent
                scope.deadline = trio.current_time() + _STALLED_SECONDS_MAX
                if progress is not None:
                    progress(int(size * percent / 100), size)
    if scope.cancelled_caught:
        process.kill()
        raise Refused(
            f"qemu-img made no progress on {source} for {_STALLED_SECONDS_MAX:g} s, and was stopped"
        )


def _last_line(said: bytes, code: int | None) -> str:
    lines = said.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else f"it ended with {code}"


# --- from a client -----------------------------------------------------------------------------------------


async def fill_from_stream(stream: trio.abc.Stream, raw: Path, check: SizeCheck) -> None:
    """Make ``raw`` what a client sends. Raises Refused; ProtocolError where the client breaks off."""
    async with room_kept(raw.parent):
        file = await trio.to_thread.run_sync(SparseFile, raw)
        try:
            offset = 0
            reader = FrameReader(frame_bytes_max=import_stream.MESSAGE_BYTES_MAX)
            while (piece := await _next_piece(stream, reader)) is not None:
                if isinstance(piece, int):
                    offset += piece
                else:
                    if offset == 0:
                        _refuse_formats(piece)
                    await trio.to_thread.run_sync(file.write, offset, piece)
                    offset += len(piece)
                if offset:
                    check(whole_sectors(offset))
            if offset == 0:
                raise Refused("the pipe ended before its first byte")
            await trio.to_thread.run_sync(file.finish, whole_sectors(offset))
        finally:
            file.close()


def _refuse_formats(head: bytes) -> None:
    kind = foreign.identify(head[: foreign.HEAD_BYTES])
    if kind != "raw":
        raise Refused(f"the pipe carries {kind}, which cannot be read in one pass: import it from its file")


async def _next_piece(stream: trio.abc.Stream, reader: FrameReader) -> import_stream.Piece:
    while (payload := reader.next_frame()) is None:
        try:
            with trio.fail_after(import_stream.SILENCE_SECONDS_MAX):
                data = await stream.receive_some(_CHUNK_BYTES)
        except trio.TooSlowError:
            limit = import_stream.SILENCE_SECONDS_MAX
            raise ProtocolError(f"the client was silent for {limit:g} s") from None
        if not data:
            raise ProtocolError("the client went away before the end of the image")
        reader.feed(data)
    return import_stream.decode_piece(payload)


# --- room --------------------------------------------------------------------------------


@asynccontextmanager
async def room_kept(
    directory: Path, shortage: Callable[[Path], Refused | None] | None = None
) -> AsyncIterator[None]:
    """Ends what runs within, with Refused, before the file system is full. Raises nothing else of its own."""
    found: Refused | None = None
    failure: Exception | None = None

    async def watch(scope: trio.CancelScope) -> None:
        nonlocal found
        while found is None:
            found = await trio.to_thread.run_sync(shortage or _shortage, directory)
            await trio.sleep(_WATCH_SECONDS)
        scope.cancel(reason="no room")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch, nursery.cancel_scope)
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised below, without the nursery's group around it
            failure = error
        nursery.cancel_scope.cancel(reason="done")
    if found is not None:
        raise found
    if failure is not None:
        raise failure


def _shortage(directory: Path) -> Refused | None:
    found = os.statvfs(directory)
    free, total = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    least = min(_FREE_BYTES_MIN, int(total * _FREE_SHARE_MIN))
    if free >= least:
        return None
    return Refused(
        f"only {format_size(free)} are free on {directory}, which running guests need: make room first"
    )

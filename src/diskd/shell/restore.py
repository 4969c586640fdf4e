"""Exports taken apart into files: a restore at its client, and `diskctl apply`.

Every frame is checked against its digest before it is written, the whole digest before anything gets
its final name (B4, B5). Files are written under names with a dot in front and renamed at the end, so
that an interrupted restore leaves nothing that looks like a disk.
"""

import contextlib
import fcntl
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, Literal, Protocol

import attrs
import trio

from daemonkit.durable import sync_directory, write_all
from daemonkit.errors import HoldfastError, OperatorError
from daemonkit.ports import Address
from daemonkit.rpc import connect
from diskd.core import applied
from diskd.core import target_calls as calls
from diskd.core.catalog import CONFIG
from diskd.core.qcow2 import FULL_CLUSTER_BYTES
from diskd.core.qcow2_writer import Qcow2Writer
from diskd.core.stream import ExportHeader, Frame, FrameKind, StreamDecoder, StreamError, Trailer
from diskd.errors import Refused
from diskd.shell.files import punch

DiskFormat = Literal["raw", "qcow2"]
Progress = Callable[[int], None]

CONTACT_SECONDS_MAX: Final = 10.0
SILENCE_SECONDS_MAX: Final = 120.0
PROGRESS_SECONDS: Final = 0.5
_MARK: Final = "user.holdfast.point"
_RECEIVE_BYTES: Final = 1 << 20


class DiskFile(Protocol):
    """One disk being written, in ascending order. ``finish``: the size of its file."""

    def data(self, offset: int, data: bytes) -> None: ...
    def zero(self, offset: int, length: int) -> None: ...
    def finish(self) -> int: ...


class RawDisk:
    """A sparse raw file of which nothing has been written."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._size = size

    def data(self, offset: int, data: bytes) -> None:
        write_all(self._descriptor, data, offset)

    def zero(self, offset: int, length: int) -> None:
        """Nothing to do: a hole reads as zeroes."""

    def finish(self) -> int:
        return self._size


@attrs.frozen
class Restored:
    """``files`` are the disks' paths, in order."""

    header: ExportHeader
    config: Path
    files: list[Path]
    data_bytes: int


def open_part(final: Path) -> tuple[Path, int]:
    """(path, descriptor) of the empty file that becomes ``final`` in the end; what an interrupted run left
    there is taken over. Raises Refused where another process is just writing it, or has finished."""
    temporary = final.with_name(f".{final.name}.part")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between the opening and the lock, the other one may have given the file its name.
        still_mine = temporary.exists() and temporary.stat().st_ino == os.fstat(descriptor).st_ino
        if final.exists() or not still_mine:
            if still_mine:
                temporary.unlink()
            raise Refused(f"{final} exists already; give another place")
        os.ftruncate(descriptor, 0)
    except BlockingIOError:
        os.close(descriptor)
        raise Refused(f"{final} is just being written by another process") from None
    except BaseException:
        os.close(descriptor)
        raise
    return temporary, descriptor


class RestoreFiles:
    """Writes the parts of a full export into a directory; blocking. ``publish`` or ``discard`` at the end."""

    def __init__(self, directory: Path, header: ExportHeader, disk_format: DiskFormat) -> None:
        """Raises Refused where something of that name is there already, OSError."""
        if header.kind != "full":
            raise StreamError("a restore is a full, this is a differential")
        self._directory = directory
        self._header = header
        self._format = disk_format
        self._made: list[tuple[Path, Path]] = []
        self._descriptors: list[int] = []
        self._disks: list[tuple[int, DiskFile]] = []
        directory.mkdir(parents=True, exist_ok=True)
        sync_directory(directory.parent)
        finals = [directory / f"{disk.name}.{disk_format}" for disk in header.disks]
        for path in (directory / CONFIG, *finals):
            if path.exists():
                raise Refused(f"{path} exists already; restore into another directory")
        try:
            write_all(self._create(directory / CONFIG), header.config.encode())
            for disk, final in zip(header.disks, finals, strict=True):
                self._disks.append(self._begin(final, disk.size_bytes))
        except BaseException:
            self.discard()
            raise

    def _create(self, final: Path) -> int:
        temporary, descriptor = open_part(final)
        self._made.append((temporary, final))
        self._descriptors.append(descriptor)
        return descriptor

    def _begin(self, final: Path, size: int) -> tuple[int, DiskFile]:
        descriptor = self._create(final)
        if self._format == "raw":
            return descriptor, RawDisk(descriptor, size)
        writer = Qcow2Writer(
            lambda offset, data: write_all(descriptor, data, offset),
            size_bytes=size,
            cluster_bytes=FULL_CLUSTER_BYTES,
        )
        return descriptor, writer

    def frame(self, frame: Frame) -> None:
        """Verify, then write. Raises StreamError, OSError."""
        frame.check()
        _, disk = self._disks[frame.header.disk]
        if frame.header.kind is FrameKind.DATA:
            disk.data(frame.header.offset, frame.data)
        else:
            disk.zero(frame.header.offset, frame.header.length)

    def publish(self, trailer: Trailer) -> Restored:
        """Everything durable under its final name."""
        for descriptor, disk in self._disks:
            os.ftruncate(descriptor, disk.finish())
        for descriptor in self._descriptors:
            os.fsync(descriptor)
        for temporary, final in self._made:
            os.rename(temporary, final)
        sync_directory(self._directory)
        files = [final for _, final in self._made[1:]]
        self._made = []
        return Restored(self._header, self._directory / CONFIG, files, trailer.data_bytes)

    def discard(self) -> None:
        """Close; remove what has no final name yet."""
        for temporary, _ in self._made:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        self._made = []
        while self._descriptors:
            os.close(self._descriptors.pop())


async def restore_point(
    target: Address,
    point: calls.PointName,
    directory: Path,
    *,
    disk_format: DiskFormat,
    key: bytes | None,
    on_progress: Progress,
) -> Restored:
    """Fetch a point and write its files. Raises OperatorError, OSError; then nothing is left behind."""
    async with point_stream(target, point, key) as stream:
        try:
            return await _restore(stream, point, directory, disk_format, on_progress)
        except StreamError as error:
            raise OperatorError(
                f"{error}; nothing was restored: try again, and see whether the target's copy is good"
                f" (diskctl target verify {point.vm})"
            ) from error


async def _restore(
    stream: trio.abc.Stream,
    point: calls.PointName,
    directory: Path,
    disk_format: DiskFormat,
    on_progress: Progress,
) -> Restored:
    decoder = StreamDecoder()
    header = await next_event(decoder, stream)
    if not isinstance(header, ExportHeader) or (header.vm, header.point) != (point.vm, point.point):
        raise StreamError("the target sent something else than was asked for")
    files = await trio.to_thread.run_sync(RestoreFiles, directory, header, disk_format)
    try:
        done, told = 0, float("-inf")
        while isinstance(event := await next_event(decoder, stream), Frame):
            await trio.to_thread.run_sync(files.frame, event)
            done += len(event.data)
            if trio.current_time() >= told + PROGRESS_SECONDS:
                told = trio.current_time()
                on_progress(done)
        if not isinstance(event, Trailer):
            raise StreamError("the stream has two headers")
        return await trio.to_thread.run_sync(files.publish, event)
    finally:
        files.discard()


@asynccontextmanager
async def point_stream(
    target: Address, point: calls.PointName, key: bytes | None
) -> AsyncIterator[trio.abc.Stream]:
    """The connection on which the target sends a point as a full export."""
    async with connect(target, key=key) as client:
        with trio.fail_after(CONTACT_SECONDS_MAX):
            stream = await client.open_stream(calls.RESTORE, point)
        yield stream


async def next_event(decoder: StreamDecoder, stream: trio.abc.Stream) -> ExportHeader | Frame | Trailer:
    """Raises OperatorError where the target is lost, StreamError for nonsense."""
    while (event := decoder.next_event()) is None:
        try:
            with trio.fail_after(SILENCE_SECONDS_MAX):
                data = await stream.receive_some(_RECEIVE_BYTES)
        except trio.TooSlowError:
            raise OperatorError(f"the target said nothing for {SILENCE_SECONDS_MAX:g} s") from None
        except trio.BrokenResourceError:
            raise OperatorError("the connection to the target broke") from None
        if not data:
            decoder.finish()
            raise StreamError("the stream ends before its trailer")
        decoder.feed(data)
    return event


def check_stream(path: Path) -> ExportHeader:
    """Read a whole export file and verify every digest. Raises HoldfastError, OSError."""
    header: ExportHeader | None = None
    decoder = StreamDecoder()
    with path.open("rb") as file:
        while data := file.read(_RECEIVE_BYTES):
            decoder.feed(data)
            while (event := decoder.next_event()) is not None:
                if isinstance(event, Frame):
                    event.check()
                elif isinstance(event, ExportHeader):
                    header = event
    decoder.finish()
    if header is None:
        raise StreamError("the stream has no header")
    return header


def apply_file(path: Path, raw: Path, *, trust_base: bool = False) -> ExportHeader:
    """Apply an export file of one disk to a raw file: a full makes it, a differential changes it.

    The file is verified from end to end, and found to fit (core/applied.py), before the first byte is
    written. Raises OperatorError, OSError.
    """
    try:
        header = check_stream(path)
    except HoldfastError as error:
        raise OperatorError(f"{path}: {error}; nothing was applied") from error
    if len(header.disks) != 1:
        names = ", ".join(disk.name for disk in header.disks)
        raise Refused(f"{path} holds {len(header.disks)} disks ({names}); apply takes an export of one image")
    if header.kind == "full":
        if raw.exists():
            raise Refused(f"{raw} exists already; a full is applied to a new file")
        temporary, descriptor = open_part(raw)
    else:
        try:
            descriptor = os.open(raw, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise Refused(
                f"{raw} does not exist; a differential is applied to the disk as of its base"
            ) from None
        temporary = None
    try:
        if header.kind == "differential":
            try:
                applied.check_base(_mark_of(descriptor), header, trust=trust_base)
            except Refused as error:
                raise Refused(f"{raw}: {error}") from error
            _set_mark(descriptor, applied.under_way(header))
        os.ftruncate(descriptor, header.disks[0].size_bytes)
        _apply_frames(path, descriptor)
        os.fsync(descriptor)
        _set_mark(descriptor, applied.done(header))
        os.fsync(descriptor)
        if temporary is not None:
            os.rename(temporary, raw)
            temporary = None
    finally:
        if temporary is not None:
            os.unlink(temporary)
        os.close(descriptor)
    sync_directory(raw.parent)
    return header


def _mark_of(descriptor: int) -> str | None:
    try:
        mark = os.getxattr(descriptor, _MARK)
    except OSError:
        return None  # It has none, or the file system has none for any file.
    return mark[: applied.MARK_BYTES_MAX].decode("ascii", "replace")


def _set_mark(descriptor: int, mark: str) -> None:
    """Where the file system cannot: the next differential has to be told to trust."""
    with contextlib.suppress(OSError):
        os.setxattr(descriptor, _MARK, mark.encode())
        os.fsync(descriptor)


def _apply_frames(path: Path, descriptor: int) -> None:
    decoder = StreamDecoder()
    with path.open("rb") as file:
        while data := file.read(_RECEIVE_BYTES):
            decoder.feed(data)
            while (event := decoder.next_event()) is not None:
                if not isinstance(event, Frame):
                    continue
                event.check()
                if event.header.kind is FrameKind.DATA:
                    write_all(descriptor, event.data, event.header.offset)
                else:
                    punch(descriptor, event.header.offset, event.header.length)
    decoder.finish()

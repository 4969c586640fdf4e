"""`diskctl image export`: an image, as it is at one instant, as a disk file or through a pipe. Client's side.

    raw, qcow2, pipes    from diskd's export stream: every frame is checked against the source's digest
    vmdk, vhdx, vdi      qemu-img reads a frozen view over NBD, which stands for as long as we are connected

Either way diskd freezes the image, and forgets that when we have ended, however we end. A file is made in a
directory beside its final place, and gets its name when it is complete and durable.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import quote

import trio

from daemonkit.diskd_api import ImageName
from daemonkit.durable import sync_directory, write_all
from daemonkit.errors import OperatorError
from daemonkit.frames import FrameReader
from daemonkit.ports import Address
from daemonkit.rpc import connect
from daemonkit.schema import structure
from diskd.core import calls
from diskd.core.import_stream import ANSWER_BYTES_MAX, decode_answer
from diskd.core.qcow2 import FULL_CLUSTER_BYTES
from diskd.core.qcow2_writer import Qcow2Writer
from diskd.core.stream import ExportHeader, Frame, FrameKind, Trailer
from diskd.core.target_calls import ExportRequest
from diskd.errors import Refused
from diskd.shell.export_file import Event, receive_export
from diskd.shell.imports import qemu_img, run_qemu_img
from diskd.shell.restore import DiskFile, RawDisk

ImageFormat = Literal["raw", "qcow2", "vmdk", "vhdx", "vdi"]
Progress = Callable[[Any], None]

_ZEROES: Final = bytes(1 << 20)
_ANYWHERE: Final = ("0.0.0.0", "::")


async def export_to_file(
    diskd: Address,
    image: str,
    path: Path,
    kind: ImageFormat,
    *,
    force: bool,
    key: bytes | None,
    on_progress: Progress,
) -> int:
    """The bytes that the file takes. Raises OperatorError, OSError; then ``path`` is as it was."""
    with _part_of(path, force=force) as part:
        if kind in ("raw", "qcow2"):
            output = _FileOutput(part, kind)
            try:
                await _receive(diskd, image, output, key, on_progress)
            finally:
                output.close()
        else:
            await _convert(diskd, image, part, kind, key, on_progress)
        return await trio.to_thread.run_sync(_publish, part, path, force)


async def export_to_pipe(
    diskd: Address, image: str, descriptor: int, *, key: bytes | None, on_progress: Progress
) -> int:
    """The raw disk, into a descriptor; how many bytes. Raises OperatorError, OSError."""
    output = _PipeOutput(descriptor)
    await _receive(diskd, image, output, key, on_progress)
    return output.position


# --- files -------------------------------------------------------------------------------------------------


@contextmanager
def _part_of(path: Path, *, force: bool) -> Iterator[Path]:
    """A place of the same name in a directory of our own, so that a VMDK, which contains its name, has the
    right one from the start."""
    _refuse_existing(path, force=force)
    try:
        directory = tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise Refused(f"{path} cannot be written: {error.strerror}") from error
    try:
        yield Path(directory) / path.name
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _refuse_existing(path: Path, *, force: bool) -> None:
    if path.is_dir():
        raise Refused(f"{path} is a directory: name a file")
    if path.exists() and not path.is_file():
        raise Refused(f"{path} is no plain file: to write into it, export to - and redirect that")
    if path.exists() and not force:
        raise Refused(f"{path} exists already: name another file, or use --force")


def _publish(part: Path, path: Path, force: bool) -> int:
    descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    _refuse_existing(path, force=force)
    part.rename(path)
    sync_directory(path.parent)
    return path.stat().st_blocks * 512


# --- from the export stream ----------------------------------------------------------------------


class _Frames:
    """What the two outputs share: checks each frame, knows how much there is."""

    total_bytes: int | None = None

    def take(self, _data: bytes, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, ExportHeader):
                self.total_bytes = event.disks[0].changed_bytes
                self.begin(event.disks[0].size_bytes)
            elif isinstance(event, Frame):
                event.check()
                self.frame(event)
            elif isinstance(event, Trailer):
                self.end()

    def begin(self, size_bytes: int) -> None:
        raise AssertionError

    def frame(self, frame: Frame) -> None:
        raise AssertionError

    def end(self) -> None:
        raise AssertionError

    def publish(self) -> None:
        """Whoever asked for it does that."""


class _FileOutput(_Frames):
    def __init__(self, path: Path, kind: ImageFormat) -> None:
        self._kind = kind
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._disk: DiskFile = RawDisk(self._descriptor, 0)

    def begin(self, size_bytes: int) -> None:
        if self._kind == "raw":
            self._disk = RawDisk(self._descriptor, size_bytes)
        else:
            self._disk = Qcow2Writer(
                lambda offset, data: write_all(self._descriptor, data, offset),
                size_bytes=size_bytes,
                cluster_bytes=FULL_CLUSTER_BYTES,
            )

    def frame(self, frame: Frame) -> None:
        if frame.header.kind is FrameKind.DATA:
            self._disk.data(frame.header.offset, frame.data)
        else:
            self._disk.zero(frame.header.offset, frame.header.length)

    def end(self) -> None:
        os.ftruncate(self._descriptor, self._disk.finish())

    def close(self) -> None:
        os.close(self._descriptor)


class _PipeOutput(_Frames):
    """A pipe has no holes: they are written."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._size = 0
        self.position = 0

    def begin(self, size_bytes: int) -> None:
        self._size = size_bytes

    def frame(self, frame: Frame) -> None:
        if frame.header.kind is FrameKind.DATA:
            self._fill(frame.header.offset)
            self._write(frame.data)

    def end(self) -> None:
        self._fill(self._size)

    def _fill(self, end: int) -> None:
        while self.position < end:
            self._write(memoryview(_ZEROES)[: end - self.position])

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        self.position += len(view)
        while view:
            view = view[os.write(self._descriptor, view) :]


async def _receive(
    diskd: Address,
    image: str,
    output: "_FileOutput | _PipeOutput",
    key: bytes | None,
    on_progress: Progress,
) -> None:
    request = ExportRequest(image, None, keep=False)
    await receive_export(
        diskd,
        request,
        output,
        key=key,
        on_progress=lambda done: on_progress({"done_bytes": done, "total_bytes": output.total_bytes}),
    )


# --- through qemu-img ----------------------------------------------------------------------------


async def _convert(
    diskd: Address, image: str, part: Path, kind: ImageFormat, key: bytes | None, on_progress: Progress
) -> None:
    program = qemu_img(f"exporting to {kind}")
    async with _held(diskd, image, key) as held:
        source = _uri(diskd, held)
        await run_qemu_img(
            [program, "convert", "-p", "-f", "raw", "-O", kind, source, str(part)],
            f"{held.export} at {source}",
            held.size_bytes,
            lambda done, total: on_progress({"done_bytes": done, "total_bytes": total}),
        )


@asynccontextmanager
async def _held(diskd: Address, image: str, key: bytes | None) -> AsyncIterator[calls.HeldImage]:
    """The image frozen, for the length of the ``async with``."""
    async with connect(diskd, key=key) as client:
        stream = await client.open_stream(calls.IMAGE_HOLD, ImageName(image))
        reader = FrameReader(frame_bytes_max=ANSWER_BYTES_MAX)
        while (payload := reader.next_frame()) is None:
            data = b""
            with contextlib.suppress(trio.BrokenResourceError):
                data = bytes(await stream.receive_some())
            if not data:
                raise OperatorError("diskd ended the connection; its log says why")
            reader.feed(data)
        answer = decode_answer(payload)
        if answer.refusal is not None:
            raise Refused(answer.refusal)
        yield structure(calls.HeldImage, answer.document, where="image.hold")


def _uri(diskd: Address, held: calls.HeldImage) -> str:
    """Where qemu-img finds the frozen view, seen from here."""
    export = quote(held.export)
    if held.nbd is not None:
        address = Address.parse(held.nbd)
        if address.host in _ANYWHERE:
            address = Address(diskd.host, address.port)
        return f"nbd://{address}/{export}"
    if held.nbd_socket is not None and Path(held.nbd_socket).is_socket():
        return f"nbd+unix:///{export}?socket={quote(held.nbd_socket)}"
    raise Refused("this diskd serves NBD on a Unix socket of another host only: run the export there")

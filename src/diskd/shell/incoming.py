"""A point in the making: a temporary directory beside the committed ones, until it is verified (B5).

    make .incoming-POINT    qcow2 files, index and vm.toml are written; written back meanwhile
    sync and verify         side by side: the new point is opened like any other and read again, against its
                            base, while the disk takes what is left
    manifest.json           written and synced last, then the directory is synced
    rename                  .incoming-POINT becomes POINT, then the VM's directory is synced: committed

While it grows, what is durable of it is recorded (core/partial.py): ``snapshot`` between two batches,
``keep`` beside the batches that follow. A connection that breaks, or a kill, leaves a directory with a dot
and that record, from which the same stream can go on; the record goes before the manifest comes. Nothing
here touches a committed file. All functions block; they run in worker threads.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import attrs
from blake3 import blake3

from daemonkit.errors import HoldfastError
from daemonkit.units import KiB, MiB
from diskd.core.catalog import (
    CONFIG,
    INDEX,
    MANIFEST,
    DiskRecord,
    FileDigest,
    Manifest,
    backing_name,
    disk_file,
    encode_manifest,
)
from diskd.core.partial import SLOT_BYTES, Progress, is_sound, newest, opening_digest, pack_slot
from diskd.core.qcow2 import FULL_CLUSTER_BYTES
from diskd.core.qcow2_writer import Qcow2Writer, Share
from diskd.core.stream import (
    HAVE_BYTES_MAX,
    HEADER_BYTES_MAX,
    PREFIX,
    ExportHeader,
    Frame,
    FrameBatch,
    FrameKind,
    Rows,
    StreamDecoder,
    StreamError,
    Trailer,
)
from diskd.errors import Damaged, Refused
from diskd.shell.chain_view import OpenPoint, open_point
from diskd.shell.repository_files import RepositoryFiles, digest_file
from diskd.shell.verify import Stop, verify_content
from diskd.shell.work import Poll

# Dirty pages go to the disk in such portions while more is received, so that the final sync is short.
WRITEBACK_BYTES: Final = 16 * MiB
# Smaller writes are gathered as long as they follow one another.
STAGED_BYTES: Final = 256 * KiB
_INDEX_BUFFER_BYTES: Final = 1 * MiB
PROGRESS: Final = "progress"


class Uncertain(HoldfastError):
    """Only the next look at the disk tells whether the point is committed: its source asks later (B3)."""


class Unusable(HoldfastError):
    """What is left of an unfinished point is not what its record says: it begins anew."""


@attrs.frozen(eq=False)
class Snapshot:
    """The state between two batches, and the files that have to be synced before it may be recorded."""

    progress: Progress
    descriptors: list[int]


def unfinished(path: Path) -> tuple[int, Progress] | None:
    """(sequence, record) of what a broken export left in ``path``, whatever plan it is of. Raises OSError."""
    try:
        data = (path / PROGRESS).read_bytes()
    except FileNotFoundError:
        return None
    return newest(data[: 2 * SLOT_BYTES])


def index_header(path: Path) -> ExportHeader:
    """What an index, complete or not, is of. Raises StreamError, OSError."""
    decoder = StreamDecoder(payloads=False)
    with path.open("rb") as file:
        decoder.feed(file.read(PREFIX.size + HEADER_BYTES_MAX))
    header = decoder.next_event()
    if not isinstance(header, ExportHeader):
        raise StreamError("an index without a header")
    return header


class Incoming:
    """Takes the parts of one export stream in order. Any exception means: call ``discard``."""

    def __init__(
        self,
        files: RepositoryFiles,
        directory: Path,
        temporary: Path,
        header: ExportHeader,
        opening: bytes,
        chain: Sequence[Manifest],
        *,
        share_into: Callable[[int, str], Share] | None = None,
        resume: tuple[int, Progress] | None = None,
    ) -> None:
        """``directory``: the VM's; ``chain``: of the base, or empty. ``share_into(descriptor, disk)``: what
        puts bytes into a disk's file without writing them (shell/sharing.py). ``resume``: of ``unfinished``.
        If it raises, nothing is left; Unusable says that it may begin anew."""
        self._share_into = share_into
        self.header = header
        self.taken = 0
        self.durable = 0
        self._files = files
        self._directory = directory
        self._path = temporary
        self._chain = chain
        self._stack = ExitStack()
        self._writing_back = 0
        self._written: list[tuple[int, int]] = []
        self._base: OpenPoint | None = None
        self._disk = -1
        self._descriptor = -1
        self._writer: Qcow2Writer | None = None
        self._data_bytes = [0] * len(header.disks)
        self._staged = bytearray()
        self._staged_offset = 0
        self._opening = opening
        self._index = -1
        self._index_buffer = bytearray(opening)
        self._index_bytes = 0
        self._index_hash = blake3()
        self._turn = threading.Lock()
        self._has_new_names = False
        self._synced = 0
        self._progress = -1
        self._sequence = 0
        try:
            if chain:
                self._base = self._stack.enter_context(open_point(directory, chain))
            if resume is not None:
                self._reopen(*resume)
                return
            files.make_directory(temporary)
            files.write_file(temporary / CONFIG, header.config.encode())
            self._index = self._create(INDEX)
            self._next_disk()
        except (OSError, HoldfastError):
            self.discard()
            raise

    def frame(self, frame: Frame) -> None:
        """Verify one frame's data and write it. Raises StreamError, Refused, Damaged, OSError."""
        frame.check()
        header = frame.header
        while self._disk < header.disk:
            self._next_disk()
        assert self._writer is not None
        if header.kind is FrameKind.DATA:
            self._writer.data(header.offset, frame.data)
            self._data_bytes[header.disk] += header.length
        else:
            self._writer.zero(header.offset, header.length)
        self._index_buffer += header.pack()
        if len(self._index_buffer) >= _INDEX_BUFFER_BYTES:
            self._flush_index()
        self.taken += 1

    def batch(self, batch: FrameBatch, rows: Rows) -> None:
        """Write many frames, whose data has been verified (FrameBatch.check_data). Raises as ``frame``."""
        with self._turn:
            self._batch(batch, rows)

    def _batch(self, batch: FrameBatch, rows: Rows) -> None:
        disks, kinds = rows["disk"].tolist(), rows["kind"].tolist()
        offsets, lengths = rows["offset"].tolist(), rows["length"].tolist()
        for number, (disk, kind) in enumerate(zip(disks, kinds, strict=True)):
            while self._disk < disk:
                self._next_disk()
            assert self._writer is not None
            length = lengths[number]
            if kind == FrameKind.DATA:
                self._writer.data(offsets[number], batch.payload(number, length))
                self._data_bytes[disk] += length
            else:
                self._writer.zero(offsets[number], length)
        self._index_buffer += batch.packed
        if len(self._index_buffer) >= _INDEX_BUFFER_BYTES:
            self._flush_index()
        self.taken += len(batch)

    def commit(self, trailer: Trailer, *, source_digest: str, committed_at: str, poll: Poll) -> Manifest:
        """Verify everything; then only ``publish`` is left to do. Raises Damaged, OSError."""
        while self._disk < len(self.header.disks) - 1:
            self._next_disk()
        self._finish_disk()
        self._index_buffer += trailer.pack()
        self._flush_index()
        manifest = self._manifest(trailer, source_digest, committed_at)
        # While the disk takes what is still dirty, everything is read again: digests of files and of frames
        # are the same work twice, so two threads do it.
        with ThreadPoolExecutor(2) as threads, Stop() as stop:
            synced = threads.submit(self._sync_all)
            digests = threads.submit(self._with_digests, manifest, stop.poll)
            _, problems = verify_content(self._directory, [manifest, *self._chain], poll=poll, top=self._path)
            manifest = digests.result()
            synced.result()
        self._stack.close()
        if problems:
            raise Damaged(f"the new point did not verify: {problems[0]}")
        if self._progress >= 0:
            self.durable = 0
            self._files.remove(self._path / PROGRESS)
        self._files.sync_directory(self._path)
        self._files.write_file(self._path / MANIFEST, encode_manifest(manifest))
        self._files.sync_directory(self._path)
        return manifest

    def publish(self) -> None:
        """The rename; after it has returned the point is committed and durable. Raises Uncertain where the
        point has its name, but that may not outlive a power loss."""
        self._files.publish(self._path, self._directory / self.header.point)
        try:
            self._files.sync_directory(self._directory)
        except OSError as error:
            raise Uncertain(
                f"{self.header.vm}/{self.header.point} may be committed or not: {error}"
            ) from error

    # --- what is left of it when the connection breaks ---------------------------------------------

    def snapshot(self) -> Snapshot | None:
        """What could be recorded now; None where nothing is new, or the commit has begun. Raises OSError."""
        with self._turn:
            if self._writer is None or self.taken == self.durable:
                return None
            writer = self._writer.save()
            self._flush_staged()
            self._flush_index()
            progress = Progress(
                opening_digest=opening_digest(self._opening),
                frames=self.taken,
                index_bytes=self._index_bytes,
                index_digest=self._index_hash.digest(),
                written=[size for _, size in self._written],
                data_bytes=list(self._data_bytes),
                writer=writer,
            )
            unsynced = [descriptor for descriptor, _ in self._written[self._synced :]]
            return Snapshot(progress, [*unsynced, self._descriptor, self._index])

    def keep(self, snapshot: Snapshot) -> None:
        """Make it durable, then say so. Other batches may be written meanwhile. Raises OSError."""
        if self._progress < 0:
            self._progress = self._create(PROGRESS)
        for descriptor in snapshot.descriptors:
            self._files.sync(descriptor)
        if self._has_new_names:
            self._has_new_names = False
            self._files.sync_directory(self._path)
        self._files.write(self._progress, *pack_slot(self._sequence + 1, snapshot.progress))
        self._files.sync(self._progress)
        self._sequence += 1
        self._synced = len(snapshot.progress.written)
        self.durable = snapshot.progress.frames

    def suspend(self) -> None:
        """Close it so that the same stream can go on later; removed where nothing of it is durable."""
        try:
            if (snapshot := self.snapshot()) is not None:
                self.keep(snapshot)
        except OSError:
            self.durable = 0
        if self.durable:
            self._stack.close()
        else:
            self.discard()

    def known(self) -> Iterator[bytes]:
        """The headers of the frames that a resumed one begins with, in portions for ``Have``."""
        offset, end = len(self._opening), self._index_bytes
        while offset < end:
            data = os.pread(self._index, min(HAVE_BYTES_MAX, end - offset), offset)
            if not data:
                raise Damaged(f"{self._path.name}/{INDEX}: it ends early")
            yield data
            offset += len(data)

    def _reopen(self, sequence: int, progress: Progress) -> None:
        """Raises Unusable."""
        if not is_sound(progress, opening_bytes=len(self._opening), disks=len(self.header.disks)):
            raise Unusable("the record does not fit the export")
        try:
            self._sequence, self._progress = sequence, self._open(PROGRESS)
            self._reopen_index(progress)
            for number, size in enumerate(progress.written):
                descriptor = self._open(disk_file(self.header.disks[number].name))
                if os.fstat(descriptor).st_size != size:
                    raise Unusable(f"{disk_file(self.header.disks[number].name)} has another size")
                self._written.append((descriptor, size))
            self._synced = len(self._written)
            self._disk = self._synced - 1
            self._remove_unrecorded()
            self._start_disk(self._open)
            assert self._writer is not None
            offset, length = self._writer.l1_bytes
            l1 = os.pread(self._descriptor, length, offset).ljust(length, b"\0")
            self._files.set_size(self._descriptor, self._writer.restore(progress.writer, l1))
        except (OSError, Refused) as error:
            raise Unusable(str(error)) from error
        self._data_bytes = list(progress.data_bytes)
        self.taken = self.durable = progress.frames

    def _remove_unrecorded(self) -> None:
        """The files of disks that began after the record: they are made anew, and must not be in the way."""
        for disk in self.header.disks[self._synced + 1 :]:
            path = self._path / disk_file(disk.name)
            if path.exists():
                self._files.remove(path)

    def _reopen_index(self, progress: Progress) -> None:
        self._index = self._open(INDEX)
        self._index_buffer.clear()
        while self._index_bytes < progress.index_bytes:
            wanted = min(_INDEX_BUFFER_BYTES, progress.index_bytes - self._index_bytes)
            data = os.pread(self._index, wanted, self._index_bytes)
            if not data:
                raise Unusable(f"{INDEX} is too short")
            self._index_hash.update(data)
            self._index_bytes += len(data)
        if self._index_hash.digest() != progress.index_digest:
            raise Unusable(f"{INDEX} is not what was recorded")
        self._files.set_size(self._index, progress.index_bytes)

    def discard(self) -> None:
        """Close and remove everything of it."""
        self._stack.close()
        if self._path.exists():
            self._files.remove_tree(self._path)

    def _create(self, name: str) -> int:
        descriptor = self._files.create(self._path / name)
        self._stack.callback(os.close, descriptor)
        self._has_new_names = True
        return descriptor

    def _open(self, name: str) -> int:
        descriptor = self._files.reopen(self._path / name)
        self._stack.callback(os.close, descriptor)
        return descriptor

    def _next_disk(self) -> None:
        if self._writer is not None:
            self._finish_disk()
        self._start_disk(self._create)

    def _start_disk(self, make: Callable[[str], int]) -> None:
        self._disk += 1
        disk = self.header.disks[self._disk]
        descriptor = self._descriptor = make(disk_file(disk.name))
        self._writing_back = 0
        base, backing = None, None
        if self._base is not None and self.header.base is not None:
            base = self._base.views[disk.name]
            backing = backing_name(self.header.base, disk.name)
        self._writer = Qcow2Writer(
            lambda offset, data: self._write(descriptor, offset, data),
            size_bytes=disk.size_bytes,
            cluster_bytes=disk.cluster_bytes if backing else FULL_CLUSTER_BYTES,
            backing=backing,
            base=base,
            share=self._share_into(descriptor, disk.name) if self._share_into else None,
        )

    def _finish_disk(self) -> None:
        assert self._writer is not None
        size = self._writer.finish()
        self._flush_staged()
        self._files.set_size(self._descriptor, size)
        self._written.append((self._descriptor, size))
        self._writer = None

    def _write(self, descriptor: int, offset: int, data: bytes | memoryview) -> None:
        # The clusters of a scattered differential follow one another in the file: written one by one they
        # would cost a system call each.
        end = self._staged_offset + len(self._staged)
        if len(data) >= STAGED_BYTES or (self._staged and offset != end):
            self._flush_staged()
        if len(data) >= STAGED_BYTES:
            self._write_now(descriptor, offset, data)
            return
        if not self._staged:
            self._staged_offset = offset
        self._staged += data
        if len(self._staged) >= STAGED_BYTES:
            self._flush_staged()

    def _flush_staged(self) -> None:
        if self._staged:
            self._write_now(self._descriptor, self._staged_offset, self._staged)
            self._staged = bytearray()

    def _write_now(self, descriptor: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        self._files.write(descriptor, offset, memoryview(data))
        # The writer allocates in ascending order: what lies behind is not touched again, but for its header.
        end = offset + len(data)
        if end - self._writing_back >= WRITEBACK_BYTES:
            self._files.start_writeback(descriptor, self._writing_back, end - self._writing_back)
            self._writing_back = end

    def _sync_all(self) -> None:
        for descriptor, _ in self._written:
            self._files.sync(descriptor)
        self._files.sync(self._index)
        self.durable = self.taken

    def _flush_index(self) -> None:
        self._files.write(self._index, self._index_bytes, bytes(self._index_buffer))
        self._index_hash.update(self._index_buffer)
        self._index_bytes += len(self._index_buffer)
        self._index_buffer.clear()

    def _with_digests(self, manifest: Manifest, poll: Poll) -> Manifest:
        def digested(file: FileDigest) -> FileDigest:
            return FileDigest(file.name, *digest_file(self._path / file.name, poll))

        disks = [attrs.evolve(disk, file=digested(disk.file)) for disk in manifest.disks]
        return attrs.evolve(manifest, index=digested(manifest.index), disks=disks)

    def _manifest(self, trailer: Trailer, source_digest: str, committed_at: str) -> Manifest:
        """Without the target's own digests of its files: those come from reading them again."""
        header = self.header
        disks = []
        for number, disk in enumerate(header.disks):
            disks.append(
                DiskRecord(
                    name=disk.name,
                    image=disk.image,
                    virtual_size=disk.size_bytes,
                    block_size=disk.block_bytes,
                    cluster_size=disk.cluster_bytes if header.base else FULL_CLUSTER_BYTES,
                    changed_bytes=disk.changed_bytes,
                    data_bytes=self._data_bytes[number],
                    exact=disk.exact,
                    over_report_bytes=disk.over_report_bytes,
                    digest=trailer.disk_digests[number].hex(),
                    file=FileDigest(disk_file(disk.name), self._written[number][1], ""),
                )
            )
        config = header.config.encode()
        return Manifest(
            vm=header.vm,
            point=header.point,
            base=header.base,
            kind=header.kind,
            consistency=header.consistency,
            committed_at=committed_at,
            synthetic=source_digest != trailer.digest.hex(),
            source_digest=source_digest,
            export_digest=trailer.digest.hex(),
            config=FileDigest(CONFIG, len(config), blake3(config).hexdigest()),
            index=FileDigest(INDEX, self._index_bytes, ""),
            disks=disks,
        )

"""A point in the making: a temporary directory beside the committed ones, until it is verified (B5).

    make .incoming-POINT    vm.toml; of each disk, from its first frame on, a qcow2 file and a part of the
                            index (incoming_disk.py); written back meanwhile
    sync and verify         the parts of the index are put together; then, side by side: the new point is
                            opened like any other and read again, against its base, while the disk takes what
                            is left
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
from diskd.core.partial import (
    FILE_BYTES_MAX,
    DiskProgress,
    Progress,
    is_sound,
    newest,
    opening_digest,
    pack_head,
    pack_slot,
)
from diskd.core.qcow2_writer import Share
from diskd.core.stream import (
    HAVE_BYTES_MAX,
    HEADER_BYTES_MAX,
    PREFIX,
    ExportHeader,
    Frame,
    FrameBatch,
    Rows,
    StreamDecoder,
    StreamError,
    Trailer,
    by_disk,
)
from diskd.errors import Damaged, Refused
from diskd.shell.chain_view import OpenPoint, open_point
from diskd.shell.incoming_disk import DiskPlan, IncomingDisk
from diskd.shell.incoming_disk import Unusable as Unusable
from diskd.shell.repository_files import RepositoryFiles, digest_file
from diskd.shell.verify import Stop, verify_content
from diskd.shell.work import Poll

PROGRESS: Final = "progress"
# One per disk, named by its number; no disk's file can have such a name.
_INDEX_PART: Final = "index."


class Uncertain(HoldfastError):
    """Only the next look at the disk tells whether the point is committed: its source asks later (B3)."""


@attrs.frozen(eq=False)
class Snapshot:
    """The state between two batches, and the files that have to be synced before it may be recorded."""

    progress: Progress
    descriptors: list[int]


def unfinished(path: Path) -> tuple[int, Progress] | None:
    """(sequence, record) of what a broken export left in ``path``, whatever plan it is of. Raises OSError."""
    try:
        with (path / PROGRESS).open("rb") as file:
            return newest(file.read(FILE_BYTES_MAX))
    except FileNotFoundError:
        return None


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
        self._base: OpenPoint | None = None
        self._disks: dict[int, IncomingDisk] = {}
        self._sizes: list[int] = []
        self._opening = opening
        self._index = -1
        self._index_bytes = len(opening)
        self._turn = threading.Lock()
        self._is_complete = False
        self._has_new_names = False
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
            files.write(self._index, 0, opening)
        except (OSError, HoldfastError):
            self.discard()
            raise

    def frame(self, frame: Frame) -> None:
        """Verify one frame's data and write it. Raises StreamError, Refused, Damaged, OSError."""
        frame.check()
        self._disk(frame.header.disk).frame(frame.header, frame.data)
        self.taken += 1

    def batch(self, batch: FrameBatch, rows: Rows) -> None:
        """Write many frames, whose data has been verified (FrameBatch.check_data). Raises as ``frame``."""
        with self._turn:
            for number, places in by_disk(rows):
                self._disk(number).batch(batch, rows, places)
            self.taken += len(batch)

    def commit(self, trailer: Trailer, *, source_digest: str, committed_at: str, poll: Poll) -> Manifest:
        """Verify everything; then only ``publish`` is left to do. Raises Damaged, OSError."""
        self._is_complete = True
        self._sizes = [self._disk(number).finish() for number in range(len(self.header.disks))]
        self._join_index(trailer)
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
        for number in self._disks:
            self._files.remove(self._path / f"{_INDEX_PART}{number}")
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
            if self._is_complete or self.taken == self.durable:
                return None
            disks: list[DiskProgress] = []
            descriptors = [] if self.durable else [self._index]
            for _, disk in sorted(self._disks.items()):
                if not disk.frames:
                    continue
                if disk.recorded is not None and not disk.has_news:
                    disks.append(disk.recorded)
                else:
                    disks.append(disk.progress())
                    descriptors += [disk.descriptor, disk.index]
            return Snapshot(Progress(opening_digest(self._opening), disks), descriptors)

    def keep(self, snapshot: Snapshot) -> None:
        """Make it durable, then say so. Other batches may be written meanwhile. Raises OSError."""
        disks = len(self.header.disks)
        if self._progress < 0:
            self._progress = self._create(PROGRESS)
            self._files.write(self._progress, 0, pack_head(disks))
        for descriptor in snapshot.descriptors:
            self._files.sync(descriptor)
        if self._has_new_names:
            self._has_new_names = False
            self._files.sync_directory(self._path)
        self._files.write(self._progress, *pack_slot(self._sequence + 1, snapshot.progress, disks))
        self._files.sync(self._progress)
        self._sequence += 1
        for recorded in snapshot.progress.disks:
            self._disks[recorded.disk].recorded = recorded
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
        for _, disk in sorted(self._disks.items()):
            yield from disk.headers(HAVE_BYTES_MAX)

    def _reopen(self, sequence: int, progress: Progress) -> None:
        """Raises Unusable."""
        if not is_sound(progress, disks=len(self.header.disks)):
            raise Unusable("the record does not fit the export")
        try:
            self._sequence, self._progress = sequence, self._open(PROGRESS)
            self._index = self._open(INDEX)
            if os.pread(self._index, len(self._opening), 0) != self._opening:
                raise Unusable(f"{INDEX} is not what was recorded")
            self._files.set_size(self._index, len(self._opening))
            self._remove_unrecorded({disk.disk for disk in progress.disks})
            for recorded in progress.disks:
                self._open_disk(recorded.disk, self._open).restore(recorded)
        except (OSError, Refused) as error:
            raise Unusable(str(error)) from error
        self.taken = self.durable = progress.frames

    def _remove_unrecorded(self, recorded: set[int]) -> None:
        """The files of disks that began after the record: they are made anew, and must not be in the way."""
        for number, disk in enumerate(self.header.disks):
            for name in (disk_file(disk.name), f"{_INDEX_PART}{number}"):
                if number not in recorded and (self._path / name).exists():
                    self._files.remove(self._path / name)

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

    def _disk(self, number: int) -> IncomingDisk:
        """The disk with this number, begun with its first frame."""
        if number not in self._disks:
            self._open_disk(number, self._create)
        return self._disks[number]

    def _open_disk(self, number: int, make: Callable[[str], int]) -> IncomingDisk:
        header = self.header.disks[number]
        plan = DiskPlan(number, header)
        if self._base is not None and self.header.base is not None:
            backing = backing_name(self.header.base, header.name)
            plan = attrs.evolve(plan, backing=backing, base=self._base.views[header.name])
        if (share_into := self._share_into) is not None:
            plan = attrs.evolve(plan, share=lambda descriptor: share_into(descriptor, header.name))
        file, index = make(disk_file(header.name)), make(f"{_INDEX_PART}{number}")
        disk = self._disks[number] = IncomingDisk(self._files, plan, file, index)
        return disk

    def _join_index(self, trailer: Trailer) -> None:
        """One disk after the other, whatever the order in which their frames came."""
        for _, disk in sorted(self._disks.items()):
            for data in disk.headers():
                self._append_to_index(data)
        self._append_to_index(trailer.pack())

    def _append_to_index(self, data: bytes) -> None:
        self._files.write(self._index, self._index_bytes, data)
        self._index_bytes += len(data)

    def _sync_all(self) -> None:
        for disk in self._disks.values():
            self._files.sync(disk.descriptor)
        self._files.sync(self._index)
        self.durable = self.taken

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
            taken = self._disks[number]
            disks.append(
                DiskRecord(
                    name=disk.name,
                    image=disk.image,
                    virtual_size=disk.size_bytes,
                    block_size=disk.block_bytes,
                    cluster_size=taken.plan.cluster_bytes,
                    changed_bytes=disk.changed_bytes,
                    data_bytes=taken.data_bytes,
                    exact=disk.exact,
                    over_report_bytes=disk.over_report_bytes,
                    digest=trailer.disk_digests[number].hex(),
                    file=FileDigest(disk_file(disk.name), self._sizes[number], ""),
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

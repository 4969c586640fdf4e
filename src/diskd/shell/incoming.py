"""A point in the making: a temporary directory beside the committed ones, until it is verified (B5).

    make .incoming-POINT    qcow2 files, index and vm.toml are written and synced
    verify                  the new point is opened like any other and read again, against its base
    manifest.json           written and synced last, then the directory is synced
    rename                  .incoming-POINT becomes POINT, then the VM's directory is synced: committed

A kill before the rename leaves a directory with a dot, which the next start removes. Nothing here
touches a committed file. All functions block; they run in a worker thread.
"""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from blake3 import blake3

from daemonkit.errors import HoldfastError
from daemonkit.units import MiB
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
from diskd.core.qcow2 import FULL_CLUSTER_BYTES
from diskd.core.qcow2_writer import Qcow2Writer
from diskd.core.stream import ExportHeader, Frame, FrameKind, Trailer
from diskd.errors import Damaged
from diskd.shell.chain_view import OpenPoint, open_point
from diskd.shell.repository_files import RepositoryFiles, digest_file
from diskd.shell.verify import Poll, verify_point

# Dirty pages are written back in portions of this, so that the final sync is short.
SYNC_BYTES: Final = 256 * MiB
_INDEX_BUFFER_BYTES: Final = 1 * MiB


class Uncertain(HoldfastError):
    """Only the next look at the disk tells whether the point is committed: its source asks later (B3)."""


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
    ) -> None:
        """``directory``: the VM's; ``chain``: of the base, or empty. If it raises, nothing is left."""
        self.header = header
        self.taken = 0
        self.durable = 0
        self._files = files
        self._directory = directory
        self._path = temporary
        self._chain = chain
        self._stack = ExitStack()
        self._unsynced = 0
        self._base: OpenPoint | None = None
        self._disk = -1
        self._descriptor = -1
        self._writer: Qcow2Writer | None = None
        self._sizes: list[int] = []
        self._data_bytes = [0] * len(header.disks)
        self._index = -1
        self._index_buffer = bytearray(opening)
        self._index_bytes = 0
        try:
            if chain:
                self._base = self._stack.enter_context(open_point(directory, chain))
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
        self._unsynced += len(frame.data)
        if self._unsynced >= SYNC_BYTES:
            self._sync_all()

    def commit(self, trailer: Trailer, *, source_digest: str, committed_at: str, poll: Poll) -> Manifest:
        """Verify everything and make the point visible and durable. Raises Damaged, OSError."""
        while self._disk < len(self.header.disks) - 1:
            self._next_disk()
        self._finish_disk()
        self._index_buffer += trailer.pack()
        self._flush_index()
        self._files.sync(self._index)
        self._stack.close()
        manifest = self._manifest(trailer, source_digest, committed_at, poll)
        _, problems = verify_point(self._directory, [manifest, *self._chain], poll=poll, top=self._path)
        if problems:
            raise Damaged(f"the new point did not verify: {problems[0]}")
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

    def discard(self) -> None:
        """Close and remove everything of it."""
        self._stack.close()
        if self._path.exists():
            self._files.remove_tree(self._path)

    def _create(self, name: str) -> int:
        descriptor = self._files.create(self._path / name)
        self._stack.callback(os.close, descriptor)
        return descriptor

    def _next_disk(self) -> None:
        if self._writer is not None:
            self._finish_disk()
        self._disk += 1
        disk = self.header.disks[self._disk]
        descriptor = self._descriptor = self._create(disk_file(disk.name))
        base, backing = None, None
        if self._base is not None and self.header.base is not None:
            base = self._base.views[disk.name]
            backing = backing_name(self.header.base, disk.name)
        self._writer = Qcow2Writer(
            lambda offset, data: self._files.write(descriptor, offset, data),
            size_bytes=disk.size_bytes,
            cluster_bytes=disk.cluster_bytes if backing else FULL_CLUSTER_BYTES,
            backing=backing,
            base=base,
        )

    def _finish_disk(self) -> None:
        assert self._writer is not None
        size = self._writer.finish()
        self._files.set_size(self._descriptor, size)
        self._files.sync(self._descriptor)
        self._sizes.append(size)
        self._writer = None

    def _sync_all(self) -> None:
        self._files.sync(self._descriptor)
        self._flush_index()
        self.durable = self.taken
        self._unsynced = 0

    def _flush_index(self) -> None:
        self._files.write(self._index, self._index_bytes, bytes(self._index_buffer))
        self._index_bytes += len(self._index_buffer)
        self._index_buffer.clear()

    def _manifest(self, trailer: Trailer, source_digest: str, committed_at: str, poll: Poll) -> Manifest:
        header = self.header
        disks = []
        for number, disk in enumerate(header.disks):
            size, digest = digest_file(self._path / disk_file(disk.name), poll)
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
                    file=FileDigest(disk_file(disk.name), size, digest),
                )
            )
        index_size, index_digest = digest_file(self._path / INDEX, poll)
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
            index=FileDigest(INDEX, index_size, index_digest),
            disks=disks,
        )

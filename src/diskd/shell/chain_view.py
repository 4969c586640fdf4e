"""Committed points, opened for reading: every byte that leaves here has been verified (B4).

A point is opened with its whole chain at once. From then on it is read through descriptors, so that a
synthetic full which takes its place in the directory disturbs nobody who reads the old files.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import attrs
from blake3 import blake3

from daemonkit.durable import read_small_file
from diskd.core.catalog import CONFIG, INDEX, DiskRecord, Manifest, backing_name
from diskd.core.frame_index import DiskFrames, Index, Piece, parse_index, resolve
from diskd.core.inventory import CONFIG_BYTES_MAX
from diskd.core.qcow2_reader import Qcow2Reader
from diskd.core.stream import DATA_BYTES_MAX, FrameKind
from diskd.errors import Damaged


@attrs.frozen(eq=False)
class DiskLayer:
    """One disk's file in one point of a chain. ``name`` is VM/POINT/FILE, for messages."""

    name: str
    reader: Qcow2Reader
    frames: DiskFrames
    descriptor: int


class ChainView:
    """A disk as of a point (a qcow2_writer.Base): ``layers`` from the point itself down to its full."""

    def __init__(self, layers: Sequence[DiskLayer]) -> None:
        self.layers = layers
        self._frames = [layer.frames for layer in layers]
        self._kept: tuple[int, bytes] | None = None
        self._lower: ChainView | None = None

    @property
    def lower(self) -> "ChainView":
        """The same disk as of the base; zeroes below a full."""
        if self._lower is None:
            self._lower = ChainView(self.layers[1:])
        return self._lower

    def _at(self, level: int) -> "ChainView":
        view = self
        for _ in range(level):
            view = view.lower
        return view

    def pieces(self, offset: int, length: int) -> Iterator[Piece]:
        """What holds a range, in order and without gaps."""
        return resolve(self._frames, offset, length)

    def read(self, offset: int, length: int) -> bytes:
        """Verified bytes. Raises Damaged with file and place."""
        return b"".join(self.read_piece(piece) for piece in self.pieces(offset, length))

    def read_piece(self, piece: Piece) -> bytes:
        """The bytes of one piece, verified."""
        if piece.kind is not FrameKind.DATA:
            return bytes(piece.length)
        data = self._at(piece.layer).frame_data(piece.frame)
        start = piece.offset - int(self._frames[piece.layer].starts[piece.frame])
        return data[start : start + piece.length]

    def nonzero_ranges(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The ranges that hold data."""
        return [(p.offset, p.length) for p in self.pieces(offset, length) if p.kind is FrameKind.DATA]

    def frame_data(self, number: int) -> bytes:
        """A data frame of the top layer, whole and verified. The last one is kept: reads are ascending."""
        if self._kept is not None and self._kept[0] == number:
            return self._kept[1]
        top = self.layers[0]
        frame = top.frames.header(number)
        data = self.stored(frame.offset, frame.length)
        if blake3(data).digest() != frame.digest:
            raise Damaged(
                f"{top.name}: guest bytes {frame.offset} to {frame.end} are not what the source sent"
            )
        self._kept = (number, data)
        return data

    def stored(self, offset: int, length: int) -> bytes:
        """What the top layer's own file makes of a range, as QEMU reads it; not verified."""
        top = self.layers[0]
        parts = []
        try:
            for mapped in top.reader.map(offset, length):
                if mapped.kind == "data":
                    parts.append(top.reader.read_mapped(mapped))
                elif mapped.kind == "zero":
                    parts.append(bytes(mapped.length))
                else:
                    parts.append(self.lower.read(mapped.offset, mapped.length))
        except Damaged as error:
            raise error if "/" in str(error) else Damaged(f"{top.name}: {error}") from error
        return b"".join(parts)


@attrs.frozen(eq=False)
class OpenPoint:
    """A point with its chain, all files open."""

    manifest: Manifest
    config: str
    index: Index
    views: dict[str, ChainView]


@contextmanager
def open_point(directory: Path, chain: Sequence[Manifest], *, top: Path | None = None) -> Iterator[OpenPoint]:
    """Open ``chain`` (from the point down to its full) in the VM's directory.

    ``top`` is where the point itself lies while it has not got its final name. Raises Damaged, OSError.
    """
    with ExitStack() as stack:
        paths = [top or directory / chain[0].point, *(directory / m.point for m in chain[1:])]
        indexes = [read_index(path, m) for path, m in zip(paths, chain, strict=True)]
        views = {}
        for disk in chain[0].disks:
            layers = [
                _open_layer(stack, path, manifest, manifest.disk(disk.name), index)
                for path, manifest, index in zip(paths, chain, indexes, strict=True)
            ]
            views[disk.name] = ChainView(layers)
        config = read_small_file(paths[0] / CONFIG, size_bytes_max=CONFIG_BYTES_MAX)
        if blake3(config).hexdigest() != chain[0].config.blake3:
            raise Damaged(f"{chain[0].vm}/{chain[0].point}/{CONFIG}: does not match its digest")
        yield OpenPoint(chain[0], config.decode(), indexes[0], views)


def read_index(path: Path, manifest: Manifest) -> Index:
    """The index in a point's directory, checked against its manifest. Raises Damaged, OSError."""
    name = f"{manifest.vm}/{manifest.point}/{INDEX}"
    data = (path / INDEX).read_bytes()
    try:
        index = parse_index(data)
    except Damaged as error:
        raise Damaged(f"{name}: {error}") from error
    if index.trailer.digest.hex() != manifest.export_digest:
        raise Damaged(f"{name}: is not the index of this point")
    digests = [digest.hex() for digest in index.trailer.disk_digests]
    if digests != [disk.digest for disk in manifest.disks]:
        raise Damaged(f"{name}: its disks are not those of the manifest")
    return index


def _open_layer(
    stack: ExitStack, path: Path, manifest: Manifest, disk: DiskRecord, index: Index
) -> DiskLayer:
    name = f"{manifest.vm}/{manifest.point}/{disk.file.name}"
    descriptor = os.open(path / disk.file.name, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, descriptor)

    def read(offset: int, length: int) -> bytes:
        # One pread returns at most what a call may; frames are far below that, a disk's L1 as well.
        data = os.pread(descriptor, length, offset)
        while 0 < len(data) < length:
            more = os.pread(descriptor, length - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    try:
        reader = Qcow2Reader(read, os.fstat(descriptor).st_size)
    except Damaged as error:
        raise Damaged(f"{name}: {error}") from error
    expected = backing_name(manifest.base, disk.name) if manifest.base else None
    if reader.header.backing != expected or reader.header.size_bytes != disk.virtual_size:
        raise Damaged(f"{name}: its header names another base or size than the manifest")
    return DiskLayer(name, reader, index.disks[disk.name], descriptor)


def frames_of_view(view: ChainView, size_bytes: int) -> Iterator[tuple[int, bytes]]:
    """The data of a whole disk in frames on frame borders, ascending; what is not yielded reads as zeroes."""
    run: list[bytes] = []
    run_start = run_end = 0
    # In one go over the whole disk: what holds nothing costs nothing, however large the disk is.
    for piece in view.pieces(0, size_bytes):
        if piece.kind is not FrameKind.DATA:
            continue
        end = piece.offset + piece.length
        crosses = (end - 1) // DATA_BYTES_MAX != run_start // DATA_BYTES_MAX
        if run and (piece.offset != run_end or crosses):
            yield run_start, b"".join(run)
            run = []
        if not run:
            run_start = piece.offset
        run.append(view.read_piece(piece))
        run_end = end
    if run:
        yield run_start, b"".join(run)

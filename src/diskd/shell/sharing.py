"""A synthetic full that shares extents with the chain it was made from, where the file system can (reflinks).

Nothing is taken on trust: what is shared has been read and compared with its source's digest just before,
and the new point is read again as a whole before it takes its place. What cannot be shared is written:
ranges that are not aligned to the file system's blocks, small ones (each would be an extent of its own, and
keep the old file's whole extent alive), and everything once the file system has said that it cannot.
"""

from typing import Final

from daemonkit.units import KiB
from diskd.core.qcow2_writer import Share
from diskd.core.stream import FrameKind
from diskd.shell.chain_view import ChainView, OpenPoint
from diskd.shell.repository_files import RepositoryFiles

SHARED_BYTES_MIN: Final = 16 * KiB
# A first refusal may be one of this range; so many in a row are the file system's.
_REFUSALS_MAX: Final = 8


class Sharing:
    """One per synthesis. ``bytes`` counts what has been shared."""

    def __init__(self, files: RepositoryFiles, opened: OpenPoint, block_bytes: int) -> None:
        """``block_bytes``: of the file system that both files are on."""
        self._files = files
        self._views = opened.views
        self._block = block_bytes
        self._refusals = 0
        self.bytes = 0

    def into(self, descriptor: int, disk: str) -> Share:
        """For the writer of this disk's new file."""
        view = self._views[disk]

        def share(offset: int, host: int, length: int) -> list[tuple[int, int]]:
            return self._share(view, descriptor, offset, host, length)

        return share

    def _share(
        self, view: ChainView, descriptor: int, offset: int, host: int, length: int
    ) -> list[tuple[int, int]]:
        left: list[tuple[int, int]] = []
        position = 0
        for source, at, start, end in self._stored(view, offset, length):
            if self._refusals >= _REFUSALS_MAX:
                break
            first = -(-start // self._block) * self._block
            size = (end - first) // self._block * self._block
            at += first - start
            if size < SHARED_BYTES_MIN or at % self._block or (host + first) % self._block:
                continue
            if not self._files.clone(source, at, descriptor, host + first, size):
                self._refusals += 1
                continue
            self._refusals = 0
            self.bytes += size
            if first > position:
                left.append((position, first))
            position = first + size
        if position < length:
            left.append((position, length))
        return left

    def _stored(self, view: ChainView, offset: int, length: int) -> list[tuple[int, int, int, int]]:
        """(descriptor, file offset, start, end) of what the chain's files hold of a range of the disk, where
        start and end count from ``offset``; stretches that are contiguous in one file are one."""
        found: list[tuple[int, int, int, int]] = []
        for piece in view.pieces(offset, length):
            if piece.kind is not FrameKind.DATA:
                continue
            layer = view.layers[piece.layer]
            for mapped in layer.reader.map(piece.offset, piece.length):
                if mapped.kind != "data":
                    continue
                start, end = mapped.offset - offset, mapped.end - offset
                if found and found[-1][0] == layer.descriptor and found[-1][3] == start:
                    source, at, begin, _ = found[-1]
                    if at + start - begin == mapped.host:
                        found[-1] = (source, at, begin, end)
                        continue
                found.append((layer.descriptor, mapped.host, start, end))
        return found

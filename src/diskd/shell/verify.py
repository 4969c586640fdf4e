"""Verifying a point: everything is read again and compared with what must be there.

Four independent comparisons per disk: the file's bytes with the target's own checksum; the file's
structure with the rules of qcow2; every frame with the digest of the source; and whatever the file
holds besides its frames (the filling of partial clusters) with the base. The same function decides
before a commit whether the new point may be shown at all.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from daemonkit.units import GiB, MiB
from diskd.core.catalog import FileDigest, Manifest
from diskd.core.frame_index import DiskFrames
from diskd.core.stream import FrameKind
from diskd.errors import Damaged, Refused
from diskd.shell.chain_view import ChainView, open_point
from diskd.shell.repository_files import digest_file
from diskd.shell.work import Poll, count

# What is wrong is named place by place, but a ruined disk does not need a million lines.
PROBLEMS_MAX = 20
_ZERO_PORTION = 1 * GiB
_FILL_PORTION = 1 * MiB


class Stop:
    """For a thread beside one that may be cancelled: its ``poll`` raises once the block has been left."""

    def __init__(self) -> None:
        self._left = threading.Event()

    def __enter__(self) -> "Stop":
        return self

    def __exit__(self, *_error: object) -> None:
        self._left.set()

    def poll(self) -> None:
        if self._left.is_set():
            raise Refused("ended before it was complete")


def verify_point(directory: Path, chain: Sequence[Manifest], *, poll: Poll) -> tuple[int, list[str]]:
    """(bytes read, problems) of the first point of the chain. Nothing is raised for what is found."""
    path = directory / chain[0].point
    with ThreadPoolExecutor(1) as thread, Stop() as stop:
        files = thread.submit(check_files, path, chain[0], stop.poll)
        total, problems = verify_content(directory, chain, poll=poll)
        file_bytes, file_problems = files.result()
    return total + file_bytes, list(dict.fromkeys(file_problems + problems))[:PROBLEMS_MAX]


def check_files(path: Path, manifest: Manifest, poll: Poll) -> tuple[int, list[str]]:
    """(bytes read, problems): every file of a point against the target's own digest of it."""
    problems: list[str] = []
    total = 0
    for file in (manifest.config, manifest.index, *(disk.file for disk in manifest.disks)):
        size, problem = _check_file(path, manifest, file, poll)
        total += size
        if problem:
            problems.append(problem)
    return total, problems


def verify_content(
    directory: Path, chain: Sequence[Manifest], *, poll: Poll, top: Path | None = None
) -> tuple[int, list[str]]:
    """As verify_point, but for the target's own digests of the files: what the files mean."""
    manifest = chain[0]
    problems: list[str] = []
    total = 0
    try:
        with open_point(directory, chain, top=top) as opened:
            for disk in manifest.disks:
                checker = _DiskChecker(opened.views[disk.name], disk.virtual_size, poll)
                total += checker.run()
                problems += checker.problems
    except Damaged as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"{manifest.vm}/{manifest.point}: {error.filename or 'read'}: {error.strerror}")
    return total, problems


def _check_file(path: Path, manifest: Manifest, file: FileDigest, poll: Poll) -> tuple[int, str | None]:
    name = f"{manifest.vm}/{manifest.point}/{file.name}"
    try:
        size, digest = digest_file(path / file.name, poll)
    except OSError as error:
        return 0, f"{name}: {error.strerror}"
    if size != file.size:
        return size, f"{name}: {size} bytes long instead of {file.size}"
    if digest != file.blake3:
        return size, f"{name}: the file's bytes have changed since it was committed"
    return size, None


class _DiskChecker:
    def __init__(self, view: ChainView, size_bytes: int, poll: Poll) -> None:
        self._view = view
        self._size = size_bytes
        self._poll = poll
        self._layer = view.layers[0]
        self.problems: list[str] = []

    def run(self) -> int:
        """The number of guest bytes compared."""
        try:
            self._layer.reader.check()
        except Damaged as error:
            self.problems.append(f"{self._layer.name}: {error}")
            return 0
        total = self._check_frames(self._layer.frames)
        self._check_filling(self._layer.frames)
        return total

    def _check_frames(self, frames: DiskFrames) -> int:
        total = 0
        for number in range(len(frames)):
            self._poll()
            frame = frames.header(number)
            if frame.kind is FrameKind.DATA:
                total += frame.length
                try:
                    self._view.frame_data(number)
                except Damaged as error:
                    self._add(str(error))
                count(self._poll, frame.length)
            else:
                self._check_zero(frame.offset, frame.end)
        return total

    def _check_zero(self, offset: int, end: int) -> None:
        """A zeroed range must read as zeroes through this file, whatever the base holds there."""
        while offset < end:
            self._poll()
            stop = min(end, offset + _ZERO_PORTION)
            for mapped in self._layer.reader.map(offset, stop - offset):
                if mapped.kind == "data":
                    bad = any(self._layer.reader.read_mapped(mapped))
                else:
                    lower = self._view.lower.nonzero_ranges(mapped.offset, mapped.length)
                    bad = mapped.kind == "absent" and any(any(self._view.lower.read(*part)) for part in lower)
                if bad:
                    self._add(
                        f"{self._layer.name}: guest bytes {mapped.offset} to {mapped.end} should be zeroes"
                    )
            offset = stop

    def _check_filling(self, frames: DiskFrames) -> None:
        """What the file holds outside its frames must be what the base holds there."""
        position = 0
        for number in range(len(frames)):
            frame = frames.header(number)
            if frame.offset > position:
                self._check_gap(position, frame.offset)
            position = frame.end
        self._check_gap(position, self._size)

    def _check_gap(self, offset: int, end: int) -> None:
        for mapped in self._layer.reader.map(offset, end - offset):
            if mapped.kind == "absent":
                continue
            for start in range(mapped.offset, mapped.end, _FILL_PORTION):
                self._poll()
                length = min(_FILL_PORTION, mapped.end - start)
                if self._view.stored(start, length) != self._view.lower.read(start, length):
                    self._add(
                        f"{self._layer.name}: guest bytes {start} to {start + length} differ from the base"
                    )

    def _add(self, problem: str) -> None:
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(problem)

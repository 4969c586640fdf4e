"""The power fails: takes back, from a killed daemon's files, a random part of what was not synced.

Data goes by sectors: each may hold any of the values that it had since the last sync of its file, so that
writes are lost, torn and reordered; so may the size. Names go by directory, in the order of a journalling
file system: a random number of the newest changes of a directory since its last sync is undone. What was
synced stays. The extremes come up often, since most defects show there.
"""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any, Final, Literal

import attrs

from holdfast.crash.journal import SECTOR, Place, read

Keep = Literal["nothing", "everything", "sectors", "files", "earlier"]
KEEPS: Final[tuple[Keep, ...]] = (
    "nothing",
    "nothing",
    "sectors",
    "sectors",
    "files",
    "earlier",
    "everything",
)


_NAMES: Final = ("create", "rename", "exchange", "remove")


@attrs.define
class _File:
    """``versions``: per sector, (when, what it held before); ``sizes`` and ``mtimes`` likewise."""

    versions: dict[int, list[tuple[int, bytes]]] = attrs.Factory(dict)
    sizes: list[tuple[int, int]] = attrs.Factory(list)
    mtimes: list[tuple[int, int]] = attrs.Factory(list)


@attrs.frozen
class Lost:
    """What a failure took back."""

    keep: Keep
    sectors: int
    sizes: int
    names: int


def fail(place: Place, root: Path, rng: Random, keep: Keep | None = None) -> Lost:
    """The daemon is dead. Afterwards everything is durable, and the place is as new."""
    how = rng.choice(KEEPS) if keep is None else keep
    records = [
        (life, index, record)
        for life, path in enumerate(place.journals())
        for index, record in enumerate(read(path))
    ]
    fate = _Fate(how, rng, len(records))
    unsynced = _unsynced(records)
    names = _undo_names(place, root, [item for item in unsynced if item[1][0] in _NAMES], fate)
    data = [item for item in unsynced if item[1][0] not in _NAMES]
    sectors, sizes, times = _undo_data(place, root, data, fate)
    shutil.rmtree(place.saved)
    place.saved.mkdir()
    for path in place.journals():
        path.unlink()
    # What an earlier failure changed and nobody has since still needs to be told as it was.
    known = json.loads(place.times.read_text()) if place.times.exists() else {}
    place.times.write_text(json.dumps({**known, **{str(inode): pair for inode, pair in times.items()}}))
    return Lost(how, sectors, sizes, names)


class _Fate:
    """How many of a thing's changes survive."""

    def __init__(self, keep: Keep, rng: Random, end: int) -> None:
        self._keep = keep
        self._rng = rng
        self._until = rng.randrange(end + 1)
        self._all: dict[int, bool] = {}

    def kept(self, thing: int, whens: list[int]) -> int:
        """Of changes made at ``whens``, ascending, the first so many are kept."""
        match self._keep:
            case "nothing":
                return 0
            case "everything":
                return len(whens)
            case "earlier":
                return sum(when < self._until for when in whens)
            case "files":
                if thing not in self._all:
                    self._all[thing] = self._rng.random() < 0.5
                return len(whens) if self._all[thing] else 0
            case "sectors":
                return self._rng.randrange(len(whens) + 1)


def _subject(record: list[Any]) -> int:
    """The inode whose sync makes it durable: for a rename, that of the directory it goes to."""
    return int(record[3] if record[0] in ("rename", "exchange") else record[1])


def _unsynced(records: list[tuple[int, int, list[Any]]]) -> list[tuple[int, list[Any]]]:
    synced: dict[int, tuple[int, int]] = {}
    for life, _, record in records:
        if record[0] == "sync":
            # Of two at once the one that began first, and covers less, may be noted last.
            synced[record[1]] = max(synced.get(record[1], (-1, 0)), (life, record[2]))
    return [
        (when, record)
        for when, (life, index, record) in enumerate(records)
        if record[0] != "sync" and (life, index) >= synced.get(_subject(record), (-1, 0))
    ]


def _paths(place: Place, root: Path) -> dict[int, Path]:
    """Everything under the root, and what was removed there, by inode."""
    found = {root.stat().st_ino: root}
    for top in (place.saved, root):
        for directory, folders, files in os.walk(top):
            for name in (*folders, *files):
                path = Path(directory, name)
                found[path.lstat().st_ino] = path
    return found


# --- names


def _undo_names(place: Place, root: Path, changes: list[tuple[int, list[Any]]], fate: _Fate) -> int:
    by_directory: dict[int, list[int]] = defaultdict(list)
    for when, record in changes:
        by_directory[_subject(record)].append(when)
    kept = {when for inode, whens in by_directory.items() for when in whens[: fate.kept(inode, whens)]}
    undone = 0
    for when, record in reversed(changes):
        if when not in kept:
            _undo_name(place, _paths(place, root), when, record)
            undone += 1
    return undone


def _undo_name(place: Place, paths: dict[int, Path], when: int, record: list[Any]) -> None:
    kind, inode, name, *rest = record
    if inode not in paths:
        return
    path = paths[inode] / name
    match kind:
        case "create":
            if os.path.lexists(path):
                path.rename(place.saved / f"uncreated.{when}")
        case "remove":
            saved = place.saved / rest[0]
            if not os.path.lexists(path) and os.path.lexists(saved):
                saved.rename(path)
        case "exchange":
            to, to_name = rest
            other = paths[to] / to_name if to in paths else None
            if other is not None and os.path.lexists(other) and os.path.lexists(path):
                between = place.saved / f"exchanged.{when}"
                path.rename(between)
                other.rename(path)
                between.rename(other)
        case "rename":
            to, to_name, saved_name = rest
            target = paths[to] / to_name if to in paths else None
            if target is None or os.path.lexists(path) or not os.path.lexists(target):
                return
            target.rename(path)
            if saved_name is not None:
                (place.saved / saved_name).rename(target)


# --- data


def _collect(changes: Iterable[tuple[int, list[Any]]]) -> dict[int, _File]:
    files: dict[int, _File] = defaultdict(_File)
    for when, (kind, inode, size, mtime, *rest) in changes:
        file = files[inode]
        file.sizes.append((when, size))
        file.mtimes.append((when, mtime))
        if kind == "data":
            offset, old = rest
            for index in range(len(old) // SECTOR):
                sector = old[index * SECTOR : (index + 1) * SECTOR]
                file.versions.setdefault(offset // SECTOR + index, []).append((when, sector))
    return files


def _undo_data(
    place: Place, root: Path, changes: list[tuple[int, list[Any]]], fate: _Fate
) -> tuple[int, int, dict[int, tuple[int, int]]]:
    paths = _paths(place, root)
    sectors = sizes = 0
    times: dict[int, tuple[int, int]] = {}
    for inode, file in sorted(_collect(changes).items()):
        if inode not in paths:
            continue
        path = paths[inode]
        before = path.stat()
        size = _chosen(file.sizes, before.st_size, fate.kept(inode, [when for when, _ in file.sizes]))
        mtime = _chosen(file.mtimes, before.st_mtime_ns, fate.kept(inode, [when for when, _ in file.mtimes]))
        descriptor = os.open(path, os.O_RDWR)
        try:
            if size > before.st_size:
                os.ftruncate(descriptor, size)
            for number, versions in sorted(file.versions.items()):
                kept = fate.kept(inode, [when for when, _ in versions])
                if kept < len(versions):
                    os.pwrite(descriptor, versions[kept][1], number * SECTOR)
                    sectors += 1
            os.ftruncate(descriptor, size)
        finally:
            os.close(descriptor)
        sizes += size != before.st_size
        os.utime(path, ns=(before.st_atime_ns, mtime))
        times[inode] = (path.stat().st_ctime_ns, mtime)
    return sectors, sizes, times


def _chosen(versions: list[tuple[int, int]], now: int, kept: int) -> int:
    return versions[kept][1] if kept < len(versions) else now

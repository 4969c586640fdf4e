"""What power could still take back: a journal of the old state of everything that was not synced.

Written by the daemon under test (syscalls.py) before each change of a file or directory, read after it was
killed (power.py). It lies beside the daemon's root, in the page cache, which a kill does not lose. Each life
of the daemon writes a file of its own, ``journal.N``; a record is a length and a msgpack array:

    data   inode, size, mtime, offset, old bytes      the range is about to change; whole sectors
    size   inode, size, mtime                         the size is about to change
    sync   inode, position                            what was recorded before ``position`` is durable
    create dir, name                                  mkdir likewise
    rename dir, name, to dir, to name, saved          ``saved``: a link to what was replaced, or None
    exchange dir, name, dir, name                     two directories swap their names
    remove dir, name, saved                           unlink and rmdir; ``saved`` is what was removed

Directories and files are named by inode. Removed ones stay in ``saved/``, so that no inode number is used
again while the journal lives.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import attrs

from daemonkit.codec import decode, encode

SECTOR: Final = 512
_LENGTH: Final = struct.Struct("<I")


@attrs.frozen
class Place:
    """The directory of one power supply: journals, saved files, and what the files' ctimes should be.

    ``near``: a directory for the saved files where ``directory`` is on another file system than the root.
    """

    directory: Path
    near: Path | None = None

    @property
    def saved(self) -> Path:
        return (self.near or self.directory) / "saved"

    def make(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.saved.mkdir(parents=True, exist_ok=True)

    @property
    def times(self) -> Path:
        return self.directory / "times"

    @property
    def moment(self) -> Path:
        """Where a story says at which change the daemon is to die (syscalls.Moment)."""
        return self.directory / "moment"

    def journals(self) -> list[Path]:
        """In the order of the lives that wrote them."""
        return sorted(self.directory.glob("journal.*"), key=lambda path: int(path.suffix[1:]))


class Journal:
    """The journal of one life. Its user holds a lock around each record and the change it announces."""

    def __init__(self, place: Place) -> None:
        place.make()
        self.number = max((int(path.suffix[1:]) for path in place.journals()), default=0) + 1
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(place.directory / f"journal.{self.number}", flags, 0o600)
        self.position = 0

    def add(self, write: Any, *record: Any) -> None:
        """``write`` is the system's own, which syscalls.py has replaced in os."""
        body = encode(record)
        data = _LENGTH.pack(len(body)) + body
        if write(self._descriptor, data) != len(data):
            raise OSError("the power journal is full")
        self.position += 1


def read(path: Path) -> Iterator[list[Any]]:
    """The whole records of one life; a torn last one announced a change that was never made."""
    data = path.read_bytes()
    offset = 0
    while offset + _LENGTH.size <= len(data):
        (length,) = _LENGTH.unpack_from(data, offset)
        offset += _LENGTH.size
        if offset + length > len(data):
            return
        yield decode(data[offset : offset + length])
        offset += length

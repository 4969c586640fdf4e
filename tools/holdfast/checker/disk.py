"""The disk as the checker reads it: a raw file, or an NBD export through the guest's own client."""

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

from holdfast.checker.verdict import ReadDisk
from holdfast.guest.nbd import NbdClient


class Disk(NamedTuple):
    read: ReadDisk
    size_bytes: int


@contextlib.contextmanager
def open_disk(where: str) -> Iterator[Disk]:
    """``nbd://…`` or the path of a raw file. Raises OSError, NbdError, ValueError."""
    if "://" in where:
        with NbdClient(where) as client:
            yield Disk(client.read, client.size_bytes)
        return
    with open(where, "rb", buffering=0) as file:
        descriptor = file.fileno()
        size_bytes = os.fstat(descriptor).st_size

        def read(offset: int, length: int) -> bytes:
            data = os.pread(descriptor, length, offset)
            return data.ljust(length, b"\0")  # beyond the end of a short file there is nothing

        yield Disk(read, size_bytes)

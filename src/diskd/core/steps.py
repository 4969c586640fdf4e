"""Durable sequences as values: a *script* is a generator that yields I/O steps and is sent their results.

Whatever must happen in an order that survives a crash is written once, here in the core, as a script:

    def open_region(...) -> Script[None]:
        yield Write("disk.mrt", offset, record)
        yield Sync("disk.mrt")

``diskd.shell.files`` runs scripts on real files, in a worker thread, one thread hop for a whole script.
``diskd.sim.disk`` runs the same scripts on a disk that loses, tears and reorders whatever was not synced,
crashes at every step, and interleaves several scripts. So the order that is tested is the order that runs.

File names are relative to the image's directory and fixed by this project; they never come from a peer.
A step that fails raises OSError at its ``yield``. A failed Sync is final: a script must not retry it.
"""

from collections.abc import Callable, Generator
from typing import Any, TypeAlias, TypeVar

import attrs

T = TypeVar("T")


@attrs.frozen
class Read:
    """Sent back: bytes, shorter than ``length`` only at the end of the file."""

    file: str
    offset: int
    length: int


@attrs.frozen
class Write:
    """Not durable, and not ordered against other writes, until the file is synced. Sent back: None."""

    file: str
    offset: int
    data: bytes


@attrs.frozen
class Punch:
    """Deallocate a range so that it reads as zeroes; the size stays. Durable with the next Sync."""

    file: str
    offset: int
    length: int


@attrs.frozen
class Allocate:
    """Create the file if absent and reserve ``size`` bytes, so that later writes in it need no new space."""

    file: str
    size: int


@attrs.frozen
class Truncate:
    """Create the file if absent and set its size, sparse. Durable with the next Sync."""

    file: str
    size: int


@attrs.frozen
class Sync:
    """fdatasync: everything written to the file before is durable afterwards (size included)."""

    file: str


@attrs.frozen
class Replace:
    """Write a small file anew, atomically and durably (temporary, fsync, rename, fsync of the directory)."""

    file: str
    data: bytes


@attrs.frozen
class Create:
    """A small file that does not exist yet, whole and durable, or FileExistsError: of several that try at
    once, on one host or on several that share the storage, exactly one succeeds."""

    file: str
    data: bytes


@attrs.frozen
class Remove:
    """Unlink, durably; absent is fine."""

    file: str


@attrs.frozen
class Size:
    """Sent back: the size in bytes, or None where the file does not exist."""

    file: str


@attrs.frozen
class Names:
    """Sent back: the names of all files that begin with ``file``, sorted."""

    file: str


Step: TypeAlias = Read | Write | Punch | Allocate | Truncate | Sync | Replace | Create | Remove | Size | Names
Script: TypeAlias = Generator[Step, Any, T]


def before_steps(script: Script[T], note: Callable[[Step], None]) -> Script[T]:
    """The same script; ``note`` is called with each step right before it is executed."""
    result: Any = None
    error: OSError | None = None
    while True:
        try:
            step = script.throw(error) if error is not None else script.send(result)
        except StopIteration as stop:
            value: T = stop.value
            return value
        result = error = None
        note(step)
        try:
            result = yield step
        except OSError as failure:
            error = failure

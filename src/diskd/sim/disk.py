"""A disk for scripts that loses, tears and reorders whatever was not synced.

A failed sync is as Linux does it: what was to be written counts as written from then on, and is read back
as such, but the disk may have something older, until the sector is written again.

Every 512-byte sector written since the last sync of its file may, after a power loss, hold any of the values
it had since then, each sector for itself; so may the file's size. What was synced, replaced or removed
stays. A crash of the daemon alone keeps everything. Shared memory lives as long as the boot.

``crash_in`` counts steps down and raises Crashed instead of executing the step at zero, so that a test can
run the same thing again and again and crash at every step of it.
"""

import errno
from collections.abc import Callable
from random import Random
from typing import Any, Final, TypeVar

import attrs

from diskd.core.steps import (
    Allocate,
    Create,
    Names,
    Punch,
    Read,
    Remove,
    Replace,
    Script,
    Size,
    Step,
    Sync,
    Truncate,
    Write,
)

T = TypeVar("T")

SECTOR_BYTES: Final = 512
_ZERO: Final = bytes(SECTOR_BYTES)


class Crashed(Exception):
    """The simulated machine or daemon stopped before this step."""


@attrs.define
class _File:
    """As a running system sees it; ``versions`` and ``sizes`` are what a power loss can bring back, ``lost``
    what it will bring back, since a sync failed."""

    size: int = 0
    sectors: dict[int, bytes] = attrs.Factory(dict)
    versions: dict[int, list[bytes]] = attrs.Factory(dict)
    sizes: list[int] = attrs.Factory(list)
    lost: dict[int, bytes] = attrs.Factory(dict)

    def put(self, index: int, data: bytes) -> None:
        old = self.lost.pop(index, self.sectors.get(index, _ZERO))
        self.versions.setdefault(index, [old]).append(data)
        self.sectors[index] = data

    def resize(self, size: int) -> None:
        if not self.sizes:
            self.sizes.append(self.size)
        self.sizes.append(size)
        for index in [index for index in self.sectors if index * SECTOR_BYTES >= size]:
            self.put(index, _ZERO)
        tail = size % SECTOR_BYTES
        last = size // SECTOR_BYTES
        if size < self.size and tail and last in self.sectors:
            self.put(last, self.sectors[last][:tail].ljust(SECTOR_BYTES, b"\0"))
        self.size = size

    def synced(self) -> None:
        self.versions.clear()
        self.sizes.clear()

    def not_synced(self, rng: Random) -> None:
        for index, versions in self.versions.items():
            self.lost[index] = rng.choice(versions)
        self.versions.clear()


class SimSharedMemory:
    """Shared bitmaps by nonce (core.shared.SharedMemory). ``full`` makes the next allocation fail."""

    def __init__(self) -> None:
        self.areas: dict[bytes, bytearray] = {}
        self.full = False

    def create(self, nonce: bytes, size_bytes: int) -> memoryview:
        if self.full:
            raise OSError(errno.ENOSPC, "shared memory is full")
        self.areas[nonce] = bytearray(size_bytes)
        return memoryview(self.areas[nonce])

    def open(self, nonce: bytes, size_bytes: int) -> memoryview | None:
        area = self.areas.get(nonce)
        return memoryview(area) if area is not None and len(area) == size_bytes else None

    def remove(self, nonce: bytes) -> None:
        self.areas.pop(nonce, None)


class SimDisk:
    """Files of one directory, and the shared memory of one boot."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._files: dict[str, _File] = {}
        self._failed: set[str] = set()
        self.shared = SimSharedMemory()
        self.boot = 1
        self.steps = 0
        self.crash_in: int | None = None
        self.before_step: Callable[[Step], None] | None = None
        self.fail_when: Callable[[Step], int | None] = lambda step: None

    def run(self, script: Script[T]) -> T:
        """The whole script at once."""
        result: Any = None
        error: OSError | None = None
        try:
            while True:
                step = script.throw(error) if error is not None else script.send(result)
                result = error = None
                try:
                    result = self.execute(step)
                except OSError as failure:
                    error = failure
        except StopIteration as stop:
            value: T = stop.value
            return value

    def execute(self, step: Step) -> Any:
        """One step. Raises Crashed when the countdown is over, OSError where the step fails."""
        if self.before_step is not None:
            self.before_step(step)
        if self.crash_in is not None:
            if self.crash_in <= 0:
                raise Crashed
            self.crash_in -= 1
        self.steps += 1
        if step.file in self._failed and not isinstance(step, Size | Replace | Create | Remove | Names):
            raise OSError(errno.EIO, "an earlier sync failed", step.file)
        number = self.fail_when(step)
        if number is not None:
            if isinstance(step, Sync):
                self._failed.add(step.file)
                self._existing(step.file).not_synced(self._rng)
            raise OSError(number, "simulated failure", step.file)
        return self._do(step)

    def _do(self, step: Step) -> Any:
        match step:
            case Write(name, offset, data):
                return self._write(self._existing(name), offset, data)
            case Read(name, offset, length):
                return self._read(self._existing(name), offset, length)
            case Sync(name):
                return self._existing(name).synced()
            case Punch(name, offset, length):
                file = self._existing(name)
                end = min(offset + length, file.size)
                return self._write(file, offset, bytes(end - offset)) if end > offset else None
            case Allocate(name, size):
                file = self._files.setdefault(name, _File())
                return file.resize(size) if size > file.size else None
            case Truncate(name, size):
                return self._files.setdefault(name, _File()).resize(size)
            case Replace(name, data):
                file = self._files[name] = _File()
                self._write(file, 0, data)
                return file.synced()
            case Create(name, data):
                if name in self._files:
                    raise FileExistsError(errno.EEXIST, "it exists", name)
                return self._do(Replace(name, data))
            case Names(prefix):
                return [name for name in self.names() if name.startswith(prefix)]
            case Remove(name):
                self._files.pop(name, None)
                return None
            case Size(name):
                return self._files[name].size if name in self._files else None

    def _existing(self, name: str) -> _File:
        if name not in self._files:
            raise FileNotFoundError(errno.ENOENT, "no such file", name)
        return self._files[name]

    @staticmethod
    def _write(file: _File, offset: int, data: bytes) -> None:
        end = offset + len(data)
        if end > file.size:
            file.resize(end)
        for index in range(offset // SECTOR_BYTES, -(-end // SECTOR_BYTES)):
            start = index * SECTOR_BYTES
            low, high = max(start, offset), min(start + SECTOR_BYTES, end)
            part = bytes(data[low - offset : high - offset])
            if len(part) < SECTOR_BYTES:
                old = file.sectors.get(index, _ZERO)
                part = old[: low - start] + part + old[high - start :]
            file.put(index, part)

    @staticmethod
    def _read(file: _File, offset: int, length: int) -> bytes:
        end = min(offset + length, file.size)
        if end <= offset:
            return b""
        first = offset // SECTOR_BYTES
        sectors = [file.sectors.get(index, _ZERO) for index in range(first, -(-end // SECTOR_BYTES))]
        skip = offset - first * SECTOR_BYTES
        return b"".join(sectors)[skip : skip + end - offset]

    # --- crashes -----------------------------------------------------------------------------------

    def daemon_crash(self) -> None:
        """The page cache and shared memory survive; a failed sync is forgotten with the descriptors."""
        self.crash_in = None
        self._failed.clear()

    def power_loss(self) -> None:
        """What was not synced is lost, kept, torn or reordered; shared memory is gone."""
        self.daemon_crash()
        self.boot += 1
        self.shared.areas.clear()
        # The extremes are where most defects show, so they come up often.
        keep = self._rng.choice(("nothing", "everything", "some", "some"))
        for name in sorted(self._files):
            self._settle(self._files[name], keep)

    def _settle(self, file: _File, keep: str) -> None:
        for index, versions in file.versions.items():
            match keep:
                case "nothing":
                    file.sectors[index] = versions[0]
                case "some":
                    file.sectors[index] = self._rng.choice(versions)
        file.sectors.update(file.lost)
        file.lost.clear()
        if file.sizes:
            match keep:
                case "nothing":
                    file.size = file.sizes[0]
                case "some":
                    file.size = self._rng.choice(file.sizes)
        for index in [index for index in file.sectors if index * SECTOR_BYTES >= file.size]:
            del file.sectors[index]
        file.synced()

    # --- for tests ---------------------------------------------------------------------------------

    def peek(self, name: str) -> bytes:
        """The whole content, without a step."""
        file = self._existing(name)
        return self._read(file, 0, file.size)

    def content(self, name: str) -> dict[int, bytes]:
        """The sectors that are not zero, by number, without a step."""
        return {index: data for index, data in self._existing(name).sectors.items() if data != _ZERO}

    def poke(self, name: str, offset: int, data: bytes) -> None:
        """Damage a file, durably, without a step."""
        file = self._existing(name)
        self._write(file, offset, data)
        file.synced()

    def size(self, name: str) -> int:
        """Of an existing file, without a step."""
        return self._existing(name).size

    def names(self) -> list[str]:
        """All files, sorted."""
        return sorted(self._files)

    def is_whole(self, name: str) -> bool:
        """Whether everything written to the file is durable."""
        file = self._existing(name)
        return not file.versions and not file.lost

"""One machine with a diskd on it, which is started, killed with -9, and (if one likes) loses its power.

A power loss is a kill, then: whatever was not synced is lost, kept or torn (power.py), shared memory is gone,
and the next start is another boot.
"""

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Final, TypeVar

import trio

from daemonkit.cli import call_once
from daemonkit.methods import Method
from daemonkit.ports import Address
from holdfast.crash import power
from holdfast.crash.journal import Place
from holdfast.crash.process import DISKD, STOP_SECONDS_MAX, DaemonProcess
from holdfast.crash.syscalls import Moment

P = TypeVar("P")
R = TypeVar("R")

CALL_SECONDS_MAX: Final = 120.0
KEEP: Final = "HOLDFAST_CRASH_KEEP"  # a directory for what a failed story leaves behind


class Machine:
    """Everything lies under ``directory``, but shared memory under ``shared`` (a tmpfs), emptied at the end.

    ``can_lose_power``: its diskd keeps the journal which a power loss needs.
    """

    def __init__(
        self, directory: Path, shared: Path, *, can_lose_power: bool, settings: tuple[str, ...]
    ) -> None:
        self.directory = directory
        self.root = directory / "root"
        self.can_lose_power = can_lose_power
        self._shared = shared
        self._settings = settings
        self._place = Place(directory / "power")
        self._boot = directory / "boot_id"
        self._diskd = DaemonProcess(directory / "diskd.log")
        self.root.mkdir()
        self._place.make()
        self._boot.write_text(str(uuid.uuid4()))

    @property
    def nbd(self) -> Address:
        return Address.parse(self._diskd.ready["nbd"])

    @property
    def control(self) -> Address:
        return Address.parse(self._diskd.ready["control"])

    @property
    def is_running(self) -> bool:
        return self._diskd.is_running

    def log(self) -> str:
        """The end of what diskd had to say."""
        return self._diskd.log()

    def _arguments(self) -> list[str]:
        place = str(self._place.directory)
        journal = ("-m", "holdfast.crash.daemon", place, place, str(self.root), "--")
        free = ("--nbd", "127.0.0.1:0", "--control", "127.0.0.1:0")
        own = (f"shared_dir={self._shared}", f"boot_id_file={self._boot}", *self._settings)
        settings = [part for setting in own for part in ("--set", setting)]
        program = journal if self.can_lose_power else DISKD
        return [*program, "run", "--root", str(self.root), *free, *settings]

    async def start(self) -> None:
        """Until it serves: at once, whatever happened before."""
        await self._diskd.start(self._arguments())

    async def start_in_vain(self, rng: Random) -> None:
        """Killed again before, or just when, it is ready."""
        await self._diskd.spawn(self._arguments())
        await trio.sleep(0.25 + 0.35 * rng.random())
        await self._diskd.kill()

    def let_it_die(self, name: str, count: int) -> None:
        """Before it changes, syncs or replaces a file of that name, after so many times that it did."""
        Moment.ask(self._place.moment, name, count)

    async def has_died_by_itself(self) -> bool:
        """As was asked for, if it was."""
        return self._place.moment.exists() and await self._diskd.has_died()

    async def kill(self) -> None:
        """-9, and wait."""
        await self._diskd.kill()
        self._place.moment.unlink(missing_ok=True)

    async def stop(self) -> None:
        """Cleanly; it must end with 0."""
        await self._diskd.stop()

    def lose_power(self, rng: Random, keep: power.Keep | None = None) -> power.Lost:
        """The daemon was killed a moment ago."""
        lost = power.fail(self._place, self.root, rng, keep)
        self.clear_shared()
        self._boot.write_text(str(uuid.UUID(int=rng.getrandbits(128))))
        return lost

    def shared_left(self) -> list[str]:
        """What lies in shared memory."""
        return sorted(path.name for path in self._shared.iterdir())

    def clear_shared(self) -> None:
        for path in self._shared.iterdir():
            path.unlink()

    async def call(self, method: Method[P, R], params: P) -> R:
        """One control call. Raises CallRefused, or CallFailed where diskd is gone."""
        return await call_once(self.control, method, params, seconds_max=CALL_SECONDS_MAX)

    async def close(self) -> None:
        """Whatever happened: nothing runs and nothing lies in shared memory afterwards."""
        await self._diskd.close()
        self.clear_shared()


def _directory(*, in_memory: bool) -> Path:
    parent = "/dev/shm" if in_memory and Path("/dev/shm").is_dir() else None
    return Path(tempfile.mkdtemp(prefix="holdfast-crash-", dir=parent))


@asynccontextmanager
async def machine(rng: Random, *, can_lose_power: bool, settings: tuple[str, ...]) -> AsyncIterator[Machine]:
    """A machine in directories of its own, gone afterwards."""
    # A kill loses nothing of either; syncs take no time in memory, and open wider windows on a disk.
    with contextlib.ExitStack() as undo:
        shared = _directory(in_memory=True)
        undo.callback(shutil.rmtree, shared)
        directory = _directory(in_memory=rng.random() < 0.6)
        undo.callback(shutil.rmtree, directory)
        made = Machine(directory, shared, can_lose_power=can_lose_power, settings=settings)
        try:
            yield made
        except BaseException:
            if KEEP in os.environ:
                shutil.copytree(directory, os.environ[KEEP], dirs_exist_ok=True, symlinks=True)
            raise
        finally:
            with trio.move_on_after(STOP_SECONDS_MAX, shield=True):
                await made.close()

"""One machine with a diskd on it, which is started, killed with -9, and (if one likes) loses its power.

A power loss is a kill, then: whatever was not synced is lost, kept or torn (power.py), shared memory is gone,
and the next start is another boot.
"""

import json
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from random import Random
from typing import Any, Final, TypeVar

import trio

from daemonkit.cli import call_once
from daemonkit.methods import Method
from daemonkit.ports import Address
from holdfast.crash import power
from holdfast.crash.journal import Place
from holdfast.crash.oracle import Violation

P = TypeVar("P")
R = TypeVar("R")

START_SECONDS_MAX: Final = 60.0
STOP_SECONDS_MAX: Final = 60.0
CALL_SECONDS_MAX: Final = 60.0


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
        self._log = directory / "log"
        self._process: trio.Process | None = None
        self._ready: dict[str, Any] = {}
        self.root.mkdir()
        self._place.saved.mkdir(parents=True)
        self._boot.write_text(str(uuid.uuid4()))

    @property
    def nbd(self) -> Address:
        return Address.parse(self._ready["nbd"])

    @property
    def control(self) -> Address:
        return Address.parse(self._ready["control"])

    def log(self) -> str:
        """What all lives of the daemon had to say."""
        return self._log.read_text()

    async def spawn(self) -> trio.Process:
        """A started daemon, not yet ready."""
        if self.can_lose_power:
            program = ["-m", "holdfast.crash.daemon", str(self._place.directory), str(self.root), "--"]
        else:
            program = ["-c", "from diskd.cli.daemon import main; main()"]
        free = ["--nbd", "127.0.0.1:0", "--control", "127.0.0.1:0"]
        own = (f"shared_dir={self._shared}", f"boot_id_file={self._boot}", *self._settings)
        settings = [part for setting in own for part in ("--set", setting)]
        argv = [sys.executable, *program, "run", "--root", str(self.root), *free, *settings]
        with self._log.open("ab") as log:
            self._process = await trio.lowlevel.open_process(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
            )
        return self._process

    async def start(self) -> None:
        """Until it serves: at once, whatever happened before."""
        process = await self.spawn()
        line = b""
        assert process.stdout is not None
        with trio.fail_after(START_SECONDS_MAX):
            while not line.endswith(b"\n"):
                part = await process.stdout.receive_some(4096)
                if not part:
                    raise Violation(f"diskd does not start: {self.log()[-2000:]}")
                line += part
            await process.stdout.aclose()
        self._ready = json.loads(line)

    async def kill(self) -> None:
        """-9, and wait."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> None:
        """Cleanly; it must end with 0."""
        code = await self._end(signal.SIGTERM)
        if code != 0:
            raise Violation(f"diskd ended with {code}: {self.log()[-2000:]}")

    async def _end(self, number: signal.Signals) -> int:
        process, self._process = self._process, None
        assert process is not None
        with trio.fail_after(STOP_SECONDS_MAX):
            if process.returncode is None:
                process.send_signal(number)
            code = await process.wait()
            if process.stdout is not None:
                await process.stdout.aclose()
        return code

    def lose_power(self, rng: Random) -> power.Lost:
        """The daemon was killed a moment ago."""
        lost = power.fail(self._place, self.root, rng)
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
        if self._process is not None:
            with trio.CancelScope(shield=True):
                await self.kill()
        self.clear_shared()
        self._shared.rmdir()

"""A daemon as a process of its own: started until its ready line, killed with -9, or stopped cleanly."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import trio

from holdfast.crash.oracle import Violation

START_SECONDS_MAX: Final = 60.0
STOP_SECONDS_MAX: Final = 60.0
DIE_SECONDS_MAX: Final = 10.0
DISKD: Final = ("-c", "from diskd.cli.daemon import main; main()")
DISKCTL: Final = (sys.executable, "-c", "from diskd.cli.ctl import main; main()")


class DaemonProcess:
    """One life after the other; what all of them had to say is in ``log``."""

    def __init__(self, log: Path) -> None:
        self.ready: dict[str, Any] = {}
        self._log = log
        self._process: trio.Process | None = None

    @property
    def is_running(self) -> bool:
        return self._process is not None

    def log(self) -> str:
        """The end of it."""
        return self._log.read_text()[-1200:]

    async def spawn(self, arguments: Sequence[str]) -> trio.Process:
        """Started, not yet ready. ``arguments`` are the interpreter's."""
        with self._log.open("ab") as log:
            self._process = await trio.lowlevel.open_process(
                [sys.executable, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
            )
        return self._process

    async def start(self, arguments: Sequence[str]) -> None:
        """Until it serves. Raises Violation where it does not."""
        process = await self.spawn(arguments)
        line = b""
        assert process.stdout is not None
        with trio.fail_after(START_SECONDS_MAX):
            while not line.endswith(b"\n"):
                part = await process.stdout.receive_some(4096)
                if not part:
                    raise Violation(f"a daemon does not start: {self.log()}")
                line += part
            await process.stdout.aclose()
        self.ready = json.loads(line)

    async def kill(self) -> None:
        """-9, and wait. Dead already is fine."""
        await self._end(signal.SIGKILL)

    async def has_died(self) -> bool:
        """By itself. What is heard of that first, a connection that breaks, may be a little earlier."""
        process = self._process
        if process is None:
            return True  # and somebody has waited for it already
        with trio.move_on_after(DIE_SECONDS_MAX):
            await process.wait()
        return process.returncode is not None

    async def stop(self) -> None:
        """Cleanly; it must end with 0."""
        code = await self._end(signal.SIGTERM)
        if code != 0:
            raise Violation(f"a daemon ended with {code}: {self.log()}")

    async def close(self) -> None:
        """Whatever happened: it does not run afterwards."""
        if self._process is not None:
            with trio.CancelScope(shield=True):
                await self.kill()

    async def _end(self, number: signal.Signals) -> int:
        process, self._process = self._process, None
        assert process is not None
        # Shielded: a fault that is called off in the middle would leave a process that nobody waits for.
        with trio.fail_after(STOP_SECONDS_MAX, shield=True):
            if process.returncode is None:
                process.send_signal(number)
            code = await process.wait()
            if process.stdout is not None:
                await process.stdout.aclose()
        return code

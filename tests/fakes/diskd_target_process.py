"""A real `diskd target` process in tests: started, killed, started again."""

import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import trio

from daemonkit.ports import Address

SECONDS_MAX = 30
BINARIES = Path(sys.executable).parent


class TargetProcess:
    """``root`` is the repository; ``address`` where it listens."""

    def __init__(self, root: Path, *arguments: str) -> None:
        self.root = root
        self.arguments = arguments
        self.ready: dict[str, Any] = {}
        self._process: trio.Process | None = None

    @property
    def address(self) -> Address:
        return Address.parse(self.ready["listen"])

    @property
    def process(self) -> trio.Process:
        assert self._process is not None
        return self._process

    def log(self) -> str:
        return (self.root.parent / f"{self.root.name}.log").read_text()

    async def start(self) -> None:
        argv = [str(BINARIES / "diskd"), "target", "--root", str(self.root), "--listen", "127.0.0.1:0"]
        with (self.root.parent / f"{self.root.name}.log").open("ab") as log, trio.fail_after(SECONDS_MAX):
            self._process = await trio.lowlevel.open_process(
                [*argv, *self.arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
            )
            stdout = self._process.stdout
            assert stdout is not None
            line = b""
            while not line.endswith(b"\n"):
                part = await stdout.receive_some(4096)
                assert part, f"the target ended before it was ready: {self.log()}"
                line += part
            await stdout.aclose()
        self.ready = json.loads(line)

    async def end(self, number: int) -> int:
        """Send a signal and wait; the exit code."""
        with trio.fail_after(SECONDS_MAX):
            self.process.send_signal(number)
            return await self.process.wait()


@contextlib.asynccontextmanager
async def target_process(root: Path, *arguments: str) -> AsyncIterator[TargetProcess]:
    """A started target; it is killed at the end if it still runs."""
    target = TargetProcess(root, *arguments)
    root.mkdir(exist_ok=True)  # noqa: ASYNC240 - nothing else runs in this loop yet
    try:
        await target.start()
        yield target
    finally:
        if target._process is not None and target._process.returncode is None:
            target._process.kill()
            with trio.move_on_after(SECONDS_MAX, shield=True):
                await target._process.wait()

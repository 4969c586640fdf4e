"""A real `diskd run` process in tests: started, asked through `diskctl`, stopped or killed."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import trio
from programs import Outcome

SECONDS_MAX = 30
BINARIES = Path(sys.executable).parent


def new_shared_dir() -> Path:
    """Of the test's own: what a killed daemon leaves there would stay until the next boot."""
    parent = "/dev/shm" if Path("/dev/shm").is_dir() else None
    return Path(tempfile.mkdtemp(prefix="holdfast-test-", dir=parent))


class DiskdProcess:
    """``root`` is served; ``ready`` is the ready line's document."""

    def __init__(self, root: Path, *arguments: str) -> None:
        self.root = root
        self.arguments = arguments
        self.ready: dict[str, Any] = {}
        self._process: trio.Process | None = None

    @property
    def nbd(self) -> str:
        return f"nbd://{self.ready['nbd']}"

    @property
    def process(self) -> trio.Process:
        assert self._process is not None
        return self._process

    def argv(self) -> list[str]:
        free = ["--nbd", "127.0.0.1:0", "--control", "127.0.0.1:0"]
        return [str(BINARIES / "diskd"), "run", "--root", str(self.root), *free, *self.arguments]

    async def start(self) -> None:
        with (self.root.parent / f"{self.root.name}.log").open("ab") as log, trio.fail_after(SECONDS_MAX):
            self._process = await trio.lowlevel.open_process(
                self.argv(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
            )
            stdout = self._process.stdout
            assert stdout is not None
            line = b""
            while not line.endswith(b"\n"):
                part = await stdout.receive_some(4096)
                assert part, f"diskd ended before it was ready: {self.log()}"
                line += part
            await stdout.aclose()
        self.ready = json.loads(line)
        assert self.ready["event"] == "ready"
        assert self.ready["pid"] == self._process.pid

    def log(self) -> str:
        return (self.root.parent / f"{self.root.name}.log").read_text()

    async def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit code."""
        with trio.fail_after(SECONDS_MAX):
            self.process.send_signal(number)
            return await self.process.wait()

    async def ctl(self, *arguments: str) -> Outcome:
        argv = [str(BINARIES / "diskctl"), "--control", self.ready["control"], *arguments]
        with trio.fail_after(SECONDS_MAX):
            done = await trio.run_process(argv, capture_stdout=True, capture_stderr=True, check=False)
        return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())

    async def do(self, *arguments: str) -> str:
        """diskctl must succeed; what it printed."""
        outcome = await self.ctl(*arguments)
        assert outcome.code == 0, f"diskctl {' '.join(arguments)}: {outcome.text}"
        return outcome.out

    async def json(self, *arguments: str) -> Any:
        return json.loads(await self.do(*arguments, "--json"))

    async def refuses(self, *arguments: str) -> str:
        """diskctl must fail with exit code 1 and one line; the line."""
        outcome = await self.ctl(*arguments)
        assert outcome.code == 1, outcome
        assert outcome.err.count("\n") == 1, outcome.err
        assert outcome.err.startswith("diskctl: ")
        return outcome.err


@contextlib.asynccontextmanager
async def diskd(root: Path, *arguments: str) -> AsyncIterator[DiskdProcess]:
    """A started diskd; it is killed at the end if it still runs."""
    shared = new_shared_dir()
    daemon = DiskdProcess(root, "--set", f"shared_dir={shared}", *arguments)
    root.mkdir(exist_ok=True)  # noqa: ASYNC240 - nothing else runs in this loop yet
    try:
        await daemon.start()
        yield daemon
    finally:
        if daemon._process is not None and daemon._process.returncode is None:
            daemon._process.kill()
            with trio.move_on_after(SECONDS_MAX, shield=True):
                await daemon._process.wait()
        shutil.rmtree(shared)

"""The ``process`` driver: a VM is any command, started detached, so that it outlives clusterd (S7).

A run is started in a session of its own, with no terminal, its output in ``vms/VM.log``, and with the
locked descriptor of ``run_lock``. It is watched through a pidfd, which cannot mean another process of the
same number; an adopted run is watched the same way. When the main process has ended, whatever it left
behind with the lock still open is killed: the run is reported ended only once the lock is free.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final, TypeVar

import attrs
import structlog
import trio

from clusterd.core.events import RunEnded, RunNotStarted, RunStarted
from clusterd.core.types import VmConfig
from clusterd.errors import Refused
from clusterd.shell.drivers.port import RunEvent, Surroundings
from clusterd.shell.drivers.run_lock import RunFiles

STOP_SECONDS_MAX: Final = 10.0
LOG_BYTES_MAX: Final = 1 << 20
_POLL_SECONDS: Final = 0.1

T = TypeVar("T")
log = structlog.get_logger("process")


@attrs.define(eq=False)
class _Run:
    files: RunFiles
    pid: int
    pidfd: int
    child: subprocess.Popen[bytes] | None
    ended: trio.Event = attrs.field(factory=trio.Event)

    def signal(self, number: signal.Signals) -> None:
        if not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)


class ProcessDriver:
    """Runs under ``data_dir``. ``report`` gets the events; watchers live in ``watchers_nursery``."""

    def __init__(
        self,
        data_dir: Path,
        surroundings: Surroundings,
        report: Callable[[RunEvent], None],
        watchers_nursery: trio.Nursery,
        *,
        stop_seconds_max: float = STOP_SECONDS_MAX,
    ) -> None:
        self._runs_dir = data_dir / "runs"
        self._logs_dir = data_dir / "vms"
        for directory in (self._runs_dir, self._logs_dir):
            directory.mkdir(parents=True, exist_ok=True)
        self._surroundings = surroundings
        self._report = report
        self._nursery = watchers_nursery
        self._stop_seconds_max = stop_seconds_max
        self._runs: dict[tuple[str, int], _Run] = {}
        self._locks: dict[tuple[str, int], trio.Lock] = {}
        self._limiter = trio.CapacityLimiter(4)

    def close(self) -> None:
        """Let go of the runs: they go on."""
        for run in self._runs.values():
            os.close(run.pidfd)
            if run.child is not None:
                # Popen would complain, rightly for most programs, that a running child is forgotten.
                run.child.returncode = 0
        self._runs.clear()

    async def start(self, config: VmConfig, epoch: int) -> None:
        async with self._exclusive(config.name, epoch) as (files, run):
            if run is not None:
                self._report(RunStarted(config.name, epoch, run.pid))
                return
            try:
                child = await trio.to_thread.run_sync(
                    self._spawn, config, epoch, files, limiter=self._limiter
                )
            except (OSError, Refused, ValueError) as error:
                self._report(RunNotStarted(config.name, epoch, _refusal(error)))
                return
            if child is not None:
                self._watch(files, child.pid, child)
                return
        await self.adopt(config, epoch)

    async def adopt(self, config: VmConfig, epoch: int) -> None:
        async with self._exclusive(config.name, epoch) as (files, run):
            if run is not None:
                self._report(RunStarted(config.name, epoch, run.pid))
                return
            while await self._in_thread(files.lives):
                pid = await self._in_thread(files.find)
                if pid is not None and self._watch(files, pid, None):
                    return
                log.warning("run.holder_not_found", vm=config.name, epoch=epoch)
                await trio.sleep(_POLL_SECONDS)
            await self._in_thread(files.remove)
            self._report(RunEnded(config.name, epoch, None, "it was gone when clusterd looked for it"))

    async def stop(self, vm: str, epoch: int, *, force: bool) -> None:
        run = self._runs.get((vm, epoch))
        if run is None:
            # Not ours (yet): if it lives, it is adopted, which says so or says that it has ended.
            await self.adopt(VmConfig(vm), epoch)
            run = self._runs.get((vm, epoch))
            if run is None:
                return
        if not force:
            run.signal(signal.SIGTERM)
            with trio.move_on_after(self._stop_seconds_max):
                await run.ended.wait()
        run.signal(signal.SIGKILL)
        await run.ended.wait()

    @contextlib.asynccontextmanager
    async def _exclusive(self, vm: str, epoch: int) -> AsyncIterator[tuple[RunFiles, _Run | None]]:
        """One start or adoption of a run at a time; yields its files and, if it is watched, itself."""
        lock = self._locks.setdefault((vm, epoch), trio.Lock())
        async with lock:
            yield RunFiles(self._runs_dir, vm, epoch), self._runs.get((vm, epoch))
        if lock.statistics().tasks_waiting == 0 and not lock.locked():
            self._locks.pop((vm, epoch), None)

    def _spawn(self, config: VmConfig, epoch: int, files: RunFiles) -> "subprocess.Popen[bytes] | None":
        """The child, or None: this very run lives already. In a thread."""
        argv = self._surroundings.argv(config, epoch)
        environment = self._surroundings.environment(config, epoch)
        lock = files.take()
        if lock is None:
            return None
        try:
            output = _open_log(self._logs_dir / f"{config.name}.log")
            try:
                child = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=environment,
                    cwd=self._logs_dir,
                    start_new_session=True,
                    pass_fds=(lock,),
                )
            finally:
                os.close(output)
        finally:
            os.close(lock)
        # From here on the run lives, whatever happens to us. The note only saves a search.
        with contextlib.suppress(OSError):
            files.write_note(child.pid)
        return child

    def _watch(self, files: RunFiles, pid: int, child: "subprocess.Popen[bytes] | None") -> bool:
        """Begin to watch; False where the process has vanished meanwhile."""
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return False
        run = _Run(files, pid, pidfd, child)
        self._runs[(files.vm, files.epoch)] = run
        self._report(RunStarted(files.vm, files.epoch, pid))
        self._nursery.start_soon(self._follow, run)
        return True

    async def _follow(self, run: _Run) -> None:
        await trio.lowlevel.wait_readable(run.pidfd)
        code = run.child.poll() if run.child is not None else None
        while await self._in_thread(run.files.lives):
            # Not at once: a process just being forked for another run holds our descriptors for an instant.
            await trio.sleep(_POLL_SECONDS)
            await self._in_thread(lambda: _kill_holders(run.files))
        await self._in_thread(run.files.remove)
        run.ended.set()
        del self._runs[(run.files.vm, run.files.epoch)]
        os.close(run.pidfd)
        self._report(RunEnded(run.files.vm, run.files.epoch, code, _describe(code)))

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(function, limiter=self._limiter)


def _kill_holders(files: RunFiles) -> None:
    if not files.lives():
        return
    for pid in files.holders():
        log.warning("run.left_behind", vm=files.vm, epoch=files.epoch, pid=pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _open_log(path: Path) -> int:
    """For appending; what an earlier run wrote is kept once, and the file starts anew when it is large."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > LOG_BYTES_MAX:
            path.replace(path.with_suffix(".log.old"))
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)


def _refusal(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    return str(error)


def _describe(code: int | None) -> str:
    if code is None:
        return "its process ended"
    if code < 0:
        try:
            return f"its process was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"its process was killed by signal {-code}"
    return f"its process exited with code {code}"

"""Runs the freeze and thaw hooks of a VM around its cut (core.hooks says which programs these may be).

    freeze    the guest quiets itself; its writes still pass
    the cut   writes are held for a moment, the layers switched
    thaw      always, if freeze was so much as tried: it may run where nothing is frozen

A hook is a process group of its own, with nothing on stdin and an environment that tells it what it is for.
One that takes longer than ``hook_timeout`` is killed with its whole group. Nothing here is cancelled
half-way: whoever asked for the backup may go, but the guest is thawed first. A diskd that was killed
meanwhile thaws at its next start, since the checkpoint's record tells that it was being made.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import attrs
import structlog
import trio

from daemonkit.hooks import HookName, Hooks
from daemonkit.units import SECOND, format_duration
from diskd.core.hooks import APPLICATION, CRASH, Consistency, FileFacts, check_program, program_path
from diskd.errors import Refused

log = structlog.get_logger()

# What a hook says is told to the operator, up to here.
_SAID_BYTES_MAX: Final = 300
# A guest that stays frozen is the worst that can come of a backup.
_THAW_TRIES: Final = 3
# For what killing a group and starting a process take.
_GRACE_SECONDS: Final = 5.0
_LAST_WORDS_SECONDS: Final = 0.1


@attrs.frozen
class HookSettings:
    """``directory``: of the programs that may be run; None: none may."""

    directory: str | None = None
    timeout_ns: int = 10 * SECOND


@attrs.define
class Quiesced:
    """What became of the hooks. ``failure`` is one line."""

    consistency: Consistency = CRASH
    failure: str | None = None
    may_be_frozen: bool = False


class HookRunner:
    """Of one VM, for one cut. ``hooks`` is None where its file has none."""

    def __init__(self, settings: HookSettings, hooks: Hooks | None, vm: str, checkpoint: str) -> None:
        self._settings = settings
        self._hooks = hooks
        self._vm = vm
        self._checkpoint = checkpoint

    @contextlib.asynccontextmanager
    async def quiesced(self, *, allow_crash_consistent: bool) -> AsyncIterator[Quiesced]:
        """The guest is frozen within the ``async with``, and thawed whatever happens there. Raises Refused
        where that fails, unless allowed; ``consistency`` is final afterwards."""
        state = Quiesced()
        if self._hooks is None:
            yield state
            return
        try:
            await self._freeze(state)
            if state.failure is not None and not allow_crash_consistent:
                raise Refused(state.failure)
            yield state
        finally:
            if state.may_be_frozen:
                with trio.move_on_after(self._thaw_seconds, shield=True):
                    await self._thaw(state)
        if state.failure is not None:
            if not allow_crash_consistent:
                raise Refused(state.failure)
            state.consistency = CRASH
            log.warning("hook.crash_consistent", vm=self._vm, reason=state.failure)

    async def _freeze(self, state: Quiesced) -> None:
        # Whether the guest can be thawed is looked at before it is frozen.
        for name in ("freeze", "thaw"):
            state.failure = state.failure or await self._refusal(name)
        if state.failure is not None:
            return
        state.may_be_frozen = True
        state.failure = await self._run("freeze")
        if state.failure is None:
            state.consistency = APPLICATION
        else:
            with trio.move_on_after(self._thaw_seconds, shield=True):
                await self._thaw(state)

    async def thaw_after_crash(self) -> None:
        """Of a cut that an earlier process began: it may have died while the guest was frozen."""
        if self._hooks is not None and await self._refusal("thaw") is None:
            with trio.move_on_after(self._thaw_seconds, shield=True):
                await self._thaw(Quiesced())

    @property
    def _thaw_seconds(self) -> float:
        """A bound on all tries."""
        return _THAW_TRIES * (self._settings.timeout_ns / SECOND + _GRACE_SECONDS)

    async def _thaw(self, state: Quiesced) -> None:
        failure: str | None = None
        for _ in range(_THAW_TRIES):
            failure = await self._run("thaw")
            if failure is None:
                state.may_be_frozen = False
                return
        state.failure = state.failure or failure
        log.error("hook.thaw_failed", vm=self._vm, reason=state.failure)

    async def _refusal(self, name: HookName) -> str | None:
        """Why this hook may not be run at all, or None."""
        assert self._hooks is not None
        try:
            program = program_path(self._settings.directory, self._hooks.words(name)[0])
            await trio.to_thread.run_sync(_check, program)
        except (OSError, Refused) as error:
            return f"the {name} hook of {self._vm}: {error}"
        return None

    async def _run(self, name: HookName) -> str | None:
        """Why it failed, or None. It is not left running."""
        assert self._hooks is not None
        words = self._hooks.words(name)
        failure: str | None = None
        try:
            program = program_path(self._settings.directory, words[0])
            with trio.CancelScope(shield=True):
                failure = await self._watched(name, [program, *words[1:]], self._settings.timeout_ns)
        except (OSError, Refused) as error:
            failure = f"the {name} hook of {self._vm}: {error}"
        return failure

    async def _watched(self, name: HookName, argv: list[str], limit_ns: int) -> str | None:
        environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOLDFAST_HOOK": name,
            "HOLDFAST_VM": self._vm,
            "HOLDFAST_CHECKPOINT": self._checkpoint,
        }
        process = await trio.lowlevel.open_process(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
        said, silent = bytearray(), trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_listen, process, said, silent)
            with trio.move_on_after(limit_ns / SECOND) as in_time:
                await process.wait()
            if in_time.cancelled_caught:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
            with trio.move_on_after(_LAST_WORDS_SECONDS):  # a child of it may hold the pipe open
                await silent.wait()
            nursery.cancel_scope.cancel(reason="the hook has ended")
        if process.stdout is not None:
            await process.stdout.aclose()
        text = " ".join(said[:_SAID_BYTES_MAX].decode(errors="replace").split())
        what = f"the {name} hook of {self._vm}"
        if in_time.cancelled_caught:
            return f"{what} took longer than {format_duration(limit_ns)} and was killed"
        if process.returncode:
            return f"{what} failed ({process.returncode}){': ' if text else ''}{text}"
        log.info("hook.done", hook=name, vm=self._vm)
        return None


async def _listen(process: trio.Process, said: bytearray, silent: trio.Event) -> None:
    """Keep the beginning, and let it say the rest."""
    assert process.stdout is not None
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        async for part in process.stdout:
            said += part[: max(0, _SAID_BYTES_MAX - len(said))]
    silent.set()


def _check(path: str) -> None:
    program, directory = os.stat(path), os.stat(Path(path).parent)
    facts = [FileFacts(found.st_mode, found.st_uid) for found in (program, directory)]
    check_program(path, facts[0], facts[1], os.geteuid())

"""Runs the merge of one overlay (core.merge has the steps, core.merge_pace how fast), the guest going on.

Batch after batch, each of them followed by a rest that leaves the guest its time. The AVHD's space is given
back batch by batch only where the file system is short of it: a punch changes the file's metadata, so that
every sync of anybody waits for the journal, and all of it goes with the file at the end (ADR 0040).
"""

import contextlib
import os
import time
from typing import Final, Protocol

import structlog
import trio

from daemonkit.errors import words_of
from daemonkit.units import SECOND
from diskd.core import avhd
from diskd.core.avhd import AvhdMap, Run, SyncFailed
from diskd.core.merge import Merge, punch
from diskd.core.merge_pace import Pace, is_late
from diskd.core.steps import Script, Step, Sync, before_steps
from diskd.shell.files import Files
from diskd.shell.overlay_settings import OverlaySettings, Parent

# A parent that has no space for a batch is asked again after this long; the AVHD keeps the data meanwhile.
_RETRY_SECONDS: Final = 1.0
# Ranges remembered for later; what is beyond keeps its space until the AVHD is removed.
_OWED_MAX: Final = 1 << 16
_PUNCH_RANGES: Final = 16  # one thread hop's worth: a guest's write to the AVHD goes by thread meanwhile

log = structlog.get_logger()


class Merged(Protocol):
    """What a merge needs of its overlay."""

    map: AvhdMap
    parent: Parent
    files: Files
    settings: OverlaySettings
    map_turn: trio.Lock
    busy: dict[object, range]
    calls: int
    slow: int
    changed: trio.Event

    def notify(self) -> None: ...
    async def run_final(self, script: Script[None]) -> None: ...
    def noted(self, script: Script[None]) -> Script[None]: ...
    async def reads_ended(self) -> None: ...


class Merging:
    """``run`` returns when every entry is gone (B6). Raises SyncFailed."""

    def __init__(self, layer: Merged, merge: Merge) -> None:
        self._layer = layer
        self._merge = merge
        self._pace = Pace(layer.settings.merge_rate, merge.blocks_max)
        self._calls = -1
        self._copied_ns = 0
        self._owed: list[tuple[int, int]] = []  # merged, and not punched yet
        self._put_off: str | None = None  # why nothing can be merged at the moment
        self._began_ns = self._total = 0

    async def run(self) -> None:
        layer, merge = self._layer, self._merge
        self._began_ns, self._total = time.monotonic_ns(), merge.map.entries
        try:
            while not merge.is_done:
                merge.blocks_max = self._pace.blocks
                runs = merge.start_batch(block for blocks in layer.busy.values() for block in blocks)
                if not runs:
                    merge.claim()
                    await layer.changed.wait()
                    continue
                try:
                    await self._one(runs)
                    self._put_off = None
                except SyncFailed:
                    raise
                except OSError as error:
                    self._say_put_off(words_of(error))
                    # Most likely there is no space for the copy: what has been merged holds some.
                    await self._punch()
                    await trio.sleep(_RETRY_SECONDS)
        finally:
            merge.unclaim()
            layer.notify()

    def _say_put_off(self, reason: str) -> None:
        """Once for as long as it lasts: it is tried again every second."""
        if reason != self._put_off:
            log.warning("merge.put_off", image=self._layer.files.directory.name, reason=reason)
        self._put_off = reason

    async def _one(self, runs: list[Run]) -> None:
        """A batch, and the rest after it."""
        moved = (
            sum(count for _, count, state in runs if state == avhd.DATA) * self._layer.map.head.block_bytes
        )
        began = self._copied_ns = time.monotonic_ns()
        self._owe(await self._batch(runs))
        is_tight = await self._is_tight()
        if is_tight:
            await self._punch()
        copy_ns, sync_ns = self._copied_ns - began, time.monotonic_ns() - self._copied_ns
        guest_works = self._layer.calls != self._calls
        self._calls = self._layer.calls
        rest = self._pace.batch_done(
            moved,
            copy_ns,
            sync_ns,
            guest_works=guest_works,
            is_tight=is_tight,
            is_late=is_late(time.monotonic_ns() - self._began_ns, self._merge.map.entries, self._total),
        )
        if rest > 0:
            await trio.sleep(rest / SECOND)

    async def _batch(self, runs: list[Run]) -> list[tuple[int, int]]:
        """Returns what can be punched."""
        layer, merge = self._layer, self._merge
        has_zeroes = any(state == avhd.ZERO for _, _, state in runs)
        try:
            with layer.parent.by_thread() if has_zeroes else contextlib.nullcontext():
                await layer.run_final(layer.noted(before_steps(merge.copy(runs), self._note_copied)))
            async with layer.map_turn:
                blocks = merge.submit_clear()
                await layer.run_final(merge.clear(blocks))
                return merge.forget()
        finally:
            merge.abandon_batch()
            layer.notify()

    def _note_copied(self, step: Step) -> None:
        """In the thread that copies: the sync begins."""
        if isinstance(step, Sync):
            self._copied_ns = time.monotonic_ns()

    async def _is_tight(self) -> bool:
        """Whether the file system could run out of space before the AVHD is gone: in the worst case the
        parent needs as much again as the AVHD holds."""
        need = self._layer.map.data_blocks * self._layer.map.head.block_bytes
        free, spare = await trio.to_thread.run_sync(self._space)
        return free < need + spare

    def _space(self) -> tuple[int, int]:
        """Free bytes, and how many of them are to be left alone."""
        found = os.statvfs(self._layer.files.directory)
        limit = self._layer.settings.low_disk_limit
        return found.f_bavail * found.f_frsize, 0 if limit is None else limit.of(
            found.f_blocks * found.f_frsize
        )

    def _owe(self, ranges: list[tuple[int, int]]) -> None:
        for offset, length in ranges:
            if self._owed and sum(self._owed[-1]) == offset:
                self._owed[-1] = (self._owed[-1][0], self._owed[-1][1] + length)
            elif len(self._owed) < _OWED_MAX:
                self._owed.append((offset, length))

    async def _punch(self) -> None:
        """Nobody reads these any more, nor will anybody write them: merged blocks stay the parent's."""
        layer = self._layer
        await layer.reads_ended()
        ranges, self._owed = self._owed, []
        layer.slow += 1
        try:
            for start in range(0, len(ranges), _PUNCH_RANGES):
                # A file system that cannot punch keeps the space until the AVHD is removed.
                with contextlib.suppress(OSError):
                    await layer.files.run(punch(ranges[start : start + _PUNCH_RANGES]))
        finally:
            layer.slow -= 1

"""The overlay: an AVHD over the frozen parent, as a layer of an open image (core.overlay has the plan).

Small writes to whole or known blocks, and cached reads, are done in place; everything else is a script in a
worker thread. While a call has blocks of the AVHD in work nobody else touches them (``_busy``), so that two
copy-ups cannot lose a write and no batch of the merge takes a block that is still being written.

A write that the AVHD cannot take (B2): ``on_failure`` first invalidates the whole checkpoint, durably, and
turns every overlay of it to merging; then the write is planned anew, and mostly goes to the parent. Where
the block's entry stands, the whole block is put into the parent durably and its entry cleared (``evict``).
"""

import contextlib
import errno
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final, Protocol, TypeVar

import attrs
import trio

from diskd.core import avhd, overlay
from diskd.core.avhd import DATA, PARENT, ZERO, AvhdMap, Head, SyncFailed
from diskd.core.merge import Merge, punch
from diskd.core.overlay import Mode, Piece
from diskd.core.ports import Allocation, Layer
from diskd.core.steps import Script, Step, before_steps
from diskd.shell.files import Files
from diskd.shell.live_map import LiveMap

T = TypeVar("T")

# In place: what one connection may do without giving the others a turn.
_IN_PLACE_BYTES_MAX: Final = 256 << 10
_ALLOCATIONS_MAX: Final = 4096
# A parent that has no space for a batch is asked again after this long; the AVHD keeps the data meanwhile.
_RETRY_SECONDS: Final = 1.0
_PUNCH_RANGES: Final = 64  # one thread hop's worth: large punches hold up other I/O to the file


class Parent(Layer, Protocol):
    """The frozen layer: the raw file."""

    def note_change(self) -> None: ...


@attrs.frozen
class OverlaySettings:
    """``avhd_limit_bytes``: how much one AVHD may hold; None is as much as the file system gives."""

    merge_batch_bytes: int
    avhd_limit_bytes: int | None


class OverlayLayer:
    """ports.Layer over one image's AVHD and its parent. Closed by ``close`` or ``dispose``."""

    def __init__(
        self,
        directory: Path,
        state_map: AvhdMap,
        live: LiveMap,
        parent: Parent,
        files: Files,
        settings: OverlaySettings,
        *,
        on_failure: Callable[[str], Awaitable[None]],
        fail: Callable[[str], None],
    ) -> None:
        self.map = state_map
        self.merge: Merge | None = None  # None while the checkpoint stands (Mode.FORKED)
        self.parent = parent
        self._directory = directory
        self._live = live
        self._files = files
        self._settings = settings
        self._on_failure = on_failure
        self._fail = fail
        self._failure: str | None = None
        self._descriptor = os.open(directory / avhd.DATA_FILE, os.O_RDWR | os.O_CLOEXEC)
        self._disposed = False
        self._no_wait_flag = os.RWF_NOWAIT
        # Until the parent's first sync after the cut it may hold writes that a guest's FLUSH speaks of.
        self.parent_is_synced = False
        self._map_lock = trio.Lock()  # one writer of the map's file at a time
        self._busy: dict[object, range] = {}
        self._reads: set[object] = set()
        self._changed = trio.Event()

    @property
    def mode(self) -> Mode:
        return Mode.FORKED if self.merge is None else Mode.MERGING

    @property
    def head(self) -> Head:
        return self.map.head

    # --- reading ---------------------------------------------------------------------------------------

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        if self._disposed:
            return self.parent.read_nowait(offset, length)
        if length > _IN_PLACE_BYTES_MAX:
            return None
        self._check()
        size = self.head.block_bytes
        parts: list[bytes] = []
        for start, count, state in self.map.runs(*overlay.block_span(self.map, offset, length)):
            low, high = max(offset, start * size), min(offset + length, (start + count) * size)
            part: bytes | None
            if state == ZERO:
                part = bytes(high - low)
            elif state == DATA:
                part = self._read_avhd_nowait(low, high - low)
            else:
                part = self.parent.read_nowait(low, high - low)
            if part is None:
                return None
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_avhd_nowait(self, offset: int, length: int) -> bytes | None:
        buffer = bytearray(length)
        try:
            done = os.preadv(self._descriptor, [buffer], offset, self._no_wait_flag)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP or not self._no_wait_flag:
                raise
            self._no_wait_flag = 0  # tmpfs has no such flag, and never waits
            return self._read_avhd_nowait(offset, length)
        return bytes(buffer) if done == length else None

    async def read(self, offset: int, length: int) -> bytes:
        if self._disposed:
            return await self.parent.read(offset, length)
        self._check()
        runs = self.map.runs(*overlay.block_span(self.map, offset, length))
        token = object()
        self._reads.add(token)
        try:
            return await self._files.run(overlay.read(self.head.block_bytes, runs, offset, length))
        finally:
            self._reads.discard(token)
            self._notify()

    async def allocation(self, offset: int, length: int) -> list[Allocation]:
        found: list[Allocation] = []
        size = self.head.block_bytes
        if self._disposed:
            return await self.parent.allocation(offset, length)
        for start, count, state in self.map.runs(*overlay.block_span(self.map, offset, length)):
            low, high = max(offset, start * size), min(offset + length, (start + count) * size)
            if state == PARENT:
                for part in await self.parent.allocation(low, high - low):
                    _join(found, part)
                if found[-1].offset + found[-1].length < high:
                    break
            else:
                _join(found, Allocation(low, high - low, "data" if state == DATA else "zero"))
            if len(found) >= _ALLOCATIONS_MAX:
                break
        end = found[-1].offset + found[-1].length
        if end < offset + length:
            # The answer covers exactly the range: what was not looked at may be data.
            _join(found, Allocation(end, offset + length - end, "data"))
        return found

    # --- writing ---------------------------------------------------------------------------------------

    def write_nowait(self, offset: int, data: bytes | memoryview) -> bool:
        length = len(data)
        if self._disposed:
            return self.parent.write_nowait(offset, data)
        if length > _IN_PLACE_BYTES_MAX:
            return False
        self._check()
        if self._is_busy(overlay.block_span(self.map, offset, length)):
            return False
        pieces = overlay.plan_write(self.map, self.merge, offset, length)
        if pieces is None:
            return False
        kinds = {piece.kind for piece in pieces}
        if kinds == {"parent"}:
            return self.parent.write_nowait(offset, data)
        if kinds != {"avhd"} or not self._has_room(pieces):
            return False
        try:
            if os.pwrite(self._descriptor, data, offset) != length:
                return False
        except OSError:
            return False  # the other form meets it again, and deals with it
        overlay.commit(self.map, pieces)
        return True

    async def write(self, offset: int, data: bytes | memoryview) -> None:
        while not await self._try_write(offset, data):
            await trio.lowlevel.checkpoint()

    async def _try_write(self, offset: int, data: bytes | memoryview) -> bool:
        """False: the checkpoint was invalidated (B2), plan again."""
        pieces = await self._when_free(
            offset, len(data), lambda: overlay.plan_write(self.map, self.merge, offset, len(data))
        )
        planned = self.merge
        if self._disposed or pieces is None:
            await self.parent.write(offset, data)
            return True
        with self._keeping(offset, len(data)):
            try:
                if not self._has_room(pieces):
                    raise OSError(errno.ENOSPC, "the AVHD is at its limit")
                if any(piece.kind != "parent" for piece in pieces):
                    await self._files.run(overlay.write_avhd(self.map, pieces, offset, data))
            except OSError as error:
                if planned is not None:
                    await self._evict(planned, pieces, offset, data)
                    await self._write_parent(pieces, offset, data)
                    return True
                if self.merge is not None:
                    return False  # somebody else's write came first: no entry was made, plan anew
                reason = error.strerror or str(error)
            else:
                overlay.commit(self.map, pieces)
                await self._write_parent(pieces, offset, data)
                return True
        await self._on_failure(f"{self._directory.name}: the AVHD cannot take a write: {reason}")
        return False

    async def _write_parent(self, pieces: list[Piece], offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for piece in pieces:
            if piece.kind == "parent":
                start = piece.offset - offset
                await self.parent.write(piece.offset, view[start : start + piece.length])

    async def _evict(self, merge: Merge, pieces: list[Piece], offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for piece in overlay.by_block(self.map, pieces):
            block = piece.offset // self.head.block_bytes
            while block in merge.copying or block in merge.clearing:
                await self._changed.wait()
            part = bytes(view[piece.offset - offset : piece.offset - offset + piece.length])
            async with self._map_lock:
                await self._finally(self._noted(overlay.evict(self.map, merge, piece, part)))
                self.map.set_range(block, 1, PARENT)

    async def write_zeroes(self, offset: int, length: int, *, may_trim: bool) -> None:
        plan = await self._when_free(
            offset, length, lambda: overlay.plan_zeroes(self.map, self.merge, offset, length)
        )
        if self._disposed or plan is None:
            await self.parent.write_zeroes(offset, length, may_trim=may_trim)
            return
        overlay.commit_zeroes(self.map, plan)
        for start, count in plan.parent:
            await self.parent.write_zeroes(start, count, may_trim=may_trim)
        for start, count in plan.edges:
            await self.write(start, bytes(count))

    def _has_room(self, pieces: list[Piece]) -> bool:
        limit = self._settings.avhd_limit_bytes
        if limit is None or self.merge is not None:
            return True
        blocks = self.map.data_blocks + overlay.new_data_blocks(self.map, pieces)
        return blocks * self.head.block_bytes <= limit

    # --- durability ------------------------------------------------------------------------------------

    async def flush(self) -> None:
        """AVHD data, then its map, then the parent wherever it holds unsynced writes."""
        async with self._map_lock:
            if not self._disposed:
                self._check()
                sectors = self.map.take_dirty()
                try:
                    await self._finally(avhd.flush(sectors, parent=False))
                except BaseException:  # cancelled too: what was not written must be written by the next one
                    self.map.dirty.update(index for index, _ in sectors)
                    raise
        if self._disposed or self.merge is not None or not self.parent_is_synced:
            await self.parent.flush()

    async def _finally(self, script: Script[T]) -> T:
        """Run a script whose failed sync is the end of this image until it is reopened."""
        try:
            return await self._files.run(script)
        except SyncFailed as error:
            self._failure = error.strerror or str(error)
            self._fail(self._failure)
            raise

    def _noted(self, script: Script[T]) -> Script[T]:
        """The script, which writes to the parent's file past its layer; each time it does is noted, since
        its disk may be slow."""
        return before_steps(script, self._note_step)

    def _note_step(self, step: Step) -> None:
        if step.file == avhd.PARENT_FILE:
            self.parent.note_change()

    def _check(self) -> None:
        if self._failure is not None:
            raise OSError(errno.EIO, self._failure)

    # --- merging ---------------------------------------------------------------------------------------

    def start_merging(self) -> None:
        """The frozen view has ended (durably): blocks without an entry are the parent's from here on."""
        if self.merge is None:
            blocks = max(1, self._settings.merge_batch_bytes // self.head.block_bytes)
            self.merge = Merge(self.map, blocks)
            self._notify()

    async def run_merge(self) -> None:
        """Return when every entry is gone (B6). Raises SyncFailed.

        A write planned before merging began may still add one: whoever ends the overlay holds the image's
        writes, looks again, and calls this once more where needed.
        """
        self.start_merging()
        merge = self.merge
        assert merge is not None
        await self.flush()
        try:
            while not merge.is_done:
                runs = merge.start_batch(block for blocks in self._busy.values() for block in blocks)
                if not runs:
                    merge.claim()
                    await self._changed.wait()
                    continue
                try:
                    await self._merge_batch(merge, runs)
                except SyncFailed:
                    raise
                except OSError:
                    await trio.sleep(_RETRY_SECONDS)
        finally:
            merge.unclaim()
            self._notify()

    async def _merge_batch(self, merge: Merge, runs: list[avhd.Run]) -> None:
        try:
            await self._finally(self._noted(merge.copy(runs)))
            async with self._map_lock:
                blocks = merge.submit_clear()
                await self._finally(merge.clear(blocks))
                ranges = merge.forget()
        finally:
            merge.abandon_batch()
            self._notify()
        await self._reads_ended()
        for start in range(0, len(ranges), _PUNCH_RANGES):
            # A file system that cannot punch keeps the space until the AVHD is removed.
            with contextlib.suppress(OSError):
                await self._files.run(punch(ranges[start : start + _PUNCH_RANGES]))

    async def _reads_ended(self) -> None:
        """Return when no read is under way that was submitted before now."""
        earlier = set(self._reads)
        while earlier & self._reads:
            await self._changed.wait()

    # --- ending ----------------------------------------------------------------------------------------

    async def dispose(self) -> None:
        """The image's layer is the parent again: forget the AVHD. Late calls go to the parent."""
        async with self._map_lock:
            self._disposed = True
            self._notify()
            await self._reads_ended()
            await self._files.run(avhd.remove())
            self._let_go()
            self._live.close()
        with contextlib.suppress(OSError):
            os.rmdir(self._directory / avhd.DIRECTORY)

    async def close(self) -> None:
        """A clean stop while the AVHD stands: everything durable, so that the mapped copy is not needed."""
        if self._disposed:
            return
        is_clean = self._failure is None
        try:
            await self.flush()
        except OSError:
            is_clean = False  # said by ``fail`` already; the next opening believes the mapped copy
        self._let_go()
        if is_clean:
            self._live.close()
        else:
            self._live.abandon()

    def abandon(self) -> None:
        """Let go of descriptors and memory without a word to the disk, as a killed process does."""
        if not self._disposed:
            self._let_go()
            self._live.abandon()

    def _let_go(self) -> None:
        self._disposed = True
        os.close(self._descriptor)
        self.map.cells = self.map.cells[:0].copy()

    # --- blocks in work --------------------------------------------------------------------------------

    async def _when_free(self, offset: int, length: int, plan: Callable[[], T | None]) -> T | None:
        """``plan()`` once its blocks are nobody else's, with no wait after it. None: disposed meanwhile."""
        while not self._disposed:
            self._check()
            if not self._is_busy(overlay.block_span(self.map, offset, length)):
                made = plan()
                if made is not None:
                    return made
            await self._changed.wait()
        return None

    @contextlib.contextmanager
    def _keeping(self, offset: int, length: int) -> Iterator[None]:
        first, count = overlay.block_span(self.map, offset, length)
        token = object()
        self._busy[token] = range(first, first + count)
        try:
            yield
        finally:
            del self._busy[token]
            self._notify()

    def _is_busy(self, span: tuple[int, int]) -> bool:
        first, end = span[0], span[0] + span[1]
        return any(blocks.start < end and first < blocks.stop for blocks in self._busy.values())

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def _join(found: list[Allocation], part: Allocation) -> None:
    if found and found[-1].kind == part.kind and found[-1].offset + found[-1].length == part.offset:
        found[-1] = attrs.evolve(found[-1], length=found[-1].length + part.length)
    else:
        found.append(part)

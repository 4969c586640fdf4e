"""The overlay: an AVHD over the frozen parent, as a layer of an open image (core.overlay has the plan).

Cached reads and small writes are done in place, copy-ups included where the parent's block is cached;
everything else is a script in a worker thread. While such a call has blocks of the AVHD in work nobody else
touches them (``busy``), so that two copy-ups cannot lose a write and no batch of the merge takes a block that
is still being written. What is done in place is whole before anybody else runs.

A write that the AVHD cannot take (B2): ``on_failure`` first invalidates the whole checkpoint, durably, and
turns every overlay of it to merging; then the write is planned anew, and mostly goes to the parent. Where
the block's entry stands, the whole block is put into the parent durably and its entry cleared (``evict``).
"""

import contextlib
import errno
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

import attrs
import trio

from diskd.core import avhd, overlay
from diskd.core.avhd import DATA, PARENT, ZERO, AvhdMap, Head, SyncFailed
from diskd.core.merge import Merge
from diskd.core.overlay import Mode, Piece
from diskd.core.ports import Allocation
from diskd.core.steps import Script, Step, before_steps
from diskd.shell.files import WRITE_PIECE_BYTES, Files, write_data, zeroes
from diskd.shell.live_map import LiveMap
from diskd.shell.merging import Merging
from diskd.shell.overlay_settings import OverlaySettings, Parent

T = TypeVar("T")

# In place: what one connection may do without giving the others a turn.
_IN_PLACE_BYTES_MAX: Final = 1 << 20
_ALLOCATIONS_MAX: Final = 4096


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
        self.files = files
        self.settings = settings
        self._directory = directory
        self._live = live
        self._on_failure = on_failure
        self._fail = fail
        self._failure: str | None = None
        self._descriptor = os.open(directory / avhd.DATA_FILE, os.O_RDWR | os.O_CLOEXEC)
        self._disposed = False
        self._no_wait_flag = os.RWF_NOWAIT
        # Until the parent's first sync after the cut it may hold writes that a guest's FLUSH speaks of.
        self.parent_is_synced = False
        # Whether the AVHD got anything since a flush last began; a recovered one may have.
        self._is_written = True
        self.map_turn = trio.Lock()  # one writer of the map's file at a time
        self.busy: dict[object, range] = {}
        self.calls = 0  # how often the guest has asked for something: a merge makes way for it
        self.slow = 0  # while the AVHD is punched nothing is done in place: it would wait for that
        self._reads: set[object] = set()
        self.changed = trio.Event()

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
        buffer = bytearray(length)
        return bytes(buffer) if self.read_into_nowait(offset, buffer) else None

    def read_into_nowait(self, offset: int, buffer: bytearray | memoryview) -> bool:
        length = len(buffer)
        if self._disposed:
            return self.parent.read_into_nowait(offset, buffer)
        if length > _IN_PLACE_BYTES_MAX or self.slow:
            return False
        self._check()
        self.calls += 1
        first, count = overlay.block_span(self.map, offset, length)
        state = self.map.uniform(first, count)
        if state is not None:
            return self._fill(state, offset, buffer)
        size = self.head.block_bytes
        view = memoryview(buffer)
        for start, blocks, state_of_run in self.map.runs(first, count):
            low, high = max(offset, start * size), min(offset + length, (start + blocks) * size)
            if not self._fill(state_of_run, low, view[low - offset : high - offset]):
                return False
        return True

    def _fill(self, state: int, offset: int, buffer: bytearray | memoryview) -> bool:
        """A part that lies in blocks of one state."""
        if state == PARENT:
            return self.parent.read_into_nowait(offset, buffer)
        if state == ZERO:
            buffer[:] = bytes(len(buffer))
            return True
        try:
            return os.preadv(self._descriptor, (buffer,), offset, self._no_wait_flag) == len(buffer)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP or not self._no_wait_flag:
                raise
            self._no_wait_flag = 0  # tmpfs has no such flag, and never waits
            return self._fill(state, offset, buffer)

    async def read(self, offset: int, length: int) -> bytes:
        if self._disposed:
            return await self.parent.read(offset, length)
        self._check()
        self.calls += 1
        runs = self.map.runs(*overlay.block_span(self.map, offset, length))
        token = object()
        self._reads.add(token)
        try:
            return await self.files.run(overlay.read(self.head.block_bytes, runs, offset, length))
        finally:
            self._reads.discard(token)
            self.notify()

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
        return found

    # --- writing ---------------------------------------------------------------------------------------

    def write_nowait(self, offset: int, data: bytes | memoryview) -> bool:
        if self._disposed:
            return self.parent.write_nowait(offset, data)
        length = len(data)
        if length > _IN_PLACE_BYTES_MAX or self._failure is not None:
            return False  # the other form says why
        self.calls += 1
        if self.busy and self._is_busy(overlay.block_span(self.map, offset, length)):
            return False
        where = overlay.quick(self.map, self.merge, offset, length)
        if where == "parent":
            return self.parent.write_nowait(offset, data)
        if self.slow:
            return False
        if where is None:
            return self._write_pieces_nowait(offset, data)
        first, count = overlay.block_span(self.map, offset, length)
        is_new = self.map.uniform(first, count) != DATA
        if is_new and not self._has_room(count):
            return False
        try:
            if length > WRITE_PIECE_BYTES:
                write_data(self._descriptor, data, offset)
            elif os.pwrite(self._descriptor, data, offset) != length:
                return False
        except OSError:
            return False  # the other form meets it again, and deals with it
        self._is_written = True
        if is_new:
            self.map.set_range(first, count, DATA)
        return True

    def _write_pieces_nowait(self, offset: int, data: bytes | memoryview) -> bool:
        """Blocks of several states, or with a copy-up: in place where the parent's part is at hand."""
        pieces = overlay.plan_write(self.map, self.merge, offset, len(data))
        if pieces is None or any(piece.kind == "parent" for piece in pieces):
            return False
        if not self._has_room(overlay.new_data_blocks(self.map, pieces)):
            return False
        around: dict[int, bytes] = {}
        for piece in pieces:
            if piece.kind == "copy_up" and piece.base == PARENT:
                start, length = overlay.block_range(self.map, piece)
                block = self.parent.read_nowait(start, length)
                if block is None:
                    return False
                around[start] = block
        try:
            for start, part in overlay.assemble(self.map, pieces, offset, data, around):
                if os.pwrite(self._descriptor, part, start) != len(part):
                    return False
        except OSError:
            return (
                False  # what was written means nothing where there is no entry, and is the guest's elsewhere
            )
        self._is_written = True
        overlay.commit(self.map, pieces)
        return True

    async def write(self, offset: int, data: bytes | memoryview) -> None:
        while not await self._try_write(offset, data):
            await trio.lowlevel.checkpoint()

    async def _try_write(self, offset: int, data: bytes | memoryview) -> bool:
        """False: the checkpoint was invalidated (B2), plan again."""
        self.calls += 1
        pieces = await self._when_free(
            offset, len(data), lambda: overlay.plan_write(self.map, self.merge, offset, len(data))
        )
        planned = self.merge
        if self._disposed or pieces is None:
            await self.parent.write(offset, data)
            return True
        with self._keeping(offset, len(data)):
            try:
                if planned is None and not self._has_room(overlay.new_data_blocks(self.map, pieces)):
                    raise OSError(errno.ENOSPC, "the AVHD is at its limit")
                if any(piece.kind != "parent" for piece in pieces):
                    await self.files.run(overlay.write_avhd(self.map, pieces, offset, data))
            except OSError as error:
                if planned is not None:
                    await self._evict(planned, pieces, offset, data)
                    await self._write_parent(pieces, offset, data)
                    return True
                if self.merge is not None:
                    return False  # somebody else's write came first: no entry was made, plan anew
                reason = error.strerror or str(error)
            else:
                self._is_written = True
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
                await self.changed.wait()
            part = bytes(view[piece.offset - offset : piece.offset - offset + piece.length])
            async with self.map_turn:
                await self.run_final(self.noted(overlay.evict(self.map, merge, piece, part)))
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
            await self.write(start, zeroes(count))

    def _has_room(self, new_blocks: int) -> bool:
        limit = self.settings.avhd_limit_bytes
        if limit is None or self.merge is not None:
            return True
        return (self.map.data_blocks + new_blocks) * self.head.block_bytes <= limit

    # --- durability ------------------------------------------------------------------------------------

    async def flush(self) -> None:
        """AVHD data, then its map, then the parent wherever it holds unsynced writes."""
        async with self.map_turn:
            if not self._disposed:
                self._check()
                await self._flush_avhd()
        if self._disposed or self.merge is not None or not self.parent_is_synced:
            await self.parent.flush()

    async def _flush_avhd(self) -> None:
        if not self._is_written and not self.map.dirty:
            return
        sectors = self.map.take_dirty()
        self._is_written = False  # what is written from here on may be missed by the sync
        try:
            await self.run_final(avhd.flush(sectors, parent=False))
        except BaseException:  # cancelled too: what was not written must be written by the next one
            self._is_written = True
            self.map.dirty.update(index for index, _ in sectors)
            raise

    async def run_final(self, script: Script[T]) -> T:
        """Run a script whose failed sync is the end of this image until it is reopened."""
        try:
            return await self.files.run(script)
        except SyncFailed as error:
            self._failure = error.strerror or str(error)
            self._fail(self._failure)
            raise

    def noted(self, script: Script[T]) -> Script[T]:
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
            blocks = max(1, self.settings.merge_batch_bytes // self.head.block_bytes)
            self.merge = Merge(self.map, blocks)
            self.notify()

    async def run_merge(self) -> None:
        """Return when every entry is gone (B6). Raises SyncFailed.

        A write planned before merging began may still add one: whoever ends the overlay holds the image's
        writes, looks again, and calls this once more where needed.
        """
        self.start_merging()
        assert self.merge is not None
        await Merging(self, self.merge).run()

    async def reads_ended(self) -> None:
        """Return when no read is under way that was submitted before now."""
        earlier = set(self._reads)
        while earlier & self._reads:
            await self.changed.wait()

    # --- ending ----------------------------------------------------------------------------------------

    async def dispose(self) -> None:
        """The image's layer is the parent again: forget the AVHD. Late calls go to the parent."""
        async with self.map_turn:
            self._disposed = True
            self.notify()
            await self.reads_ended()
        descriptor, self._descriptor = self._descriptor, -1
        try:
            await self.files.run(avhd.remove())
            # Before the space is given back: after that it would wait for it, and whoever looks into the
            # directory with it. By thread, for the same reason: the loop was held up for 10 s.
            with contextlib.suppress(OSError):
                await trio.to_thread.run_sync(os.rmdir, self._directory / avhd.DIRECTORY)
        finally:
            self._let_go()
            # Whoever lets go of a removed file last gives its space back: 20 s were seen for 16,000 extents.
            # Nobody has to wait for that, least of all the next checkpoint.
            trio.lowlevel.start_thread_soon(lambda: os.close(descriptor), lambda _outcome: None)
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._live.close)

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
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self.map.release()

    # --- blocks in work --------------------------------------------------------------------------------

    async def _when_free(self, offset: int, length: int, plan: Callable[[], T | None]) -> T | None:
        """``plan()`` once its blocks are nobody else's, with no wait after it. None: disposed meanwhile."""
        while not self._disposed:
            self._check()
            if not self._is_busy(overlay.block_span(self.map, offset, length)):
                made = plan()
                if made is not None:
                    return made
            await self.changed.wait()
        return None

    @contextlib.contextmanager
    def _keeping(self, offset: int, length: int) -> Iterator[None]:
        first, count = overlay.block_span(self.map, offset, length)
        token = object()
        self.busy[token] = range(first, first + count)
        try:
            yield
        finally:
            del self.busy[token]
            self.notify()

    def _is_busy(self, span: tuple[int, int]) -> bool:
        first, end = span[0], span[0] + span[1]
        return any(blocks.start < end and first < blocks.stop for blocks in self.busy.values())

    def notify(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


def _join(found: list[Allocation], part: Allocation) -> None:
    if found and found[-1].kind == part.kind and found[-1].offset + found[-1].length == part.offset:
        found[-1] = attrs.evolve(found[-1], length=found[-1].length + part.length)
    else:
        found.append(part)

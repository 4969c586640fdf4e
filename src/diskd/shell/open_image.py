"""One open image with its lease and its connections: fencing (S1) is carried out here.

The epoch is checked in the same step that submits a call, and after every wait, by the ``check`` that each
connection's writer carries. Taking a lease makes it durable, raises it in memory (from that step on every
older check fails), waits for what older epochs had submitted, drops their connections, and then answers.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import attrs
import trio

from daemonkit.diskd_api import Activity, Lease
from diskd.core import lease
from diskd.core.lease import Claim, Decision, LeaseState
from diskd.core.ownership import Lost, State
from diskd.core.ports import Allocation, Device, Export
from diskd.errors import Fenced, Refused
from diskd.shell.files import Files
from diskd.shell.image import Image, ImageSettings, Writer
from diskd.shell.overlay import OverlayLayer
from diskd.shell.owning import Claimant, Order, Ownership

# What is under way as an image is found lost is waited for, unless storage hangs.
_ABANDON_SECONDS: Final = 60.0
CONNECTIONS_MAX: Final = 256  # per image; a guest has one, a parallel copy tool some dozens


@attrs.define(eq=False)
class Session:
    """One connection's access. ``revoked`` says why nothing of it is accepted any more."""

    claim: Claim
    drop: Callable[[str], None]
    writer: Writer | None = None
    revoked: str | None = None


class OpenImage:
    """Made by ``open``. ``overlay`` and ``checkpoint`` are shell.checkpoints' to set."""

    def __init__(self, image: Image, files: Files, state: LeaseState, ownership: Ownership) -> None:
        self.image = image
        self.files = files
        self.lease_state = state
        self.ownership = ownership
        self.overlay: OverlayLayer | None = None
        self.checkpoint: str | None = None
        self.stuck: str | None = None  # why its AVHD cannot be merged before it is reopened
        self._lock = trio.Lock()  # one change of the lease, or of who holds it, at a time
        self._sessions: list[Session] = []
        self._retired: str | None = None  # why nobody connects any more
        self._merges: list[tuple[trio.CancelScope, trio.Event]] = []
        self._merges_end: str | None = None  # why none begins any more

    @property
    def unmerged_bytes(self) -> int:
        """What its AVHD says of blocks that a merge has still to bring to the parent."""
        return 0 if self.overlay is None else self.overlay.map.entries * self.image.block_bytes

    @classmethod
    async def open(
        cls, directory: Path, settings: ImageSettings, claimant: Claimant, order: Order
    ) -> "OpenImage":
        """It is this daemon's before anything of it is touched. Raises NotOurs, Refused or Damaged."""
        files = Files(directory)
        try:
            ownership = await Ownership.claim(files, claimant, order)
            try:
                state = await ownership.load_lease(order)
                return cls(await Image.open(directory, settings), files, state, ownership)
            except BaseException:
                with trio.CancelScope(shield=True), contextlib.suppress(OSError, Lost):
                    await ownership.undo()
                raise
        except BaseException:
            files.close()
            raise

    async def close(self, leave: State = "closed") -> None:
        """A clean stop; connections are gone by now. Only when everything is durable the owner record says
        that the image is not served any more. A failed image is given away for recovery, where that was asked
        for, and else stays this daemon's. Raises OSError, or Lost, and then has written nothing."""
        try:
            with trio.CancelScope(shield=True):
                try:
                    with contextlib.suppress(OSError):  # of storage that does not answer closing tells more
                        await self.ownership.check()
                except Lost as error:
                    self.image.fail(f"the image is not served here any more: {error}")
                    with trio.move_on_after(_ABANDON_SECONDS, shield=True):
                        await self.image.abandon_in_turn(self.abandon)
                    raise
                is_clean = self.image.failure is None
                await self.image.close()
                if is_clean:
                    await self.ownership.leave(leave)
                elif leave == "released":
                    await self.ownership.leave_unclean(leave)
        finally:
            self.files.close()

    def abandon(self) -> None:
        """Let go without a word to the disk, as a killed daemon does: somebody else has the image."""
        if self.overlay is not None:
            self.overlay.abandon()
        self.image.abandon()
        self.files.close()

    async def lose(self, reason: str) -> None:
        """The image is not ours any more: everybody out at once, then wait for what is submitted, and let go.

        Storage that hangs makes that wait long; the files must stay open for as long as calls use them."""
        self.image.fail(reason)
        self._retired = reason
        sessions = list(self._sessions)
        for session in sessions:
            session.revoked = session.revoked or reason
            session.drop(reason)
        for session in sessions:
            if session.writer is not None:
                await self.image.drain(session.writer)
        await self.stop_merging(reason)
        async with self._lock, self.image.flush_turn, self.image.catalogue_turn, self.image.commit_turn:
            self.abandon()

    async def retire(self, reason: str) -> None:
        """Nobody connects any more. Return when what was submitted is finished and all are sent home."""
        self._retired = reason
        async with self._lock:
            for session in self._sessions:
                session.revoked = session.revoked or reason
            await self._end(list(self._sessions))

    async def stop_merging(self, reason: str) -> None:
        """Return when nothing is merged any more, nor will be; whoever has the image next goes on."""
        self._merges_end = reason
        while self._merges:
            scope, ended = self._merges[-1]
            scope.cancel(reason=reason)
            await ended.wait()

    @contextlib.contextmanager
    def merging(self) -> Iterator[None]:
        """Around a merge: cut short where the image is given away or lost."""
        scope, ended = trio.CancelScope(), trio.Event()
        if self._merges_end is not None:  # it was decided on before that, and its task begins only now
            scope.cancel(reason=self._merges_end)
        self._merges.append((scope, ended))
        try:
            with scope:
                yield
        finally:
            self._merges.remove((scope, ended))
            ended.set()

    @property
    def name(self) -> str:
        return self.image.name

    @property
    def connections(self) -> int:
        return sum(session.revoked is None for session in self._sessions)

    def show_lease(self) -> Lease:
        return self.lease_state.show(self.name)

    def activity(self) -> Activity:
        """Evidence of life, never decisive."""
        last = self.image.last_io_ns()
        age = None if last is None else max(0, int(trio.current_time() * 1e9) - last)
        held_by = None if self.lease_state.released else self.lease_state.holder
        return Activity(self.name, self.lease_state.epoch, held_by, self.connections, age)

    def export_names(self) -> list[str]:
        """What ``open_session`` would accept now."""
        state = self.lease_state
        names = [self.name] if state.is_free else [f"{self.name}@{state.epoch}"]
        return names if state.prepared is None else [*names, f"{self.name}@{state.prepared}"]

    async def change_lease(self, decision: Decision, epoch: int, holder: str) -> Lease:
        """Answers when the new state is durable and nothing of what it fences is under way any more."""
        async with self._lock:
            old = self.lease_state
            new = await self.ownership.change_lease(old, decision, epoch, holder)
            self.lease_state = new
            await self._end([session for session in self._sessions if self._is_stale(session)])
            return new.show(self.name)

    def _is_stale(self, session: Session) -> bool:
        if session.revoked is None:
            try:
                lease.check_read(self.lease_state, session.claim)
            except Fenced as fenced:
                session.revoked = fenced.strerror
        return session.revoked is not None

    async def _end(self, sessions: list[Session]) -> None:
        """Every submitted call of these finished, every connection dropped. Said again, it waits again."""
        try:
            for session in sessions:
                if session.writer is not None:
                    await self.image.drain(session.writer)
                self._sessions.remove(session)
        finally:
            for session in sessions:
                session.drop(session.revoked or "the connection was replaced")

    async def open_session(self, epoch: int | None, drop: Callable[[str], None]) -> Export:
        """Raises Refused: a policy answer."""
        async with self._lock:
            if self._retired is not None:
                raise Refused(self._retired)
            claim = lease.admit(self.lease_state, epoch)
            if epoch is not None:
                # One connection at a time under one epoch: the newer one is the client's idea of the truth.
                same = [session for session in self._sessions if session.claim == claim]
                for session in same:
                    session.revoked = session.revoked or "a newer connection under the same epoch took over"
                await self._end(same)
            else:
                await self._end([session for session in self._sessions if session.revoked is not None])
            if len(self._sessions) >= CONNECTIONS_MAX:
                raise Refused(f"{self.name} has {CONNECTIONS_MAX} connections already")
            lease.admit(self.lease_state, epoch)
            session = Session(claim, drop)
            device = self._device(session)
            self._sessions.append(session)
        return self._export(device, epoch, lambda: self._close(session))

    def info(self, epoch: int | None) -> Export:
        """What ``open_session`` would give; nobody is disturbed."""
        session = Session(lease.admit(self.lease_state, epoch), lambda _: None)
        return self._export(self._device(session), epoch, lambda: None)

    def _export(self, device: Device, epoch: int | None, close: Callable[[], None]) -> Export:
        image = self.image
        return Export(
            device, epoch is None, {}, close, image.block_bytes, image.raw.zeroes_fast, image.counts
        )

    def _device(self, session: Session) -> Device:
        verified: LeaseState | None = None

        def check() -> None:
            nonlocal verified
            if session.revoked is not None:
                raise Fenced(session.revoked)
            # States do not change, they are replaced: this is asked for every request.
            if self.lease_state is not verified:
                lease.check_read(self.lease_state, session.claim)
                verified = self.lease_state

        def check_write() -> None:
            check()
            lease.check_write(self.lease_state, session.claim)

        session.writer = self.image.open_writer(check)
        if session.claim.epoch is None or session.claim.epoch == self.lease_state.epoch:
            return session.writer
        return PreparedDevice(session.writer, check_write)

    def _close(self, session: Session) -> None:
        """The connection ended. What it had submitted may still run: whoever comes next drains it."""
        session.revoked = session.revoked or "the connection has ended"
        session.drop = lambda _: None


class PreparedDevice:
    """A connection opened under a prepared epoch: reads at once, writes from its promotion on."""

    def __init__(self, inner: Writer, check_write: Callable[[], None]) -> None:
        self._inner = inner
        self._check_write = check_write

    @property
    def size_bytes(self) -> int:
        return self._inner.size_bytes

    @property
    def is_read_only(self) -> bool:
        return False  # NBD fixes it at negotiation, and the promotion is to come

    def begin_in_place(self) -> bool:
        return self._inner.begin_in_place()

    def read_in_place(self, offset: int, buffer: memoryview) -> bool:
        return self._inner.read_in_place(offset, buffer)

    def write_in_place(self, offset: int, data: memoryview) -> bool:
        self._check_write()
        return self._inner.write_in_place(offset, data)

    def read_into_nowait(self, offset: int, buffer: bytearray) -> bool:
        return self._inner.read_into_nowait(offset, buffer)

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        return self._inner.read_nowait(offset, length)

    async def read(self, offset: int, length: int) -> bytes:
        return await self._inner.read(offset, length)

    def write_nowait(self, offset: int, data: bytes | memoryview) -> bool:
        self._check_write()
        return self._inner.write_nowait(offset, data)

    async def write(self, offset: int, data: bytes | memoryview, *, fua: bool = False) -> None:
        self._check_write()
        await self._inner.write(offset, data, fua=fua)

    async def write_zeroes(
        self, offset: int, length: int, *, may_trim: bool = True, fua: bool = False
    ) -> None:
        self._check_write()
        await self._inner.write_zeroes(offset, length, may_trim=may_trim, fua=fua)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        self._check_write()
        await self._inner.trim(offset, length, fua=fua)

    async def flush(self) -> None:
        await self._inner.flush()

    async def allocation(self, offset: int, length: int) -> list[Allocation]:
        return await self._inner.allocation(offset, length)

"""This daemon's ownership of one image: taken before it is served, checked while it is, given up last.

What may be taken is decided in core.ownership; here are the kernel lock and the files. The lock is a file of
its own, ``owner.lock``, opened among the image's files: whoever closes those, or dies, lets go of it.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import attrs
import structlog
import trio

from diskd.core import lease, ownership
from diskd.core.inventory import OwnerInfo
from diskd.core.lease import Decision, LeaseState
from diskd.core.ownership import LOCK_FILE, Daemon, Lost, Owner, State, Verdict, Wish
from diskd.core.steps import Script, Truncate
from diskd.errors import Damaged, Refused
from diskd.shell import daemons, kernel_lock
from diskd.shell.files import Files
from diskd.shell.raw_layer import now_ns

log = structlog.get_logger()


class NotOurs(Refused):
    """The image is not this daemon's to open; the message names whose it is, and ``control`` where that one
    answers."""

    def __init__(self, message: str, control: str | None) -> None:
        super().__init__(message)
        self.control = control


@attrs.frozen
class Claimant:
    """This daemon, and the directory in which all daemons of the root tell where they answer."""

    me: Daemon
    directory: Path

    def control_of(self, owner: Owner | None) -> str | None:
        """Where an owner's daemon answers, if it is the one that said so last."""
        return None if owner is None else daemons.control_of(self.directory, owner.daemon)


@attrs.frozen
class Order:
    """How an image is to be opened. ``fenced``: a host that the operator says cannot write any more;
    ``dead_boots``: boot ids of hosts that a cluster has proven dead; ``lost_lease``: the operator says that
    no run can reach the image, whose lease is lost."""

    wish: Wish = "open"
    fenced: str | None = None
    lost_lease: bool = False
    dead_boots: frozenset[str] = frozenset()


AT_START = Order("start")


def owner_blocking(directory: Path) -> Owner | None:
    """Of an image that is not open here. Raises OSError, Damaged."""
    files = Files(directory)
    try:
        return files.run_blocking(ownership.load())
    finally:
        files.close()


@asynccontextmanager
async def claimed_for_deletion(directory: Path, claimant: Claimant) -> AsyncIterator[None]:
    """Raises NotOurs where another daemon may be serving it. A record that is damaged is no reason to keep
    an image that nobody has locked."""
    files = Files(directory)
    try:
        try:
            await Ownership.claim(files, claimant, Order())
        except Damaged as error:
            if not kernel_lock.take(files.descriptor(LOCK_FILE)):
                raise
            log.warning("image.deleted_without_owner", image=directory.name, reason=str(error))
        yield
    finally:
        files.close()


def _look(files: Files) -> tuple[Owner | None, bool]:
    files.run_blocking(_make_lock_file())
    free = kernel_lock.is_free(files.descriptor(LOCK_FILE))
    return files.run_blocking(ownership.load()), free


def _sync_all(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _make_lock_file() -> Script[None]:
    yield Truncate(LOCK_FILE, 0)


def owner_info(claimant: Claimant, owner: Owner | None) -> OwnerInfo | None:
    """As ``image show`` reports it."""
    if owner is None:
        return None
    daemon = owner.daemon
    return OwnerInfo(daemon.name, daemon.host, owner.state, owner.since_ns, claimant.control_of(owner))


class Ownership:
    """Held from ``claim`` until ``leave`` and the closing of ``files``."""

    def __init__(self, files: Files, claimant: Claimant, before: Owner | None, owner: Owner) -> None:
        self._files = files
        self._claimant = claimant
        self._before = before
        self.owner = owner
        self._limiter = trio.CapacityLimiter(1)
        self._turn = trio.Lock()  # one change of the record at a time, so that ours is never a stranger's
        self._is_leaving = False

    @classmethod
    async def claim(cls, files: Files, claimant: Claimant, order: Order) -> "Ownership":
        """Raises NotOurs, Lost (somebody was quicker), Damaged, OSError."""
        return await trio.to_thread.run_sync(cls._claim, files, claimant, order)

    @classmethod
    def _claim(cls, files: Files, claimant: Claimant, order: Order) -> "Ownership":
        # Looked at first and locked afterwards: a look that locked would make others believe in a holder.
        owner, free = _look(files)
        _require(files.directory.name, owner, claimant, order, free=free)
        if not kernel_lock.take(files.descriptor(LOCK_FILE)):
            owner = files.run_blocking(ownership.load())
            _require(files.directory.name, owner, claimant, order, free=False)
        owner = files.run_blocking(ownership.load())
        _require(files.directory.name, owner, claimant, order, free=True)
        taken = files.run_blocking(ownership.take(owner, claimant.me, now_ns()))
        if owner is not None and owner.daemon.name != claimant.me.name:
            log.warning(
                "image.taken_over",
                image=files.directory.name,
                former=ownership.describe(owner),
                state=owner.state,
                fenced=order.fenced,
            )
        return cls(files, claimant, owner, taken)

    async def load_lease(self, order: Order) -> LeaseState:
        """Raises Damaged, also for an older copy; unless the operator said that it is lost."""
        try:
            state = await self._files.run(lease.load())
            ownership.check_lease(self.owner, state.sequence, state.epoch)
        except Refused as error:
            if not order.lost_lease:
                raise
            self.owner, state = await self._files.run(lease.replace_lost(self.owner))
            log.warning("lease.replaced", image=self._files.directory.name, reason=str(error))
        return state

    async def change_lease(
        self, state: LeaseState, decision: Decision, epoch: int, holder: str
    ) -> LeaseState:
        """Durable, and this daemon still the owner when it was. Raises Refused, Lost, OSError."""
        async with self._turn:
            self._require_staying()
            script = lease.change_owned(self.owner, state, decision, epoch, holder)
            self.owner, new = await self._files.run(script)
            return new

    async def check(self) -> None:
        """Raises Lost where the lock or the record is gone or somebody else's; OSError tells nothing."""
        async with self._turn:
            self._require_staying()
            # A thread of its own: on storage that hangs, nobody else's wait for these.
            self.owner = await trio.to_thread.run_sync(self._check, limiter=self._limiter)

    def _check(self) -> Owner:
        owner = self._files.run_blocking(ownership.check(self.owner))
        if not kernel_lock.is_still_held(
            self._files.descriptor(LOCK_FILE), self._files.directory / LOCK_FILE
        ):
            raise Lost("its lock is gone")
        return owner

    async def leave(self, state: State) -> None:
        """The last thing of a clean end. Raises Lost, OSError."""
        async with self._turn:
            self._is_leaving = True
            self.owner = await self._files.run(ownership.leave(self.owner, state))

    def _require_staying(self) -> None:
        """What was written after the last word would be written into another daemon's record."""
        if self._is_leaving:
            raise Lost("this daemon has given it up")

    async def undo(self) -> None:
        """It was claimed and could not be opened: anybody may be told to open it. Not as it was before: of a
        dead daemon's image nobody but this one would know any more that it is dead. Raises Lost, OSError."""
        is_released = self._before is not None and self._before.state == "released"
        await self.leave_unclean("released" if is_released else "closed")

    async def leave_unclean(self, state: State) -> None:
        """As ``leave``, of an image that was not closed cleanly: whoever opens it next recovers, as after a
        power loss. First everything that this host still has in memory is on the storage: nothing may come
        there later, when somebody else writes. Raises OSError where that fails; then it stays ours."""
        await trio.to_thread.run_sync(_sync_all, self._files.directory)
        await self.leave(state)

    def show(self) -> OwnerInfo | None:
        return owner_info(self._claimant, self.owner)


def _require(name: str, owner: Owner | None, claimant: Claimant, order: Order, *, free: bool) -> None:
    """Raises NotOurs."""
    verdict: Verdict = ownership.decide(
        owner,
        claimant.me,
        lock_is_free=free,
        wish=order.wish,
        fenced=order.fenced,
        dead_boots=order.dead_boots,
    )
    control = claimant.control_of(owner)
    if verdict == "open":
        return
    if verdict == "leave":
        raise NotOurs(f"image {name} is {explain(owner, claimant)[1]}", control)
    raise NotOurs(ownership.refusal(name, verdict, owner, control, order.fenced), control)


def explain(owner: Owner | None, claimant: Claimant) -> tuple[Literal["released", "elsewhere"], str]:
    """The state of an image that is not open here, and why, in one phrase."""
    if owner is None:
        return "released", "with nobody"
    who = ownership.describe(owner, claimant.control_of(owner))
    match owner.state:
        case "released":
            return "released", f"released by {who}"
        case "closed":
            return "elsewhere", f"closed by {who}"
        case "serving":
            return "elsewhere", f"with {who}"

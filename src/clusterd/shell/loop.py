"""The one task that owns the core: feeds it events, and carries out what it answers, in order.

    sockets, driver, store, diskd, operators --post(event)--> inbox --> core.handle --> Ready
    Ready: heartbeats out at once; the state file to the persister; acts when all of it so far is durable

A turn never waits for a disk or a peer: the state file is written by a task of its own (the newest
document only, since each contains the earlier ones), and acts that need it durable queue up behind it.

A *stall* is a turn that comes later than the pulse promised: the process was stopped, starved or blocked.
What the peers sent meanwhile waits in the sockets, so it is read first; then the core learns how long the
stall was and shifts its deadlines; only then do deadlines count again.
"""

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import structlog
import trio

from clusterd.core.effects import Act, Exit, Persist, Ready
from clusterd.core.events import (
    DatagramReceived,
    DeadlineReached,
    Event,
    LoopStalled,
    Persisted,
    Started,
)
from clusterd.shell.udp import Heartbeats
from daemonkit.durable import replace_file
from daemonkit.errors import OperatorError
from daemonkit.units import MILLISECOND, SECOND

PULSE_NS: Final = 100 * MILLISECOND
STALL_NS_MIN: Final = 100 * MILLISECOND
DEADLINES_PER_TURN_MAX: Final = 16  # a core whose deadline does not move on would spin otherwise

log = structlog.get_logger("loop")


class Core(Protocol):
    """The door of ``core.node.NodeCore``, as far as the loop uses it."""

    def handle(self, event: Event, now: int) -> Ready: ...

    def next_deadline(self) -> int | None: ...


class CoreLoop:
    """``post`` from anywhere in this trio run; ``run`` is the owner task."""

    def __init__(self, core: Core, state_path: Path, *, now: Callable[[], int] = time.monotonic_ns) -> None:
        self._core = core
        self.now = now
        self._state_path = state_path
        # Bounded by what asks: every event answers an effect, a run or one of the bounded control calls.
        self._inbox: deque[Event] = deque()
        self._woken = trio.Event()
        self._turned = trio.Event()
        self._unwritten: Persist | None = None
        self._persist_wanted = trio.Event()
        self._persist_limiter = trio.CapacityLimiter(1)
        self._ticket_asked = 0
        self._ticket_durable = 0
        self._waiting: deque[tuple[int, Act]] = deque()
        self._turn_ns = now()
        self._carry_out: Callable[[Act], None] = lambda act: None
        self._heartbeats: Heartbeats | None = None
        self.exit_reason: str | None = None

    def post(self, event: Event) -> None:
        """Hand an event to the core at its next turn."""
        self._inbox.append(event)
        self._woken.set()

    def wake(self) -> None:
        """There are datagrams in the mailbox."""
        self._woken.set()

    async def wait_turn(self) -> None:
        """Until the core has had another turn: at most a pulse, and something may have changed by then."""
        await self._turned.wait()

    def end(self, reason: str) -> None:
        """End the loop without the core's goodbye."""
        self.exit_reason = self.exit_reason or reason
        self._woken.set()

    async def run(self, heartbeats: Heartbeats, carry_out: Callable[[Act], None]) -> str:
        """Until the core says Exit; returns its reason."""
        self._heartbeats, self._carry_out = heartbeats, carry_out
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._persist_forever)
            self._turn_ns = self.now()
            self._step(Started())
            while self.exit_reason is None:
                await self._wait()
                self._turn()
                self._turned.set()
                self._turned = trio.Event()
            nursery.cancel_scope.cancel(reason="exit")
        return self.exit_reason

    async def _wait(self) -> None:
        deadline = self._core.next_deadline()
        until = self._turn_ns + PULSE_NS if deadline is None else min(deadline, self._turn_ns + PULSE_NS)
        with trio.move_on_after(max(0, until - self.now()) / SECOND):
            await self._woken.wait()
        self._woken = trio.Event()

    def _turn(self) -> None:
        now = self.now()
        late = now - (self._turn_ns + PULSE_NS)
        self._turn_ns = now
        if late > STALL_NS_MIN and self._heartbeats is not None:
            log.warning("loop.late", seconds=late / SECOND)
            self._heartbeats.drain()
            self._take_datagrams()
            self._step(LoopStalled(late))
        self._take_datagrams()
        for _ in range(len(self._inbox)):
            self._step(self._inbox.popleft())
        deadline = self._core.next_deadline()
        if deadline is not None and self.now() >= deadline and self._heartbeats is not None:
            # Contact may end now, and the heartbeat that keeps it may have come: only its reader had no turn.
            self._heartbeats.drain()
            self._take_datagrams()
        for _ in range(DEADLINES_PER_TURN_MAX):
            deadline = self._core.next_deadline()
            if deadline is None or self.now() < deadline:
                break
            self._step(DeadlineReached())

    def _take_datagrams(self) -> None:
        mailbox = self._heartbeats.mailbox if self._heartbeats is not None else deque()
        for _ in range(len(mailbox)):
            network, data = mailbox.popleft()
            self._step(DatagramReceived(network, data))

    def _step(self, event: Event) -> None:
        self._follow(self._core.handle(event, self.now()))

    def _follow(self, ready: Ready) -> None:
        if self._heartbeats is not None:
            for effect in ready.send:
                self._heartbeats.send(effect.data)
        if ready.persist is not None:
            self._unwritten = ready.persist
            self._ticket_asked = ready.persist.ticket
            self._persist_wanted.set()
        for act in ready.act:
            if self._ticket_asked > self._ticket_durable:
                self._waiting.append((self._ticket_asked, act))
            else:
                self._do(act)

    def _do(self, act: Act) -> None:
        if isinstance(act, Exit):
            self.exit_reason = act.reason
            self._woken.set()
        else:
            self._carry_out(act)

    async def _persist_forever(self) -> None:
        while True:
            await self._persist_wanted.wait()
            self._persist_wanted = trio.Event()
            persist, self._unwritten = self._unwritten, None
            if persist is None:
                continue
            try:
                await trio.to_thread.run_sync(
                    replace_file, self._state_path, persist.document, limiter=self._persist_limiter
                )
            except OSError as error:
                # A node that cannot remember must not act (S7): better to end, VMs going on, than to guess.
                raise OperatorError(
                    f"{self._state_path}: {error.strerror}: clusterd cannot go on without its state file"
                ) from error
            self._ticket_durable = persist.ticket
            while self._waiting and self._waiting[0][0] <= persist.ticket:
                self._do(self._waiting.popleft()[1])
            self.post(Persisted(persist.ticket))

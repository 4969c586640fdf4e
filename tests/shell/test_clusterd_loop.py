"""The loop's promises to the core: persist before act, heartbeats before everything, stalls told in order."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from clusterd.core.effects import Act, Exit, NoteEvent, Persist, Ready, SendHeartbeat
from clusterd.core.events import (
    DatagramReceived,
    DeadlineReached,
    Event,
    LoopStalled,
    Persisted,
    ShutdownRequested,
    Started,
)
from clusterd.core.types import EventName
from clusterd.shell.loop import CoreLoop
from clusterd.shell.udp import Heartbeats
from daemonkit.errors import OperatorError
from daemonkit.ports import Address

DEADLINE_S = 20
ANY = Address("127.0.0.1", 0)


def note(text: str) -> NoteEvent:
    return NoteEvent(EventName.NODE_STARTED, {"text": text})


class ScriptedCore:
    """Answers each event with what ``script`` says; remembers what it was told, in order."""

    def __init__(self, script: Callable[[Event], Ready]) -> None:
        self.script = script
        self.events: list[Event] = []
        self.deadline: int | None = None

    def handle(self, event: Event, now: int) -> Ready:
        self.events.append(event)
        return self.script(event)

    def next_deadline(self) -> int | None:
        return self.deadline


async def run(loop: CoreLoop, carry_out: Callable[[Act], None], peer: Address | None = None) -> str:
    peers = {"a": [peer]} if peer else {}
    with (
        contextlib.closing(Heartbeats({"a": ANY}, peers, loop.wake)) as heartbeats,
        trio.fail_after(DEADLINE_S),
    ):
        return await loop.run(heartbeats, carry_out)


async def test_acts_wait_until_all_that_was_to_be_remembered_is_durable(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    seen: list[tuple[str, bytes]] = []

    def script(event: Event) -> Ready:
        if isinstance(event, Started):
            loop.post(DeadlineReached())
            return Ready(persist=Persist(1, b"one"), act=(note("after one"),))
        if isinstance(event, DeadlineReached):
            return Ready(persist=Persist(2, b"two"), act=(note("after two"),))
        if event == Persisted(2):
            return Ready(act=(note("last"), Exit("done")))
        return Ready()

    def carry_out(act: Act) -> None:
        assert isinstance(act, NoteEvent)
        seen.append((act.fields["text"], state.read_bytes()))

    core = ScriptedCore(script)
    loop = CoreLoop(core, state)
    assert await run(loop, carry_out) == "done"
    assert [text for text, _ in seen] == ["after one", "after two", "last"]
    assert seen[0][1] in (b"one", b"two")  # the newest document contains the earlier ones
    assert [document for _, document in seen[1:]] == [b"two", b"two"]
    tickets = [event.ticket for event in core.events if isinstance(event, Persisted)]
    assert tickets == sorted(set(tickets))
    assert tickets[-1] == 2


async def test_a_heartbeat_waits_for_no_disk(tmp_path: Path) -> None:
    """The state file cannot be written at all, and the heartbeat of the same Ready is out already."""

    def script(event: Event) -> Ready:
        if isinstance(event, Started):
            return Ready(persist=Persist(1, b"x"), send=(SendHeartbeat(b"beat"),), act=(note("never"),))
        return Ready()

    acts: list[Act] = []
    receiver = Heartbeats({"a": ANY}, {}, lambda: None)
    with contextlib.closing(receiver):
        loop = CoreLoop(ScriptedCore(script), tmp_path / "missing" / "state.json")
        with pytest.RaisesGroup(pytest.RaisesExc(OperatorError, match="cannot go on without its state file")):
            await run(loop, acts.append, Address.parse(receiver.addresses["a"]))
        receiver.drain()
    assert list(receiver.mailbox) == [("a", b"beat")]
    assert acts == []


async def test_after_a_stall_the_sockets_are_drained_before_anything_else(tmp_path: Path) -> None:
    """The clock jumps: what came meanwhile is told first, then the stall, then the rest."""
    clock = [0]
    late = Heartbeats({"a": ANY}, {}, lambda: None)
    sender = Heartbeats({"a": ANY}, {"a": [Address.parse(late.addresses["a"])]}, lambda: None)

    def script(event: Event) -> Ready:
        if isinstance(event, Started):
            sender.send(b"beat")
            loop.post(DeadlineReached())
            clock[0] = 10**10
        if isinstance(event, DeadlineReached):
            return Ready(act=(Exit("done"),))
        return Ready()

    core = ScriptedCore(script)
    loop = CoreLoop(core, tmp_path / "state.json", now=lambda: clock[0])
    with contextlib.closing(late), contextlib.closing(sender), trio.fail_after(DEADLINE_S):
        await loop.run(late, lambda act: None)
    kinds = [type(event) for event in core.events]
    assert kinds == [Started, DatagramReceived, LoopStalled, DeadlineReached]
    stall = core.events[2]
    assert isinstance(stall, LoopStalled)
    assert stall.duration_ns > 9 * 10**9


async def test_before_a_deadline_the_sockets_are_read(tmp_path: Path) -> None:
    """Contact may end at it, and the heartbeat that keeps it may be waiting there."""
    late = Heartbeats({"a": ANY}, {}, lambda: None)
    sender = Heartbeats({"a": ANY}, {"a": [Address.parse(late.addresses["a"])]}, lambda: None)

    def script(event: Event) -> Ready:
        if isinstance(event, Started):
            sender.send(b"beat")
            core.deadline = 10**7
            clock[0] = 10**7
        if isinstance(event, DeadlineReached):
            core.deadline = None
            return Ready(act=(Exit("done"),))
        return Ready()

    clock = [0]
    core = ScriptedCore(script)
    loop = CoreLoop(core, tmp_path / "state.json", now=lambda: clock[0])
    with contextlib.closing(late), contextlib.closing(sender), trio.fail_after(DEADLINE_S):
        await loop.run(late, lambda act: None)
    assert [type(event) for event in core.events] == [Started, DatagramReceived, DeadlineReached]


async def test_deadlines_are_told_when_they_are_due_and_shutdown_ends_the_loop(tmp_path: Path) -> None:
    def script(event: Event) -> Ready:
        core.deadline = None
        if isinstance(event, Started):
            core.deadline = loop.now() + 10**7
        if isinstance(event, DeadlineReached):
            loop.post(ShutdownRequested())
        if isinstance(event, ShutdownRequested):
            return Ready(act=(Exit("told to"),))
        return Ready()

    core = ScriptedCore(script)
    loop = CoreLoop(core, tmp_path / "state.json")
    assert await run(loop, lambda act: None) == "told to"
    assert [type(event) for event in core.events] == [Started, DeadlineReached, ShutdownRequested]

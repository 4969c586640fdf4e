"""The control server: what ``clusterctl`` and the other nodes call (core.calls, docs/formats/control.md).

Reads come from the core's memory, so that they answer whatever the store does. A command goes to the
core, which records it in the store and answers; no answer in time is "unknown", and said so.
"""

import itertools
import time
from collections.abc import Mapping
from typing import Any, Final

import trio

from clusterd.config import PeerAddresses, parse_vm
from clusterd.core import calls
from clusterd.core.commands import AddVm, Command
from clusterd.core.effects import AnswerCommand
from clusterd.core.events import CommandGiven
from clusterd.core.node import NodeCore
from clusterd.errors import Refused, Unanswered
from clusterd.shell.diskds import Diskds
from clusterd.shell.event_log import EventLog
from clusterd.shell.loop import CoreLoop
from clusterd.shell.recovery import StoreRecovery
from clusterd.shell.vm_copies import VmCopies
from daemonkit.rpc import Call, Registry

COMMAND_SECONDS_MAX: Final = 8.0
EVENTS_WAIT_SECONDS_MAX: Final = 5.0


class _Pending:
    def __init__(self) -> None:
        self.answered = trio.Event()
        self.answer: AnswerCommand | None = None


class Control:
    """Handlers of every call; ``answer_command`` is the way back from the core."""

    def __init__(
        self,
        core: NodeCore,
        loop: CoreLoop,
        event_log: EventLog,
        diskds: Diskds,
        recovery: StoreRecovery,
        *,
        peers: Mapping[str, PeerAddresses],
        key: bytes | None,
    ) -> None:
        self._core = core
        self._loop = loop
        self._event_log = event_log
        self._diskds = diskds
        self._recovery = recovery
        self._copies = VmCopies(core, loop, diskds, peers, key, self._ask)
        self._tickets = itertools.count(1)
        self._pending: dict[int, _Pending] = {}

    def registry(self) -> Registry:
        registry = Registry()
        registry.add(calls.STATUS, self._status)
        registry.add(calls.EVENTS, self._events)
        registry.add(calls.EXPLAIN_NODE, self._explain_node)
        registry.add(calls.PROBE, self._probe)
        registry.add(calls.VM_SHOW, self._vm_show)
        registry.add(calls.VM_ADD, self._vm_add)
        registry.add(calls.VM_BACKUP, self._copies.backup)
        registry.add(calls.VM_RESTORE, self._copies.restore)
        registry.add(calls.STORE_TESTIMONY, self._recovery.testimony)
        registry.add(calls.STORE_PICTURE, self._recovery.picture)
        registry.add(calls.STORE_PLAN, self._recovery.plan)
        registry.add(calls.STORE_RECOVER, self._recovery.recover)
        for method in calls.COMMANDS:
            registry.add(method, self._command)
        return registry

    def answer_command(self, answer: AnswerCommand) -> None:
        """The core's answer; its operator may have gone."""
        pending = self._pending.pop(answer.ticket, None)
        if pending is not None:
            pending.answer = answer
            pending.answered.set()

    async def _status(self, params: calls.Nothing, call: Call) -> calls.Document:
        return calls.Document(self._core.status(self._loop.now()))

    async def _explain_node(self, params: calls.NodeName, call: Call) -> calls.Rows:
        return calls.Rows(self._core.explain_node(params.node, self._loop.now()))

    async def _vm_show(self, params: calls.VmName, call: Call) -> calls.Document:
        document = self._core.vm_config(params.vm)
        if document is None:
            raise Refused(f"no VM {params.vm!r} is known here: see `clusterctl vm list`")
        return calls.Document(document)

    async def _events(self, params: calls.EventsSince, call: Call) -> calls.EventList:
        if params.wait and not self._event_log.since(params.after).events:
            with trio.move_on_after(EVENTS_WAIT_SECONDS_MAX):
                await self._event_log.wait_after(params.after)
        return self._event_log.since(params.after)

    async def _probe(self, params: calls.ProbeRequest, call: Call) -> calls.ProbeReply:
        return await self._diskds.probe(params.disks)

    async def _vm_add(self, params: calls.VmFile, call: Call) -> calls.Accepted:
        config = parse_vm(params.text, where="VM file")
        return await self._ask(AddVm(config, replace=params.replace, start=params.start))

    async def _command(self, command: Any, call: Call) -> calls.Accepted:
        return await self._ask(command)

    async def _ask(self, command: Command) -> calls.Accepted:
        ticket, pending = next(self._tickets), _Pending()
        self._pending[ticket] = pending
        started = time.monotonic()
        try:
            self._loop.post(CommandGiven(ticket, command))
            with trio.move_on_after(COMMAND_SECONDS_MAX):
                await pending.answered.wait()
        finally:
            self._pending.pop(ticket, None)
        if pending.answer is None:
            raise Unanswered(
                f"no answer within {time.monotonic() - started:.0f} s: whether it was recorded is unknown;"
                " look at `clusterctl status`"
            )
        if not pending.answer.accepted:
            raise (Unanswered if pending.answer.is_unknown else Refused)(pending.answer.text)
        return calls.Accepted(pending.answer.text)

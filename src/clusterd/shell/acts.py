"""Carries out the core's acts. Each that takes time runs in a task of its own and posts its answer.

Nothing here decides: an act names exactly what to do, and every outcome, also none, is an event.
"""

from collections.abc import Awaitable, Callable
from typing import Final

import structlog
import trio

from clusterd.config import NodeConfig
from clusterd.core import effects, events
from clusterd.core.calls import PROBE, ProbeReply, ProbeRequest
from clusterd.core.effects import Act
from clusterd.core.events import Event
from clusterd.core.picture import Picture
from clusterd.core.records import prefix
from clusterd.errors import StoreUnknown
from clusterd.shell.diskds import Diskds
from clusterd.shell.drivers.orders import RunOrders
from clusterd.shell.drivers.port import Driver
from clusterd.shell.event_log import EventLog
from clusterd.shell.references import any_answers
from clusterd.shell.store import StoreClient
from clusterd.shell.store_calls import read_store, write_store
from daemonkit.cli import call_once
from daemonkit.rpc import CallFailed, CallRefused

PROBE_SECONDS_MAX: Final = 1.9

log = structlog.get_logger("acts")


class Acts:
    """``acts_nursery`` holds what is under way; ``answer_command`` hands an answer to its operator."""

    def __init__(
        self,
        config: NodeConfig,
        store: StoreClient,
        diskds: Diskds,
        driver: Driver,
        event_log: EventLog,
        *,
        key: bytes | None,
        post: Callable[[Event], None],
        answer_command: Callable[[effects.AnswerCommand], None],
        keep_picture: Callable[[Picture], None],
        acts_nursery: trio.Nursery,
    ) -> None:
        self._config = config
        self._store = store
        self._diskds = diskds
        self._runs = RunOrders(driver, acts_nursery)
        self._event_log = event_log
        self._key = key
        self._post = post
        self._answer_command = answer_command
        self._keep_picture = keep_picture
        self._nursery = acts_nursery
        self._prefix = prefix(config.cluster)

    def carry_out(self, act: Act) -> None:
        """Do it, or begin to."""
        match act:
            case effects.NoteEvent():
                self._event_log.note(act.name, act.fields)
            case effects.AnswerCommand():
                self._answer_command(act)
            case effects.KeepPicture(picture):
                self._keep_picture(picture)
            case effects.ReadStore():
                self._begin_store(act.request, lambda: read_store(self._store, self._prefix, act))
            case effects.WriteStore():
                self._begin_store(act.request, lambda: write_store(self._store, act))
            case effects.GrantSession():
                self._begin_store(act.request, lambda: self._grant(act))
            case effects.KeepSession():
                self._begin_store(act.request, lambda: self._keep(act))
            case effects.RevokeSession():
                self._nursery.start_soon(self._revoke, act)
            case effects.SpawnRun():
                self._runs.start(act.config, act.epoch)
            case effects.AdoptRun():
                self._runs.adopt(act.config, act.epoch)
            case effects.StopRun():
                self._runs.stop(act.vm, act.epoch, force=act.force)
            case effects.ReleaseLeases():
                self._nursery.start_soon(self._diskds.release, act.disks, act.epoch, act.holder)
            case effects.Probe():
                self._begin(lambda: self._probe(act))
            case effects.AcquireLeases():
                self._begin(lambda: self._acquire(act))
            case effects.LookAtImages():
                self._begin(lambda: self._look(act))
            case effects.CheckReferences():
                self._begin(lambda: self._check_references(act))
            case effects.Exit():
                raise AssertionError("the loop itself carries out Exit")

    def _begin(self, work: Callable[[], Awaitable[Event]]) -> None:
        async def run() -> None:
            self._post(await work())

        self._nursery.start_soon(run)

    def _begin_store(self, request: int, work: Callable[[], Awaitable[Event]]) -> None:
        async def guarded() -> Event:
            try:
                return await work()
            except StoreUnknown as error:
                return events.StoreFailed(request, str(error))

        self._begin(guarded)

    async def _grant(self, act: effects.GrantSession) -> Event:
        reply = await self._store.lease_grant(act.ttl_ns)
        return events.SessionGranted(act.request, reply.lease_id)

    async def _keep(self, act: effects.KeepSession) -> Event:
        ttl_ns = await self._store.lease_keepalive(act.lease)
        return events.SessionKept(act.request, ttl_ns is not None)

    async def _revoke(self, act: effects.RevokeSession) -> None:
        try:
            await self._store.lease_revoke(act.lease)
        except StoreUnknown as error:
            log.info("session.not_revoked", reason=str(error))

    async def _probe(self, act: effects.Probe) -> Event:
        reply = await self._probe_reply(act)
        return events.ProbeAnswered(act.request, reply.reached, reply.reason, reply.epochs)

    async def _probe_reply(self, act: effects.Probe) -> ProbeReply:
        if act.node == self._config.name:
            return await self._diskds.probe(act.disks)
        if act.node not in self._config.peers:
            return ProbeReply(
                reached=False, reason=f"node {act.node} is not among this node's peers", epochs={}
            )
        address = self._config.peers[act.node].control
        request = ProbeRequest(act.vm, list(act.disks))
        try:
            return await call_once(address, PROBE, request, key=self._key, seconds_max=PROBE_SECONDS_MAX)
        except (CallRefused, CallFailed) as error:
            return ProbeReply(reached=False, reason=f"node {act.node}: {error}", epochs={})

    async def _acquire(self, act: effects.AcquireLeases) -> Event:
        answers = await self._diskds.acquire(act.disks, act.epoch, act.holder, act.dead_boots)
        return events.LeasesAnswered(act.request, answers)

    async def _look(self, act: effects.LookAtImages) -> Event:
        return events.ImagesSeen(act.request, await self._diskds.look(act.disks))

    async def _check_references(self, act: effects.CheckReferences) -> Event:
        return events.ReferencesAnswered(act.request, await any_answers(self._config.reference_addresses))

"""Carries ``store recover`` out on the node that was asked: asks every peer and diskd, plans, writes.

Nothing here decides: ``core.recovery`` makes the plan from what was found, ``core.rebuilding`` says which
transactions make it so. One recovery at a time per node; the store's guards keep those of two nodes apart.
"""

import secrets
from collections.abc import Mapping
from typing import Final

import attrs
import structlog
import trio

from clusterd.config import PeerAddresses
from clusterd.core import calls, effects, events
from clusterd.core.node import NodeCore
from clusterd.core.picture import Picture
from clusterd.core.rebuilding import Script, rebuild
from clusterd.core.records import prefix
from clusterd.core.recovery import Evidence, Plan, Request, disks_of, document, newest_picture, plan
from clusterd.core.testimony import Testimony
from clusterd.errors import Refused, StoreUnknown, Unanswered
from clusterd.shell.diskds import Diskds
from clusterd.shell.store import StoreClient
from clusterd.shell.store_calls import read_store, write_store
from daemonkit.cli import call_once
from daemonkit.rpc import Call, CallFailed, CallRefused

ASK_SECONDS_MAX: Final = 3.0
PICTURE_SECONDS_MAX: Final = 20.0
PAGE_BYTES_MAX: Final = 1 << 20
PAGES_MAX: Final = 1024

log = structlog.get_logger("recovery")


@attrs.define
class StoreRecovery:
    """The handlers of the calls ``store.*``."""

    core: NodeCore
    store: StoreClient
    diskds: Diskds
    peers: Mapping[str, PeerAddresses]
    key: bytes | None
    busy: bool = False

    # --- what others ask of this node

    async def testimony(self, params: calls.Nothing, call: Call) -> Testimony:
        return self.core.testimony()

    async def picture(self, params: calls.PictureAfter, call: Call) -> calls.PicturePage:
        """One page of this node's picture. Raises Refused where it has none, or another one by now."""
        picture = self.core.picture()
        if picture is None or picture.age_key != (params.recovery, params.revision):
            raise Refused("the picture of the store has changed meanwhile: run it again")
        page: dict[str, bytes] = {}
        size = 0
        for key, value in picture.records:
            if key > params.after:
                page[key] = value
                size += len(key) + len(value)
                if size >= PAGE_BYTES_MAX:
                    return calls.PicturePage(page, is_last=False)
        return calls.PicturePage(page, is_last=True)

    # --- what the operator asks of this node

    async def plan(self, params: Request, call: Call) -> calls.Document:
        """Raises Refused."""
        made, _ = await self._plan(params)
        return calls.Document(document(made))

    async def recover(self, params: calls.RecoverStore, call: Call) -> calls.Accepted:
        """Carry the plan out that was shown. Raises Refused, also where it would be another one by now."""
        if self.busy:
            raise Refused("this node is recovering the store already: wait for it")
        self.busy = True
        try:
            made, evidence = await self._plan(params.request)
            if made.digest != params.digest:
                raise Refused("what is known has changed since the plan was shown: run it again")
            log.warning("store.recovering", digest=made.digest, number=made.number, epoch=made.epoch)
            await self._write(rebuild(made, evidence.prefix, evidence.entries, evidence.asked, _token()))
        finally:
            self.busy = False
        log.warning("store.recovered", number=made.number, epoch=made.epoch)
        return calls.Accepted(
            f"the store is rebuilt ({len(made.fates)} VMs, epoch {made.epoch}): every node takes it up with"
            " its next read, see 'clusterctl status'"
        )

    async def _write(self, script: Script) -> None:
        answer: events.StoreSnapshot | events.StoreWritten | None = None
        try:
            while True:
                effect = next(script) if answer is None else script.send(answer)
                if isinstance(effect, effects.ReadStore):
                    answer = await read_store(self.store, prefix(self.core.identity.cluster), effect)
                else:
                    answer = await write_store(self.store, effect)
        except StopIteration:
            return
        except StoreUnknown as error:
            raise Unanswered(
                f"{error}: the recovery is complete or not; where 'clusterctl status' still shows the store"
                " as unknown, run it again"
            ) from error

    async def _plan(self, request: Request) -> tuple[Plan, Evidence]:
        if self.core.testimony().store_known:
            raise Refused("the store is good: there is nothing to recover")
        evidence = await self._evidence()
        made = plan(evidence, request)
        log.info("store.recovery_planned", digest=made.digest, warnings=list(made.warnings))
        return made, evidence

    # --- finding out

    async def _evidence(self) -> Evidence:
        name, own = self.core.identity.name, self.core.testimony()
        head = prefix(self.core.identity.cluster)
        try:
            snapshot = await read_store(self.store, head, effects.ReadStore(0))
        except StoreUnknown as error:
            raise Refused(f"{error}: bring a store up first, an empty one will do") from error
        testimonies, silent = await self._testimonies()
        testimonies[name] = own
        picture = await self._newest_picture(testimonies)
        marks = self.core.store_marks()
        evidence = Evidence(
            name, marks, testimonies, silent, picture, (), {}, head, snapshot.revision, snapshot.entries
        )
        leases, silent_diskds = await self.diskds.leases(disks_of(evidence))
        return attrs.evolve(evidence, leases=leases, silent_diskds=silent_diskds)

    async def _testimonies(self) -> tuple[dict[str, Testimony], dict[str, str]]:
        found: dict[str, Testimony] = {}
        silent: dict[str, str] = {}

        async def ask(name: str, peer: PeerAddresses) -> None:
            try:
                found[name] = await call_once(
                    peer.control,
                    calls.STORE_TESTIMONY,
                    calls.Nothing(),
                    key=self.key,
                    seconds_max=ASK_SECONDS_MAX,
                )
            except (CallRefused, CallFailed) as error:
                silent[name] = str(error)

        async with trio.open_nursery() as nursery:
            for name, peer in sorted(self.peers.items()):
                nursery.start_soon(ask, name, peer)
        return found, silent

    async def _newest_picture(self, testimonies: Mapping[str, Testimony]) -> Picture | None:
        """Of all who answered; only the newest is fetched. Raises Refused where that cannot be had whole."""
        own = self.core.picture()
        store_id = self.core.testimony().store_id
        others = [
            told
            for name, told in sorted(testimonies.items())
            if name in self.peers and told.store_id == store_id and told.picture_revision >= 0
        ]
        newest = max(others, key=lambda told: told.picture_age_key, default=None)
        if newest is None or store_id is None:
            return own
        if own is not None and own.age_key >= newest.picture_age_key:
            return own
        try:
            with trio.fail_after(PICTURE_SECONDS_MAX):
                return newest_picture((own, await self._fetch(store_id, newest)))
        except (CallRefused, CallFailed) as error:
            raise Refused(f"the picture of {newest.node} cannot be fetched: {error}") from error
        except trio.TooSlowError as error:
            why = f"it took more than {PICTURE_SECONDS_MAX:g} s"
            raise Refused(f"the picture of {newest.node} cannot be fetched: {why}") from error

    async def _fetch(self, store_id: str, told: Testimony) -> Picture:
        records: dict[str, bytes] = {}
        for _ in range(PAGES_MAX):
            after = max(records, default="")
            page = await call_once(
                self.peers[told.node].control,
                calls.STORE_PICTURE,
                calls.PictureAfter(told.picture_recovery, told.picture_revision, after),
                key=self.key,
                seconds_max=ASK_SECONDS_MAX,
            )
            records |= page.records
            if page.is_last:
                found = tuple(sorted(records.items()))
                return Picture(store_id, told.picture_recovery, told.picture_revision, found)
        raise CallFailed("it has too many pages")


def _token() -> str:
    return secrets.token_hex(16)

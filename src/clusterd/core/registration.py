"""How a node comes and goes: the store's id, its member record and presence, and the two goodbyes.

Theory of operation. The first node that finds a new store gives it an id; every node remembers it. Then a
node puts its presence under its session's lease, adds itself as a member, and takes back an old goodbye.
The presence says up to which revision it is *settled* (owner.py).

    restart (SIGTERM): write the goodbye, let the leader key go, end the session, exit; the runs go on.
    leave (operator): once nothing lives here and nothing is assigned here, the same with ``leave`` and the
    list of the runs that were stopped, which is the proof for exactly those.

If the store is unknown, a restart waits ``GOODBYE_PATIENCE_NS`` and goes without a goodbye.
"""

from typing import Any, Final, Literal

import attrs

from clusterd.core import effects, records
from clusterd.core.desk import Desk
from clusterd.core.owner import Owner
from clusterd.core.store_session import StoreSession
from clusterd.core.types import FINAL_RUN_STATES, NODES_MAX, EventName
from daemonkit.units import SECOND

GOODBYE_PATIENCE_NS: Final = 2 * SECOND


@attrs.define
class Registration:
    desk: Desk
    store: StoreSession
    owner: Owner
    shutdown_at: int | None = None
    is_gone: bool = False

    def decide(self) -> bool:
        """Whether the store is ours and we are present, so that others may decide things."""
        desk = self.desk
        if desk.is_leaving_process:
            self._say_restart()
            return False
        if not self.store.is_usable or desk.lease is None:
            return False
        if "id" not in desk.view.seen:
            absent = effects.Compare("id", "create", 0)
            self.store.write(("id",), [absent], [("id", records.ClusterId(desk.identity.fresh_id))])
            return False
        if desk.state.store_id is None:
            return False  # the next read makes it known
        self._be_present()
        self._leave_when_empty()
        return f"presence/{desk.name}" in desk.view.seen

    def _presence(self) -> records.Presence:
        desk, identity = self.desk, self.desk.identity
        old = desk.view.presence(desk.name)
        settled = old.settled if old and old.incarnation == desk.state.incarnation else 0
        if settled < max(1, desk.view.mod(f"moves/{desk.name}")) and not self.owner.has_stale():
            settled = desk.view.read_revision
        return records.Presence(
            desk.name,
            desk.state.incarnation,
            identity.boot_id,
            identity.memory_bytes,
            identity.vcpus,
            settled,
            identity.control,
        )

    def _be_present(self) -> None:
        desk, name = self.desk, self.desk.name
        keys = (f"presence/{name}", f"members/{name}", f"goodbyes/{name}", f"confirmed/{name}")
        puts: list[tuple[str, Any]] = []
        wanted, seen = self._presence(), desk.view.seen.get(keys[0])
        if seen is None or seen.record != wanted or seen.lease != desk.lease:
            puts.append((keys[0], wanted))
        said = desk.view.record(keys[2], records.Goodbye)
        member = desk.view.record(keys[1], records.Member)
        if member is None and len(desk.view.members()) < NODES_MAX:
            puts.append((keys[1], records.Member(name)))
        elif member is not None and said is not None and said.kind == "leave":
            puts.append((keys[1], records.Member(name)))  # back after a leave: admitted again
        deletes: tuple[str, ...] = (keys[2],) if said is not None and not self.is_gone else ()
        confirmed = desk.view.record(keys[3], records.ConfirmedDead)
        mine = (desk.identity.boot_id, "")
        if confirmed is not None and any(boot in mine for boot in confirmed.boots()):
            # We live: it is no proof about what runs here from now on, nor is one of a boot that was not
            # known, which might match again after another recovery. What it says of other boots stays.
            others = tuple(boot for boot in confirmed.boots() if boot not in mine)
            if others:
                puts.append((keys[3], attrs.evolve(confirmed, boot_id=others[0], also=others[1:])))
            else:
                deletes += (keys[3],)
        if puts or deletes:
            self.store.write(("presence",), self.store.same(*keys), puts, deletes, leased=(keys[0],))

    # -- going

    def shut_down(self) -> None:
        """SIGTERM."""
        if self.shutdown_at is None:
            self.desk.is_leaving_process = True
            self.shutdown_at = self.desk.now + GOODBYE_PATIENCE_NS

    def _say_restart(self) -> None:
        assert self.shutdown_at is not None
        if self.is_gone:
            return
        if self.desk.now >= self.shutdown_at:
            self._exit("restart, without a goodbye: the store did not answer")
            return
        self.desk.wake(self.shutdown_at)
        if self.desk.state.store_id is not None and "id" in self.desk.view.seen:
            self._say("restart")

    def _leave_when_empty(self) -> None:
        desk, view = self.desk, self.desk.view
        member = view.record(f"members/{desk.name}", records.Member)
        if member is None or member.admission != "leaving" or self.is_gone:
            return
        if view.record(f"goodbyes/{desk.name}", records.Goodbye) is not None or self.owner.live():
            return
        for vm in view.vms():
            assignment, run = view.assignment(vm), view.current_run(vm)
            ended = run is not None and run.state in FINAL_RUN_STATES
            if assignment is not None and assignment.owner == desk.name and not ended:
                return
        self._say("leave")

    def _say(self, kind: Literal["leave", "restart"]) -> None:
        desk, key = self.desk, f"goodbyes/{self.desk.name}"
        stopped = tuple(records.RunName(vm, epoch) for vm, epoch in self.owner.stopped)
        runs = stopped if kind == "leave" else ()
        record = records.Goodbye(kind, desk.state.incarnation, desk.identity.boot_id, runs)
        guards = self.store.same(key)
        deletes: tuple[str, ...] = ()
        if desk.is_leading():
            guards, deletes = guards + self.store.leading(), ("leader",)
        self.store.write(("goodbye",), guards, [(key, record)], deletes)

    def written(self, token: tuple[str, ...], succeeded: bool) -> None:
        """The goodbye is in the store: go."""
        if token == ("goodbye",) and succeeded:
            said = self.desk.view.record(f"goodbyes/{self.desk.name}", records.Goodbye)
            is_leave = said is not None and said.kind == "leave"
            name = EventName.NODE_LEFT if is_leave else EventName.NODE_RESTARTING
            self.desk.note(name, node=self.desk.name)
            self._exit("left the cluster" if is_leave else "restart announced")

    def _exit(self, reason: str) -> None:
        self.is_gone = True
        self.desk.is_leaving_process = True
        self.shutdown_at = self.desk.now
        if self.desk.lease is not None:
            self.desk.act(effects.RevokeSession(self.desk.lease))
        self.desk.act(effects.Exit(reason))

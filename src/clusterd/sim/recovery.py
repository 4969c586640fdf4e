"""``clusterctl store recover`` in the simulated world: the same plan and the same script as the shell runs.

All of it happens at one instant; the steps of the script are the test's to take, so that it can be
interrupted anywhere, or raced by another.
"""

import attrs

from clusterd.core.effects import ReadStore
from clusterd.core.events import StoreSnapshot, StoreWritten
from clusterd.core.rebuilding import Script, rebuild
from clusterd.core.recovery import Evidence, Plan, Request, newest_picture, plan
from clusterd.core.vm_fate import LeaseSeen
from clusterd.sim.world import World
from daemonkit.errors import InvariantBroken


def evidence_of(world: World, asked: str) -> Evidence:
    """What the node ``asked`` finds out: of every clusterd that it reaches, of diskd and of the store."""
    own = world.hosts[asked].core
    if own is None:
        raise InvariantBroken(f"the simulated clusterd of {asked} does not run")
    cores = {
        host.name: host.core
        for host in world.hosts.values()
        if host.core is not None and host.paused_at is None and world.network.is_open(asked, host.name)
    }
    is_seen = world.storage.is_up and (world.storage.per_host or world.network.is_open(asked, "diskd"))
    leases = tuple(
        LeaseSeen("main", name, image.epoch, image.holder)
        for name, image in sorted(world.storage.images.items())
    )
    revision, entries = world.store.read(world.now)
    return Evidence(
        asked,
        own.store_marks(),
        {name: core.testimony() for name, core in cores.items()},
        {name: "it does not answer" for name in world.names if name not in cores},
        newest_picture(core.picture() for core in cores.values()),
        leases if is_seen else (),
        {} if is_seen else {"main": "it does not answer"},
        own.desk.view.prefix,
        revision,
        entries,
    )


@attrs.define
class Recovery:
    """One recovery, asked of one node. ``drawn``: the token, which the shell draws at random.
    ``answer``: to the script's last step."""

    world: World
    asked: str
    request: Request
    drawn: str = "drawn at random"
    answer: StoreSnapshot | StoreWritten | None = None

    def planned(self) -> Plan:
        """Raises Refused."""
        return plan(evidence_of(self.world, self.asked), self.request)

    def script(self) -> Script:
        """Raises Refused."""
        self.answer = None
        evidence = evidence_of(self.world, self.asked)
        made = plan(evidence, self.request)
        return rebuild(made, evidence.prefix, evidence.entries, self.asked, self.drawn)

    def run(self, script: Script | None = None, *, steps: int = 1 << 30) -> bool:
        """Take at most so many steps; whether it is complete. Raises Refused."""
        world, store = self.world, self.world.store
        if script is None:
            script = self.script()
        for _ in range(steps):
            try:
                effect = next(script) if self.answer is None else script.send(self.answer)
            except StopIteration:
                return True
            if isinstance(effect, ReadStore):
                self.answer = StoreSnapshot(effect.request, *store.read(world.now))
            else:
                done = store.transact(effect.compares, effect.puts, effect.deletes, world.now)
                self.answer = StoreWritten(effect.request, done, store.revision)
        return False

"""Random faults from a seed: a safety phase in which anything may break, then everything is healed and the
cluster must come to rest (L1). The invariants are asserted throughout.

    safety    faults and operators' commands at random moments
    liveness  all links healed, all processes started; after the longest delay of the properties every VM
              must be online, offline, failed or held, with exactly the process that its state promises,
              and no node quarantined any more
"""

import random
from collections.abc import Callable
from typing import Any, Final

import attrs

from clusterd.core import commands as c
from clusterd.core import effects, events
from clusterd.core.types import VmState
from clusterd.sim.run import apply_fault, vm_config
from clusterd.sim.scenario import Do, ScenarioVm, choose_status, lab_properties
from clusterd.sim.world import Host, World
from daemonkit.errors import InvariantBroken
from daemonkit.units import MILLISECOND, SECOND

PROPERTIES: Final = {
    "heartbeat_interval": "200ms",
    "heartbeat_threshold": "5",
    "resiliency_period": "4s",
    "quarantine_threshold": "3",
    "quarantine_window": "60s",
    "quarantine_duration": "10s",
    "restart_grace": "5s",
}
SETTLE_NS: Final = 60 * SECOND
CRASH_POINTS: Final = (
    effects.Persist,
    effects.WriteStore,
    effects.AcquireLeases,
    effects.SpawnRun,
    effects.StopRun,
    effects.GrantSession,
)
RESTING: Final = (VmState.ONLINE.value, VmState.OFFLINE.value, VmState.FAILED.value, VmState.HELD.value)


@attrs.frozen
class ChaosResult:
    seed: int
    failures: list[str]
    trace: list[str]
    noted: frozenset[str]


def _vms(randomness: random.Random, names: list[str]) -> list[ScenarioVm]:
    kinds = [(1, False, None), (2, False, "0"), (0, True, None), (0, False, None), (1, False, "-1")]
    vms = []
    for number in range(randomness.randint(2, 5)):
        disks, stateless, period = randomness.choice(kinds)
        on = randomness.choice(names)
        vms.append(ScenarioVm(f"vm{number}", on, "64MiB", disks, stateless, number % 2, period))
    return vms


@attrs.define
class Chaos:
    world: World
    randomness: random.Random
    vms: list[ScenarioVm]

    def disturb(self) -> None:
        """One random thing."""
        self.randomness.choice(self._choices())()

    def _choices(self) -> list[Callable[[], None]]:
        return [
            self._isolate,
            self._isolate,
            self._mass_failure,
            self._release,
            self._cut,
            self._cut,
            self._heal,
            self._heal,
            self._kill,
            self._start_something,
            self._start_something,
            self._pause,
            self._service,
            self._kill_vm,
            self._command,
            self._command,
            self._weather,
            self._weather,
            self._crash_soon,
            self._terminate,
            self._vm_life,
            self._property,
            self._confirm_dead,
        ]

    def _fault(self, verb: str, *args: str, flags: tuple[str, ...] = ()) -> None:
        do = Do(verb, args, flags)
        self.world.note("#", str(do))
        apply_fault(self.world, do)

    def _node(self) -> str:
        return self.randomness.choice(self.world.names)

    def _isolate(self) -> None:
        self._fault("isolate", self._node(), flags=self.randomness.choice([(), (), ("--storage",)]))

    def _mass_failure(self) -> None:
        """Several at once, cut off or without power, or one after the other within an isolation time."""
        names = self.randomness.sample(self.world.names, self.randomness.randint(2, len(self.world.names)))
        verb = self.randomness.choice(["isolate", "isolate", "kill"])
        gap = self.randomness.choice([0, 0, 300 * MILLISECOND])
        for number, name in enumerate(names):
            self.world.after(number * gap, lambda n=name: self._fault(verb, n))  # type: ignore[misc] # mypy cannot infer a lambda with a default

    def _release(self) -> None:
        """An operator lets go what the brake holds, or tries to."""
        ids = ["brake", f"brake-{self._node()}", f"failover-{self.randomness.choice(self.vms).name}"]
        self._order(c.ReleaseHold(self.randomness.choice(ids)))

    def _cut(self) -> None:
        ends = self.randomness.sample([*self.world.names, "store", "diskd"], 2)
        self._fault("cut", *ends, flags=self.randomness.choice([(), ("--one-way",)]))

    def _heal(self) -> None:
        self._fault("heal")

    def _kill(self) -> None:
        name = self._node()
        self._fault("kill", self.randomness.choice([name, f"{name}.clusterd", f"{name}.clusterd"]))

    def _start_something(self) -> None:
        for service in ("store", "diskd"):
            self._fault("start", service)
        self._fault("start", self._node())

    def _pause(self) -> None:
        host = self.world.hosts[self._node()]
        if host.paused_at is not None:
            self._fault("resume", host.name)
        elif host.core is not None:
            self._fault("pause", host.name)
            stalled = int(self.randomness.random() * 3 * SECOND)
            self.world.after(stalled, lambda: self.world.resume(host))

    def _service(self) -> None:
        self._fault("kill", self.randomness.choice(["store", "diskd"]))

    def _weather(self) -> None:
        """A link that loses or delays: questions, answers and heartbeats alike."""
        a, b = self.randomness.sample([*self.world.names, "store", "diskd"], 2)
        if self.randomness.random() < 0.5:
            self._fault("loss", a, b, self.randomness.choice(["0.2", "0.5"]))
        else:
            self._fault("delay", a, b, self.randomness.choice(["20ms", "150ms", "600ms"]))

    def _crash_soon(self) -> None:
        """A clusterd dies between two effects of one Ready: the first of this kind that it meets."""
        victim, kind = self._node(), self.randomness.choice(CRASH_POINTS)
        before = self.randomness.random() < 0.5

        def dies(host: Host, effect: object) -> bool:
            if host.name != victim or not isinstance(effect, kind):
                return False
            self.world.cut_after = None
            if not before:
                self.world.carrier.carry(host, effect)
            self.world.note("#", f"{victim}.clusterd dies {'before' if before else 'after'} {kind.__name__}")
            return True

        self.world.cut_after = dies

    def _terminate(self) -> None:
        """SIGTERM, and a start some time later."""
        host = self.world.hosts[self._node()]
        self.world.note("#", f"terminate {host.name}.clusterd")
        self.world.deliver(host, events.ShutdownRequested(), host.generation)
        self.world.after(int(self.randomness.random() * 8 * SECOND), lambda: self.world.start(host))

    def _order(self, command: c.Command) -> None:
        self.world.note("#", repr(command))
        self.world.command(self._node(), command)

    def _vm_life(self) -> None:
        """VMs come and go, also on the images of others, which must be refused."""
        vm = self.randomness.choice(self.vms)
        config = attrs.evolve(vm_config(vm), name=self.randomness.choice([vm.name, "late"]))
        orders: list[c.Command] = [c.RemoveVm(vm.name), c.AddVm(config), c.AddVm(config, replace=True)]
        self._order(self.randomness.choice(orders))

    def _property(self) -> None:
        changes = [
            ("heartbeat_interval", "100ms"),
            ("heartbeat_interval", "200ms"),
            ("heartbeat_interval", "400ms"),
            ("resiliency_period", "1s"),
            ("resiliency_period", "6s"),
            ("resiliency_level", "off"),
            ("resiliency_level", "uncertain"),
            ("resiliency_level", "always"),
            ("isolation_response", "stop"),
            ("isolation_response", "leave"),
            ("store_session", "4s"),
            ("mass_failure_brake", "0.3"),
            ("mass_failure_brake", "0.5"),
            ("mass_failure_brake", "1"),
            ("mass_failure_hold", "3s"),
            ("mass_failure_hold", "never"),
        ]
        self._order(c.SetProperty(*self.randomness.choice(changes)))

    def _confirm_dead(self) -> None:
        """Operators speak the truth: only of a host whose power is off."""
        dead = [host.name for host in self.world.hosts.values() if not host.is_up]
        if dead:
            self._order(c.ConfirmDead(self.randomness.choice(dead)))

    def _kill_vm(self) -> None:
        for host in self.world.hosts.values():
            for process in list(host.hypervisor.processes.values())[:1]:
                if self.randomness.random() < 0.5:
                    self.world.note("#", f"kill {host.name}.{process.vm}")
                    self.world.end_process(host, process, 1, "killed")

    def _command(self) -> None:
        vm, node = self.randomness.choice(self.vms).name, self._node()
        choices: list[c.Command] = [
            c.StopVm(vm),
            c.StartVm(vm),
            c.StartVm(vm),
            c.MoveVm(vm, node),
            c.FailoverVm(vm),
            c.PauseNode(node),
            c.PauseNode(node, drain=True),
            c.ResumeNode(node),
            c.ResumeNode(node),
            c.ClearQuarantine(node),
            c.LeaveNode(node),
        ]
        self._order(self.randomness.choice(choices))

    # -- coming to rest

    def mend(self) -> None:
        """Faults stop: every link, service and host works again."""
        self.world.cut_after = None
        self._fault("heal")
        for service in ("store", "diskd"):
            self._fault("start", service)
        for host in self.world.hosts.values():
            self.world.resume(host)
            self.world.power_on(host)

    def unrest(self) -> list[str]:
        """What has not come to rest, in words."""
        world = self.world
        for host in world.hosts.values():
            self.world.power_on(host)  # one that left meanwhile, as an operator told it, is started again
        status = choose_status(world.statuses())
        if status is None or len(world.statuses()) < len(world.names):
            return ["a clusterd does not answer"]
        found = [f"{name} is {n['state']}" for name, n in status["nodes"].items() if not self._is_well(n)]
        if status["leader"] is None:
            found.append("there is no leader")
        found += [
            f"{item['id']} is held: {item['why']}" for item in status["held"] if item["kind"] == "brake"
        ]
        for vm, entry in status["vms"].items():
            live = world.processes_of(vm)
            where = [(host.name, process.epoch) for host, process in live]
            if entry["state"] not in RESTING:
                found.append(f"{vm} is {entry['state']}: {entry['reason']}")
            elif entry["state"] == "online" and where != [(entry["owner"], entry["epoch"])]:
                found.append(f"{vm} is shown online as {entry['owner']}@{entry['epoch']}, but runs {where}")
            elif entry["state"] != "online" and where:
                found.append(f"{vm} is shown {entry['state']}, but runs {where}")
            elif entry["state"] == "held" and not entry["reason"]:
                found.append(f"{vm} is held without a reason")
        return found

    def _is_well(self, node: dict[str, Any]) -> bool:
        return node["state"] in ("up", "paused")


def run_chaos(seed: int, seconds: int = 40, *, per_host: bool = False) -> ChaosResult:
    """One seed: safety, then liveness. ``per_host``: every host has a diskd of its own."""
    randomness = random.Random(seed)
    names = [f"n{number}" for number in range(1, randomness.randint(2, 5) + 1)]
    world = World(names, seed=seed)
    world.write_interval_ns = 500 * MILLISECOND
    world.storage.per_host = per_host
    chaos = Chaos(world, randomness, _vms(randomness, names))
    failures: list[str] = []
    try:
        world.set_properties(lab_properties(PROPERTIES))
        world.start_all()
        world.run_for(3 * SECOND)
        for vm in chaos.vms:
            world.command(names[0], c.AddVm(vm_config(vm)))
        world.run_for(2 * SECOND)
        while world.now < seconds * SECOND:
            chaos.disturb()
            world.run_for(int(randomness.random() * 3 * SECOND))
        chaos.mend()
        if not world.run_while(lambda: bool(chaos.unrest()), world.now + SETTLE_NS, SECOND):
            failures += [f"L1: {text}" for text in chaos.unrest()]
        for image in sorted(world.storage.images):
            report = world.storage.report(image, world.acknowledged.get(image, 0))
            if report.overlaps or report.lost:
                failures.append(
                    f"S1: overlaps {report.overlaps}, lost {report.lost} in the journal of {image}"
                )
    except InvariantBroken as error:
        failures.append(str(error))
    return ChaosResult(seed, failures, world.trace, frozenset(world.noted))

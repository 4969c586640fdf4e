"""Runs a scenario in the simulated world: ``clusterd simulate``.

The trace is exact: equal file and seed give equal lines. Failures are expectations that did not come true
in time, broken invariants, and journals with overlaps; an empty list means that the scenario passed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import attrs

from clusterd.core.commands import AddVm, ReleaseHold
from clusterd.core.types import Disk, VmConfig
from clusterd.errors import Refused
from clusterd.sim.scenario import (
    Do,
    Expect,
    Scenario,
    ScenarioVm,
    Wait,
    choose_status,
    lab_properties,
    parse_scenario,
)
from clusterd.sim.trace import line
from clusterd.sim.world import World
from daemonkit.errors import InvariantBroken
from daemonkit.units import MILLISECOND, SECOND, format_duration, parse_duration

SETTLE_NS: Final = 60 * SECOND
POLL_NS: Final = 50 * MILLISECOND


@attrs.frozen
class SimulationResult:
    """``trace`` are the lines, ``failures`` what went wrong, ``virtual_ns`` how long it took in there."""

    name: str
    seed: int
    trace: list[str]
    failures: list[str]
    virtual_ns: int
    steps: int
    noted: frozenset[str]


@attrs.define
class ScenarioRun:
    scenario: Scenario
    world: World
    first_runs: dict[str, tuple[Any, Any]] = attrs.field(factory=dict)
    failures: list[str] = attrs.field(factory=list)

    def run(self) -> None:
        """The whole scenario; stops at the first failure."""
        try:
            if self._bring_up():
                for step in self.scenario.steps:
                    if not self._step(step):
                        return
                self._check_journals()
        except InvariantBroken as error:
            self.failures.append(f"invariant broken: {error}")

    def _say(self, text: str) -> None:
        self.world.trace.append(line(self.world.now, "#", text))

    def _status(self) -> dict[str, Any] | None:
        status = choose_status(self.world.statuses())
        for vm, entry in (status or {"vms": {}})["vms"].items():
            if entry["state"] == "online" and entry["pid"] is not None:
                self.first_runs.setdefault(vm, (entry["epoch"], entry["pid"]))
        return status

    def _bring_up(self) -> bool:
        """As ``lab up`` and ``lab guest add``: every node up, then every VM online."""
        world, scenario = self.world, self.scenario
        world.set_properties(lab_properties(scenario.properties))
        world.start_all()
        if not self._wait_for("every node is up", self._all_up):
            return False
        for vm in scenario.vms:
            world.command("n1", AddVm(vm_config(vm)))
        if not self._wait_for("every VM is online", self._all_online):
            return False
        self._say("ready")
        return True

    def _all_up(self) -> bool:
        documents = self.world.statuses()
        return all(
            name in documents
            and documents[name]["leader"] is not None
            and documents[name]["nodes"].get(other, {}).get("state") == "up"
            for name in self.scenario.node_names
            for other in self.scenario.node_names
        )

    def _all_online(self) -> bool:
        status = self._status()
        wanted = {vm.name for vm in self.scenario.vms}
        return (
            status is not None
            and {vm for vm, entry in status["vms"].items() if entry["state"] == "online"} >= wanted
        )

    def _wait_for(self, what: str, condition: Callable[[], bool]) -> bool:
        limit = self.world.now + SETTLE_NS
        if self.world.run_while(lambda: not condition(), limit, POLL_NS):
            return True
        self.failures.append(f"within {format_duration(SETTLE_NS)} it did not come true that {what}")
        return False

    def _release(self, hold_id: str) -> bool:
        """As an operator, at the node to believe; a refusal is a failure of the scenario."""
        status = self._status()
        if status is None:
            self.failures.append(f"release {hold_id}: no node answers")
            return False
        ticket = self.world.command(status["answered_by"], ReleaseHold(hold_id))
        answers = self.world.answers
        self.world.run_while(lambda: ticket not in answers, self.world.now + SETTLE_NS)
        if ticket not in answers or not answers[ticket].accepted:
            self.failures.append(f"release {hold_id}: {answers.get(ticket)}")
            return False
        return True

    def _step(self, step: Do | Wait | Expect) -> bool:
        world = self.world
        if isinstance(step, Do):
            self._say(str(step))
            if step.verb != "release":
                apply_fault(world, step)
            elif not self._release(step.args[0]):
                return False
        elif isinstance(step, Wait):
            end = world.now + step.duration_ns
            while world.now < end:
                world.run_until(min(end, world.now + POLL_NS))
                self._status()
        else:
            return self._expect(step)
        return True

    def _expect(self, step: Expect) -> bool:
        world, text = self.world, step.expectation.text

        def is_so() -> bool:
            status = self._status()
            return status is not None and step.expectation.holds(status, self.first_runs)

        if not world.run_while(lambda: not is_so(), world.now + step.within_ns, POLL_NS):
            self.failures.append(f"expected within {format_duration(step.within_ns)}: {text}")
            return False
        end = world.now + step.holds_ns
        while world.now < end:
            world.run_until(min(end, world.now + POLL_NS))
            if not is_so():
                self.failures.append(f"expected for {format_duration(step.holds_ns)}: {text}")
                return False
        self._say(f"expected: {text}")
        return True

    def _check_journals(self) -> None:
        for image in sorted(self.world.storage.images):
            report = self.world.storage.report(image, self.world.acknowledged.get(image, 0))
            gap = report.longest_gap_ns // MILLISECOND / 1000
            owners = ",".join(f"{epoch}:{node}" for epoch, node in report.owners)
            counts = f"overlaps {report.overlaps}, lost {report.lost}"
            self._say(f"journal {image}: {counts}, longest gap {gap:.3f}s, owners {owners}")
            if report.overlaps or report.lost:
                self.failures.append(f"journal {image}: {counts}")


def vm_config(vm: ScenarioVm) -> VmConfig:
    """A scenario's VM as the cluster knows it: a journal guest with its own images."""
    images = [vm.name if number == 1 else f"{vm.name}-{number}" for number in range(1, vm.disks + 1)]
    return VmConfig(
        vm.name,
        argv=("guest",),
        memory_bytes=vm.memory_bytes,
        priority=vm.priority,
        preferred_nodes=(vm.on,) if vm.on else (),
        resiliency_period_ns=vm.resiliency_period_ns,
        stateless=vm.stateless,
        disks=tuple(Disk(f"disk{number}", image) for number, image in enumerate(images, 1)),
    )


def apply_fault(world: World, do: Do) -> None:
    """One verb of ``lab``, in the simulated world."""
    network, args = world.network, do.args
    if do.verb == "isolate":
        others = [name for name in world.names if name != args[0]] + ["store"]
        for end in others + (["diskd"] if do.flags else []):
            network.cut(args[0], end)
    elif do.verb == "cut":
        network.cut(args[0], args[1], one_way=bool(do.flags))
    elif do.verb == "loss":
        network.loss[args[0], args[1]] = network.loss[args[1], args[0]] = float(args[2])
    elif do.verb == "delay":
        extra = parse_duration(args[2])
        network.extra[args[0], args[1]] = network.extra[args[1], args[0]] = extra
    elif do.verb == "heal":
        network.heal(*args)
    elif do.verb in ("kill", "start", "pause", "resume"):
        _apply_to_process(world, do.verb, args[0])
    # A reset ends connections, which are reopened at once: simulated requests have none.


def _apply_to_process(world: World, verb: str, name: str) -> None:
    node, _, process = name.partition(".")
    if node in ("store", "diskd"):
        service = world.store if node == "store" else world.storage
        service.is_up = verb in ("start", "resume")
        if node == "store" and verb == "start":
            world.store.restart(world.now)
        return
    host = world.hosts[node]
    if process not in ("", "clusterd"):
        found = host.hypervisor.processes.get(process)
        if found is None:
            raise Refused(f"{name} does not run")
        if verb == "kill":
            world.end_process(host, found, None, "killed")
        else:
            found.is_paused = verb == "pause"
    elif verb == "kill":
        if process:
            world.kill_clusterd(host)
        else:
            world.power_off(host)
    elif verb == "start":
        if process:
            world.start(host)
        else:
            world.power_on(host)
    elif verb == "pause":
        world.pause(host, processes=not process)
    else:
        world.resume(host)


def load_scenario(path: Path) -> Scenario:
    """The scenario of ``scenarios/NAME`` or of a scenario file. Raises OperatorError."""
    file = path / "scenario.toml" if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise Refused(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Refused(f"{file}: not a TOML file: {error}") from error
    return parse_scenario(text, str(file))


def simulate(path: Path, seed: int | None = None) -> SimulationResult:
    """Run ``scenarios/NAME`` with its own seed or another. Raises OperatorError for a bad file; what goes
    wrong in the run is in ``failures``."""
    scenario = load_scenario(path)
    world = World(scenario.node_names, seed=scenario.seed if seed is None else seed)
    run = ScenarioRun(scenario, world)
    run.run()
    return SimulationResult(
        scenario.name, world.seed, world.trace, run.failures, world.now, world.steps, frozenset(world.noted)
    )


def expected_trace(path: Path) -> list[str] | None:
    """The lines of ``expect.trace``, None where there is none."""
    file = path / "expect.trace"
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else None


def rewrite(path: Path) -> SimulationResult:
    """Run with the scenario's own seed and write ``expect.trace`` (``--rewrite``). Only commit the changes
    if you understand what caused them. Nothing is written if the scenario failed."""
    result = simulate(path)
    if not result.failures:
        (path / "expect.trace").write_text("\n".join(result.trace) + "\n", encoding="utf-8")
    return result

"""A scenario on real processes: the same file that the simulator runs, with deadlines instead of a trace.

Steps run one after the other. ``do`` is a verb of the lab, ``wait`` lets time pass, ``expect`` must become
true within its deadline, and stay so for as long as it says; what a line means is decided by
``clusterd.sim.scenario``, for both runners. At the end the invariants are checked on every VM that keeps
a journal: nothing acknowledged is lost, no two owners wrote at once.
"""

import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from clusterd.sim.scenario import (
    DEFAULTS,
    Do,
    Expect,
    Scenario,
    ScenarioVm,
    Step,
    Wait,
    choose_status,
    lab_properties,
    parse_scenario,
)
from daemonkit.durable import read_small_file
from daemonkit.errors import OperatorError
from daemonkit.units import MiB, parse_duration, to_seconds
from holdfast.lab.cluster import LAB_PROPERTIES, Lab, UpOptions, bring_up
from holdfast.lab.guests import GuestOptions, add_guest, check_guest
from holdfast.lab.links import LinkChange, both_ways

POLL_SECONDS: Final = 0.05
GUEST_DISK_BYTES: Final = 16 * MiB
Say = Callable[[str], None]
Status = dict[str, Any]


class ScenarioFailed(OperatorError):
    """An expectation did not come true, or an invariant is broken."""


def read_scenario(path: Path) -> Scenario:
    """``path``: a scenario's directory, or its scenario.toml. Raises OperatorError, one line."""
    file = path / "scenario.toml" if path.is_dir() else path
    try:
        text = read_small_file(file).decode()
    except UnicodeDecodeError as error:
        raise OperatorError(f"{file}: not a TOML file: {error}") from error
    scenario = parse_scenario(text, where=str(file))
    for vm in scenario.vms:
        if not vm.disks:
            raise OperatorError(f"{file}: vm {vm.name}: VMs without disks are played by the simulator only")
    return scenario


async def perform(lab: Lab, do: Do) -> None:
    """One ``do`` of a scenario."""
    first, second, third = (*do.args, "", "", "")[:3]
    if do.verb == "isolate":
        await lab.isolate(first, storage="--storage" in do.flags)
    elif do.verb == "cut":
        await lab.cut(first, second, one_way="--one-way" in do.flags)
    elif do.verb == "delay":
        await lab.change_links(LinkChange(both_ways(first, second), delay_ns=parse_duration(third)))
    elif do.verb == "loss":
        await lab.change_links(LinkChange(both_ways(first, second), loss=float(third)))
    elif do.verb == "reset":
        await lab.reset(first, second)
    elif do.verb == "heal":
        await lab.heal(first or None, second or None)
    elif do.verb == "release":
        await lab.release_hold(first)
    else:
        verbs: dict[str, Callable[[str], Awaitable[None]]] = {
            "kill": lab.kill,
            "start": lab.start,
            "pause": lab.pause,
            "resume": lab.resume,
        }
        await verbs[do.verb](first)


@attrs.define
class Runner:
    """The lab of one scenario, and what was seen of it so far."""

    lab: Lab
    say: Say
    begun: float
    first_runs: dict[str, tuple[Any, Any]] = attrs.field(factory=dict)

    def tell(self, text: str) -> None:
        """One line of the timeline."""
        self.say(f"{trio.current_time() - self.begun:7.2f} s  {text}")

    async def observe(self) -> Status | None:
        """The status to believe, noting each VM's run when it is first seen online."""
        status = choose_status({answer["answered_by"]: answer for answer in await self.lab.answers()})
        for name, vm in status["vms"].items() if status is not None else ():
            if vm["state"] == "online" and None not in (vm["epoch"], vm["pid"]):
                self.first_runs.setdefault(name, (vm["epoch"], vm["pid"]))
        return status

    async def step(self, step: Step) -> None:
        """Raises ScenarioFailed."""
        if isinstance(step, Do):
            self.tell(f"do      {step}")
            await perform(self.lab, step)
        elif isinstance(step, Wait):
            self.tell(f"wait    {to_seconds(step.duration_ns):g} s")
            await trio.sleep(to_seconds(step.duration_ns))
        else:
            await self._expect(step)

    async def _expect(self, step: Expect) -> None:
        begun = trio.current_time()
        within, holds = to_seconds(step.within_ns), to_seconds(step.holds_ns)
        while not await self._is_so(step):
            if trio.current_time() > begun + within:
                await self._fail(step, f"within {within:g} s")
            await trio.sleep(POLL_SECONDS)
        self.tell(f"expect  {step.expectation.text}: after {trio.current_time() - begun:.2f} s")
        until = trio.current_time() + holds
        while trio.current_time() < until:
            if not await self._is_so(step):
                await self._fail(step, f"for {holds:g} s")
            await trio.sleep(POLL_SECONDS)

    async def _is_so(self, step: Expect) -> bool:
        status = await self.observe()
        return status is not None and step.expectation.holds(status, self.first_runs)

    async def _fail(self, step: Expect, when: str) -> None:
        status = await self.observe()
        instead = "no node answers" if status is None else _describe(step, status)
        raise ScenarioFailed(f"expected {when}: {step.expectation.text}; {instead}")

    async def check_invariants(self, vms: tuple[ScenarioVm, ...]) -> None:
        """S1 and S2, as a guest would notice their breach. Raises ScenarioFailed."""
        for vm in vms:
            verdict = await check_guest(self.lab, vm.name)
            self.tell(
                f"check   {vm.name}: {verdict.records} records, {verdict.lost} lost, "
                f"{verdict.overlaps} overlaps, longest gap {verdict.longest_gap_s:.2f} s"
            )
            if not verdict.is_good:
                broken = "; ".join(verdict.examples) or "two owners wrote at once"
                raise ScenarioFailed(
                    f"guest {vm.name}: {verdict.lost} records lost, {verdict.overlaps} overlaps: {broken}"
                )


def _describe(step: Expect, status: Status) -> str:
    """What is there instead."""
    kind, name = step.expectation.subject, step.expectation.name
    entry = status[f"{kind}s"].get(name)
    if entry is None:
        return f"{kind} {name} is not in the status"
    known = ("owner", "epoch", "pid", "reason")
    facts = ", ".join(f"{key} {entry[key]}" for key in known if entry.get(key) is not None)
    return f"{kind} {name} is {entry['state']}" + (f" ({facts})" if facts else "")


async def play(scenario: Scenario, directory: Path, *, keep: bool, say: Say) -> None:
    """Bring up a lab in ``directory``, play, check, take it down. Raises OperatorError."""
    say(f"{scenario.name}: {scenario.title}")
    properties = {name: DEFAULTS[name] for name in LAB_PROPERTIES} | lab_properties(scenario.properties)
    options = UpOptions(scenario.nodes, properties=properties, seed=scenario.seed)
    lab = await bring_up(directory, options, is_remembered=keep)
    runner = Runner(lab, say, trio.current_time())
    try:
        runner.tell(f"{scenario.nodes} nodes are up")
        for vm in scenario.vms:
            guest = GuestOptions(
                vm.on,
                GUEST_DISK_BYTES,
                memory=vm.memory,
                disks=vm.disks,
                priority=vm.priority,
                resiliency_period=vm.resiliency_period,
            )
            entry = await add_guest(lab, vm.name, guest)
            runner.tell(f"vm {vm.name} is online on {entry['owner']}, epoch {entry['epoch']}")
        await runner.observe()
        for step in scenario.steps:
            await runner.step(step)
        await runner.check_invariants(scenario.vms)
    finally:
        if not keep:
            with trio.move_on_after(60, shield=True):
                await lab.down()
    say(f"{scenario.name}: passed")


async def run_scenario(path: Path, directory: Path | None, *, keep: bool, say: Say) -> None:
    """``lab run``: in ``directory``, or in one that is made for it and removed if all went well."""
    scenario = read_scenario(path)
    made = None
    if directory is None:
        made = directory = Path(tempfile.mkdtemp(prefix="holdfast-lab-"))
        say(f"the lab is in {directory}")
    await play(scenario, directory, keep=keep, say=say)
    if made is not None and not keep:
        shutil.rmtree(made)

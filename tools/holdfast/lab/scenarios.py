"""A scenario on real processes: the same file that the simulator runs, with deadlines instead of a trace.

Steps run one after the other. ``do`` is a verb of the lab, ``wait`` lets time pass, ``expect`` must become
true within its deadline, and stay so for as long as it says. At the end the invariants are checked on
every VM that keeps a journal: nothing acknowledged is lost, no two owners wrote at once.
"""

import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import attrs
import trio

from daemonkit.errors import OperatorError
from daemonkit.units import MiB, to_seconds
from holdfast.lab.cluster import Lab, UpOptions, bring_up
from holdfast.lab.expectations import (
    Action,
    Expectation,
    Run,
    Status,
    describe,
    is_met,
    run_of,
)
from holdfast.lab.guests import GuestOptions, add_guest, check_guest
from holdfast.lab.plans import Plan, Step, VmPlan, read_plan
from holdfast.lab.views import best

POLL_SECONDS: Final = 0.05
GUEST_DISK_BYTES: Final = 16 * MiB
Say = Callable[[str], None]


class ScenarioFailed(OperatorError):
    """An expectation did not come true, or an invariant is broken."""


async def perform(lab: Lab, action: Action) -> None:
    """One ``do`` of a scenario."""
    first, second = [*action.arguments, None, None][:2]
    if action.verb == "isolate":
        await lab.isolate(str(first), storage="--storage" in action.options)
    elif action.verb == "cut":
        await lab.cut(str(first), str(second), one_way="--one-way" in action.options)
    elif action.verb == "heal":
        await lab.heal(first, second)
    else:
        verbs: dict[str, Callable[[str], Awaitable[None]]] = {
            "kill": lab.kill,
            "start": lab.start,
            "pause": lab.pause,
            "resume": lab.resume,
        }
        await verbs[action.verb](str(first))


@attrs.define
class Runner:
    """The lab of one scenario, and what was seen of it so far."""

    lab: Lab
    say: Say
    begun: float
    first_runs: dict[str, Run] = attrs.field(factory=dict)

    def tell(self, text: str) -> None:
        """One line of the timeline."""
        self.say(f"{trio.current_time() - self.begun:7.2f} s  {text}")

    async def observe(self, *, but: str | None = None) -> Status | None:
        """The cluster's status, noting each VM's first run; ``but``: not this node's own view."""
        answers = await self.lab.answers()
        status = best(answers, but=but)
        for vm in status["vms"] if status is not None else ():
            run = run_of(status, vm) if status is not None else None
            if run is not None:
                self.first_runs.setdefault(vm, run)
        return status

    async def step(self, step: Step) -> None:
        """Raises ScenarioFailed."""
        if step.action is not None:
            words = [step.action.verb, *step.action.arguments, *step.action.options]
            self.tell(f"do      {' '.join(words)}")
            await perform(self.lab, step.action)
        elif step.wait_ns is not None:
            self.tell(f"wait    {to_seconds(step.wait_ns):g} s")
            await trio.sleep(to_seconds(step.wait_ns))
        elif step.expectation is not None:
            await self._expect(step, step.expectation)

    async def _expect(self, step: Step, expectation: Expectation) -> None:
        begun = trio.current_time()
        deadline = begun + to_seconds(step.within_ns)
        while not await self._holds(expectation):
            if trio.current_time() > deadline:
                within = f"within {to_seconds(step.within_ns):g} s"
                raise ScenarioFailed(f"expected {within}: {expectation}; {await self._instead(expectation)}")
            await trio.sleep(POLL_SECONDS)
        self.tell(f"expect  {expectation}: after {trio.current_time() - begun:.2f} s")
        until = trio.current_time() + to_seconds(step.holds_ns)
        while trio.current_time() < until:
            if not await self._holds(expectation):
                held = f"for {to_seconds(step.holds_ns):g} s"
                raise ScenarioFailed(f"expected {held}: {expectation}; {await self._instead(expectation)}")
            await trio.sleep(POLL_SECONDS)

    async def _holds(self, expectation: Expectation) -> bool:
        status = await self.observe(but=_not_asked(expectation))
        return status is not None and is_met(expectation, status, self.first_runs)

    async def _instead(self, expectation: Expectation) -> str:
        status = await self.observe(but=_not_asked(expectation))
        return "no node answers" if status is None else describe(expectation, status)

    async def check_invariants(self, vms: list[VmPlan]) -> None:
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


def _not_asked(expectation: Expectation) -> str | None:
    """A node is judged by the others: an isolated node sees everybody else isolated."""
    return expectation.name if expectation.kind == "node" else None


async def run_plan(plan: Plan, directory: Path, *, keep: bool, say: Say) -> None:
    """Bring up a lab in ``directory``, play, check, take it down. Raises OperatorError."""
    say(f"{plan.name}: {plan.title}")
    lab = await bring_up(directory, UpOptions(plan.nodes, properties=plan.properties), is_remembered=keep)
    runner = Runner(lab, say, trio.current_time())
    try:
        runner.tell(f"{plan.nodes} nodes are up")
        for vm in plan.vms:
            options = GuestOptions(vm.on, GUEST_DISK_BYTES, memory=vm.memory, disks=vm.disks)
            entry = await add_guest(lab, vm.name, options)
            runner.tell(f"vm {vm.name} is online on {entry['owner']}, epoch {entry['epoch']}")
        await runner.observe()
        for step in plan.steps:
            await runner.step(step)
        await runner.check_invariants(plan.vms)
    finally:
        if not keep:
            with trio.move_on_after(60, shield=True):
                await lab.down()
    say(f"{plan.name}: passed")


async def run_scenario(path: Path, directory: Path | None, *, keep: bool, say: Say) -> None:
    """``lab run``: in ``directory``, or in one that is made for it and removed if all went well."""
    plan = read_plan(path)
    made = None
    if directory is None:
        made = directory = Path(tempfile.mkdtemp(prefix="holdfast-lab-"))
        say(f"the lab is in {directory}")
    await run_plan(plan, directory, keep=keep, say=say)
    if made is not None and not keep:
        shutil.rmtree(made)

"""scenario.toml as the lab plays it: text into a checked plan."""

import tomllib
from pathlib import Path
from typing import Final

import attrs

from daemonkit.durable import read_small_file
from daemonkit.errors import OperatorError
from daemonkit.schema import structure
from daemonkit.units import UnitError, parse_duration
from holdfast.lab.expectations import Action, Expectation, parse_action, parse_expectation

WITHIN_NS: Final = 10_000_000_000
STEPS_MAX: Final = 1000


@attrs.frozen
class VmPlan:
    name: str
    on: str | None = None
    memory: str = "64MiB"
    disks: int = 1
    stateless: bool = False


@attrs.frozen
class Step:
    """One line of the story: exactly one of ``action``, ``wait_ns``, ``expectation``."""

    action: Action | None = None
    wait_ns: int | None = None
    expectation: Expectation | None = None
    within_ns: int = WITHIN_NS
    holds_ns: int = 0


@attrs.frozen
class Plan:
    """What the runner needs of a scenario."""

    name: str
    title: str
    nodes: int
    properties: dict[str, str]
    vms: list[VmPlan]
    steps: list[Step]


@attrs.frozen
class _StepTable:
    do: str | None = None
    wait: str | None = None
    expect: str | None = None
    within: str | None = None
    holds: str | None = None


@attrs.frozen
class _ScenarioTable:
    """scenario.toml as written; ``seed`` is the simulator's."""

    name: str
    title: str
    nodes: int
    steps: list[_StepTable]
    seed: int = 0
    properties: dict[str, str] = attrs.field(factory=dict)
    vms: list[VmPlan] = attrs.field(factory=list)


def read_plan(path: Path) -> Plan:
    """``path``: a scenario's directory, or its scenario.toml. Raises OperatorError, one line."""
    file = path / "scenario.toml" if path.is_dir() else path
    try:
        document = tomllib.loads(read_small_file(file).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OperatorError(f"{file}: not a TOML file: {error}") from error
    table = structure(_ScenarioTable, document, where=str(file))
    if len(table.steps) > STEPS_MAX:
        raise OperatorError(f"{file}: at most {STEPS_MAX} steps")
    for vm in table.vms:
        if vm.disks < 1:
            raise OperatorError(f"{file}: vm {vm.name}: a VM without disks is played by the simulator only")
    try:
        steps = [_step(number, step) for number, step in enumerate(table.steps, 1)]
    except (OperatorError, UnitError) as error:
        raise OperatorError(f"{file}: {error}") from error
    return Plan(table.name, table.title, table.nodes, table.properties, table.vms, steps)


def _step(number: int, table: _StepTable) -> Step:
    if sum(part is not None for part in (table.do, table.wait, table.expect)) != 1:
        raise OperatorError(f"step {number}: give exactly one of do, wait and expect")
    if table.expect is None and (table.within is not None or table.holds is not None):
        raise OperatorError(f"step {number}: within and holds belong to expect")
    if table.do is not None:
        return Step(action=parse_action(table.do))
    if table.wait is not None:
        return Step(wait_ns=parse_duration(table.wait))
    return Step(
        expectation=parse_expectation(table.expect or ""),
        within_ns=WITHIN_NS if table.within is None else parse_duration(table.within),
        holds_ns=0 if table.holds is None else parse_duration(table.holds),
    )

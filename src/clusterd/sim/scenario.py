"""Scenario files: one TOML file that runs in the simulator and, by the lab, on real processes.

The file is read strictly: an unknown key, verb, state or name is an error that says where. What a step
means is fixed here, and so is whether an expectation holds for a status document, so that both runners
agree.
"""

import tomllib
from typing import Any, Final

import attrs

from clusterd.core.properties import DEFAULTS, parse_properties
from clusterd.core.status_choice import choose_status
from clusterd.core.types import NAME_PATTERN, NODES_MAX, Admission, Liveness, VmState
from clusterd.errors import Refused
from daemonkit.schema import structure
from daemonkit.units import SECOND, UnitError, format_duration, parse_duration, parse_size

STEPS_MAX: Final = 1000
VERBS: Final[dict[str, tuple[int, int, tuple[str, ...]]]] = {  # least and most words, flags
    "isolate": (1, 1, ("--storage",)),
    "cut": (2, 2, ("--one-way",)),
    "delay": (3, 3, ()),
    "loss": (3, 3, ()),
    "reset": (2, 2, ()),
    "heal": (0, 2, ()),
    "kill": (1, 1, ()),
    "start": (1, 1, ()),
    "pause": (1, 1, ()),
    "resume": (1, 1, ()),
    "release": (1, 1, ()),  # what an operator does: clusterctl hold release ID
}
SERVICES: Final = ("store", "diskd")
NODE_STATES: Final = frozenset(state.value for state in (*Liveness, *Admission)) - {"normal"}
VM_STATES: Final = frozenset(state.value for state in VmState)
RUN_WORDS: Final = ("same-run", "new-run")


@attrs.frozen
class ScenarioVm:
    """``disks``: how many; 0 needs ``stateless`` or is fenced by nothing."""

    name: str
    on: str | None = None
    memory: str = "64MiB"
    disks: int = 1
    stateless: bool = False
    priority: int = 0
    resiliency_period: str | None = None

    @property
    def memory_bytes(self) -> int:
        return parse_size(self.memory)

    @property
    def resiliency_period_ns(self) -> int | None:
        text = self.resiliency_period
        if text is None:
            return None
        return -1 if text == "-1" else (0 if text == "0" else parse_duration(text))


@attrs.frozen
class Expectation:
    """``subject`` node or vm; ``word`` a state, or same-run / new-run; ``on``: the owner it must have."""

    text: str
    subject: str
    name: str
    word: str
    on: str | None = None

    def holds(self, status: dict[str, Any], first_runs: dict[str, tuple[Any, Any]]) -> bool:
        """Whether it is so in a status document. ``first_runs``: (epoch, pid) of each VM when it was first
        seen online."""
        entry = status["nodes" if self.subject == "node" else "vms"].get(self.name)
        if entry is None:
            return False
        if self.word in RUN_WORDS:
            run, first = (entry["epoch"], entry["pid"]), first_runs.get(self.name)
            if first is None or None in run:
                return False
            return (run == first) == (self.word == "same-run")
        return entry["state"] == self.word and self.on in (None, entry.get("owner"))


@attrs.frozen
class Do:
    """A fault or its end: a verb of ``lab`` with its arguments; or ``release``, of ``clusterctl hold``."""

    verb: str
    args: tuple[str, ...]
    flags: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join((self.verb, *self.args, *self.flags))


@attrs.frozen
class Wait:
    duration_ns: int


@attrs.frozen
class Expect:
    """Must become true within ``within_ns``, and then stay so for ``holds_ns``."""

    expectation: Expectation
    within_ns: int
    holds_ns: int


Step = Do | Wait | Expect


@attrs.frozen
class Scenario:
    name: str
    title: str
    nodes: int
    seed: int
    properties: dict[str, str]
    vms: tuple[ScenarioVm, ...]
    steps: tuple[Step, ...]

    @property
    def node_names(self) -> list[str]:
        return [f"n{number}" for number in range(1, self.nodes + 1)]


@attrs.frozen
class _Step:
    do: str | None = None
    wait: str | None = None
    expect: str | None = None
    within: str = "0s"
    holds: str = "0s"


@attrs.frozen
class _File:
    name: str
    title: str
    nodes: int
    seed: int = 1
    properties: dict[str, str] = attrs.field(factory=dict)
    vms: tuple[ScenarioVm, ...] = ()
    steps: tuple[_Step, ...] = ()


def lab_properties(texts: dict[str, str]) -> dict[str, str]:
    """The properties of a lab cluster: as given, and a session of max(2 s, 2 x isolation time)."""
    if "store_session" in texts:
        return dict(texts)
    generous = {**texts, "store_session": "3600s"}
    isolation_ns = parse_properties(generous).isolation_ns
    session_ns = -(-max(2 * SECOND, 2 * isolation_ns) // SECOND) * SECOND
    return {**texts, "store_session": format_duration(session_ns)}


def parse_scenario(text: str, where: str = "scenario.toml") -> Scenario:
    """The scenario, checked. Raises OperatorError naming the place."""
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise Refused(f"{where}: {error}") from error
    file = structure(_File, data, where=where)
    if not 1 <= file.nodes <= NODES_MAX:
        raise Refused(f"{where}: nodes must be from 1 to {NODES_MAX}")
    if len(file.steps) > STEPS_MAX:
        raise Refused(f"{where}: more than {STEPS_MAX} steps")
    names = {f"n{number}" for number in range(1, file.nodes + 1)}
    _check_vms(file, names, where)
    parse_properties(lab_properties(file.properties))
    vms = {vm.name for vm in file.vms}
    steps = tuple(
        _step(step, names, vms, f"{where}: steps[{index}]") for index, step in enumerate(file.steps)
    )
    return Scenario(file.name, file.title, file.nodes, file.seed, dict(file.properties), file.vms, steps)


def _check_vms(file: _File, names: set[str], where: str) -> None:
    for index, vm in enumerate(file.vms):
        place = f"{where}: vms[{index}]"
        if NAME_PATTERN.fullmatch(vm.name) is None:
            raise Refused(f"{place}: {vm.name!r} is not a name")
        if vm.on is not None and vm.on not in names:
            raise Refused(f"{place}: there is no node {vm.on!r}")
        if not 0 <= vm.disks <= 16 or (vm.stateless and vm.disks):
            raise Refused(f"{place}: disks must be from 0 to 16, and 0 for a stateless VM")
        try:
            _ = vm.memory_bytes, vm.resiliency_period_ns
        except UnitError as error:
            raise Refused(f"{place}: {error}") from error
    if len({vm.name for vm in file.vms}) < len(file.vms):
        raise Refused(f"{where}: two VMs have one name")


def _step(step: _Step, nodes: set[str], vms: set[str], where: str) -> Step:
    if sum(value is not None for value in (step.do, step.wait, step.expect)) != 1:
        raise Refused(f"{where}: exactly one of do, wait and expect")
    try:
        within, holds = parse_duration(step.within), parse_duration(step.holds)
        if step.wait is not None:
            return Wait(parse_duration(step.wait))
    except UnitError as error:
        raise Refused(f"{where}: {error}") from error
    if step.expect is not None:
        return Expect(_expectation(step.expect, nodes, vms, where), within, holds)
    assert step.do is not None
    return _do(step.do, nodes, vms, where)


def _expectation(text: str, nodes: set[str], vms: set[str], where: str) -> Expectation:
    words = text.split()
    if len(words) == 3 and words[0] == "node" and words[1] in nodes and words[2] in NODE_STATES:
        return Expectation(text, "node", words[1], words[2])
    if len(words) >= 3 and words[0] == "vm" and words[1] in vms:
        if len(words) == 3 and words[2] in VM_STATES | set(RUN_WORDS):
            return Expectation(text, "vm", words[1], words[2])
        if len(words) == 5 and words[2] in VM_STATES and words[3] == "on" and words[4] in nodes:
            return Expectation(text, "vm", words[1], words[2], words[4])
    raise Refused(
        f"{where}: {text!r} is not understood: write 'node NODE STATE', 'vm VM STATE [on NODE]', "
        "'vm VM same-run' or 'vm VM new-run'"
    )


def _do(text: str, nodes: set[str], vms: set[str], where: str) -> Do:
    verb, *rest = text.split() or [""]
    if verb not in VERBS:
        raise Refused(f"{where}: unknown verb {verb!r} (known: {', '.join(VERBS)})")
    least, most, flags = VERBS[verb]
    given = tuple(word for word in rest if word.startswith("--"))
    args = tuple(word for word in rest if not word.startswith("--"))
    if not least <= len(args) <= most or not set(given) <= set(flags) or (verb == "heal" and len(args) == 1):
        raise Refused(f"{where}: {text!r}: wrong arguments for {verb}")
    ends = nodes | set(SERVICES)
    if verb in ("cut", "delay", "loss", "reset", "heal"):
        wrong = [end for end in args[:2] if end not in ends]
    elif verb == "release":
        wrong = []  # which ids there are depends on what is held then
    elif verb == "isolate":
        wrong = [end for end in args if end not in nodes]
    else:
        wrong = [name for name in args if name not in ends and not _is_process(name, nodes, vms)]
    if wrong:
        raise Refused(f"{where}: {text!r}: there is no {wrong[0]!r}")
    try:
        if verb == "delay":
            parse_duration(args[2])
        if verb == "loss" and not 0.0 <= float(args[2]) <= 1.0:
            raise Refused(f"{where}: {text!r}: a share is from 0 to 1")
    except ValueError as error:
        raise Refused(f"{where}: {text!r}: {error}") from error
    return Do(verb, args, given)


def _is_process(name: str, nodes: set[str], vms: set[str]) -> bool:
    node, dot, process = name.partition(".")
    return bool(dot) and node in nodes and (process == "clusterd" or process in vms)


__all__ = [
    "DEFAULTS",
    "Do",
    "Expect",
    "Expectation",
    "Scenario",
    "ScenarioVm",
    "Step",
    "Wait",
    "choose_status",
    "lab_properties",
    "parse_scenario",
]

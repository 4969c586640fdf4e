"""What a scenario may do and expect, on real processes: pure reading of its lines.

do       isolate NODE [--storage] | cut A B [--one-way] | heal [A B] | kill P | start P | pause P | resume P
expect   node NODE STATE
         vm NAME STATE [on NODE]         a state of DESIGN.md section 2, as the cluster shows it
         vm NAME same-run | new-run      compared with (epoch, pid) when it was first seen online
         vm NAME held                    something about it is held back, with the reason
"""

import shlex
from typing import Any, Final

import attrs

from daemonkit.errors import OperatorError

Status = dict[str, Any]
Run = tuple[int, int]

_ARGUMENTS: Final = {
    "isolate": (1, 1, frozenset({"--storage"})),
    "cut": (2, 2, frozenset({"--one-way"})),
    "heal": (0, 2, frozenset()),
    "kill": (1, 1, frozenset()),
    "start": (1, 1, frozenset()),
    "pause": (1, 1, frozenset()),
    "resume": (1, 1, frozenset()),
}


@attrs.frozen
class Action:
    """A verb of the lab, its arguments, and its options."""

    verb: str
    arguments: list[str]
    options: list[str]


@attrs.frozen
class Expectation:
    """``want`` is a state, same-run, new-run or held; ``on`` the owner that is asked for, or None."""

    kind: str
    name: str
    want: str
    on: str | None

    def __str__(self) -> str:
        return f"{self.kind} {self.name} {self.want}" + (f" on {self.on}" if self.on else "")


def parse_action(text: str) -> Action:
    """Raises OperatorError for anything that is not one of the verbs above."""
    try:
        verb, *rest = shlex.split(text)
    except ValueError:
        raise OperatorError(f"do = {text!r}: say which verb of the lab") from None
    if verb not in _ARGUMENTS:
        raise OperatorError(f"do = {text!r}: a scenario knows {', '.join(_ARGUMENTS)}")
    least, most, known = _ARGUMENTS[verb]
    options = [word for word in rest if word.startswith("--")]
    arguments = [word for word in rest if not word.startswith("--")]
    if not least <= len(arguments) <= most or not known.issuperset(options):
        raise OperatorError(
            f"do = {text!r}: {verb} takes {least} to {most} names" + "".join(f", {o}" for o in known)
        )
    return Action(verb, arguments, options)


def parse_expectation(text: str) -> Expectation:
    """Raises OperatorError."""
    words = text.split()
    if len(words) == 3 and words[0] in ("node", "vm"):
        return Expectation(words[0], words[1], words[2], None)
    if len(words) == 5 and words[0] == "vm" and words[3] == "on":
        return Expectation("vm", words[1], words[2], words[4])
    raise OperatorError(f"expect = {text!r}: write `node NAME STATE` or `vm NAME STATE [on NODE]`")


def run_of(status: Status, vm: str) -> Run | None:
    """(epoch, pid) of a VM that is seen online."""
    entry = status["vms"].get(vm)
    if entry is None or entry["state"] != "online" or entry["epoch"] is None or entry["pid"] is None:
        return None
    return entry["epoch"], entry["pid"]


def is_met(expectation: Expectation, status: Status, first_runs: dict[str, Run]) -> bool:
    """Whether the cluster's status shows what is expected. ``first_runs``: when first seen online."""
    if expectation.kind == "node":
        return bool(status["nodes"].get(expectation.name, {}).get("state") == expectation.want)
    entry = status["vms"].get(expectation.name)
    if entry is None or (expectation.on is not None and entry["owner"] != expectation.on):
        return False
    if expectation.want == "held":
        return entry["state"] == "held" or any(
            expectation.name in str(held["subject"]).split() for held in status["held"]
        )
    if expectation.want in ("same-run", "new-run"):
        run = (entry["epoch"], entry["pid"])
        first = first_runs.get(expectation.name)
        if first is None or None in run:
            return False
        return run == first if expectation.want == "same-run" else run[0] != first[0] and run[1] != first[1]
    return bool(entry["state"] == expectation.want)


def describe(expectation: Expectation, status: Status) -> str:
    """What is there instead."""
    entry = status[f"{expectation.kind}s"].get(expectation.name)
    if entry is None:
        return f"{expectation.kind} {expectation.name} is not in the status"
    facts = [
        f"{key} {entry[key]}" for key in ("owner", "epoch", "pid", "reason") if entry.get(key) is not None
    ]
    return f"{expectation.kind} {expectation.name} is {entry['state']}" + (
        f" ({', '.join(facts)})" if facts else ""
    )

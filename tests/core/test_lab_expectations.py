"""What scenarios may do and expect on real processes."""

import pytest

from daemonkit.errors import OperatorError
from holdfast.lab.expectations import (
    Action,
    Expectation,
    describe,
    is_met,
    parse_action,
    parse_expectation,
    run_of,
)

STATUS = {
    "nodes": {"n1": {"state": "isolated", "reason": "no contact"}, "n2": {"state": "up", "reason": None}},
    "vms": {
        "web": {"state": "online", "owner": "n2", "epoch": 7, "pid": 99, "reason": None},
        "db": {"state": "unmonitored", "owner": "n1", "epoch": 3, "pid": 5, "reason": "n1 is isolated"},
    },
    "held": [{"id": "h1", "kind": "failover", "subject": "db", "why": "", "ends_when": "", "since_s": 1}],
}


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("isolate n1", Action("isolate", ["n1"], [])),
        ("isolate n1 --storage", Action("isolate", ["n1"], ["--storage"])),
        ("cut n1 n2 --one-way", Action("cut", ["n1", "n2"], ["--one-way"])),
        ("heal", Action("heal", [], [])),
        ("kill n1.web", Action("kill", ["n1.web"], [])),
    ],
)
def test_lab_scenario_actions(text: str, action: Action) -> None:
    assert parse_action(text) == action


@pytest.mark.parametrize(
    "text", ["", "explode n1", "isolate", "isolate n1 n2", "cut n1", "kill x --fast", "'"]
)
def test_lab_scenario_refuses_unknown_actions(text: str) -> None:
    with pytest.raises(OperatorError, match="do ="):
        parse_action(text)


@pytest.mark.parametrize("text", ["", "node n1", "vm web online at n2", "disk d online", "node n1 up on n2"])
def test_lab_scenario_refuses_unknown_expectations(text: str) -> None:
    with pytest.raises(OperatorError, match="expect ="):
        parse_expectation(text)


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("node n1 isolated", True),
        ("node n1 up", False),
        ("node n9 up", False),
        ("vm web online", True),
        ("vm web online on n2", True),
        ("vm web online on n1", False),
        ("vm db unmonitored", True),
        ("vm db held", True),
        ("vm web held", False),
        ("vm web new-run", True),
        ("vm web same-run", False),
        ("vm db same-run", True),
        ("vm db new-run", False),
        ("vm nope online", False),
    ],
)
def test_lab_scenario_expectations(text: str, met: bool) -> None:
    first_runs = {"web": (2, 50), "db": (3, 5)}
    assert is_met(parse_expectation(text), STATUS, first_runs) is met


def test_lab_scenario_says_what_is_there_instead() -> None:
    assert run_of(STATUS, "web") == (7, 99)
    assert run_of(STATUS, "db") is None and run_of(STATUS, "nope") is None
    assert (
        describe(Expectation("node", "n1", "up", None), STATUS) == "node n1 is isolated (reason no contact)"
    )
    assert "owner n2, epoch 7" in describe(Expectation("vm", "web", "held", None), STATUS)
    assert "not in the status" in describe(Expectation("vm", "x", "held", None), STATUS)
    assert str(parse_expectation("vm web online on n2")) == "vm web online on n2"

"""Scenario files are read strictly; what an expectation means is decided here for both runners."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterd.sim.scenario import Do, Expect, Expectation, Wait, choose_status, lab_properties, parse_scenario
from daemonkit.errors import OperatorError
from daemonkit.units import SECOND

HEAD = 'name = "x"\ntitle = "t"\nnodes = 3\n[[vms]]\nname = "web"\non = "n1"\n'


def step(line: str) -> str:
    return f"{HEAD}[[steps]]\n{line}\n"


def test_every_kind_of_step_is_read() -> None:
    text = HEAD + "".join(
        f"[[steps]]\n{line}\n"
        for line in (
            'do = "isolate n1 --storage"',
            'do = "cut n1 n2 --one-way"',
            'do = "loss n1 n2 0.2"',
            'do = "delay n1 store 20ms"',
            'do = "heal"',
            'do = "kill n1.web"',
            'wait = "1500ms"',
            'expect = "vm web online on n2"\nwithin = "4s"\nholds = "2s"',
            'expect = "vm web same-run"',
            'expect = "node n3 quarantined"',
            'do = "release brake-n3"',
        )
    )
    scenario = parse_scenario(text)
    assert scenario.node_names == ["n1", "n2", "n3"]
    assert scenario.steps[0] == Do("isolate", ("n1",), ("--storage",))
    assert scenario.steps[6] == Wait(1_500_000_000)
    assert scenario.steps[10] == Do("release", ("brake-n3",))
    expect = scenario.steps[7]
    assert isinstance(expect, Expect)
    assert (expect.within_ns, expect.holds_ns) == (4 * SECOND, 2 * SECOND)
    assert (expect.expectation.word, expect.expectation.on) == ("online", "n2")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nodes = 3", "'name' is missing"),
        (HEAD.replace("title", "titel"), "did you mean 'title'"),
        (HEAD.replace("nodes = 3", "nodes = 65"), "from 1 to 64"),
        (HEAD.replace('on = "n1"', 'on = "n4"'), "no node 'n4'"),
        (HEAD + 'memory = "lots"', "not a size"),
        (step('do = "explode n1"'), "unknown verb 'explode'"),
        (step('do = "isolate n9"'), "no 'n9'"),
        (step('do = "isolate n1 --hard"'), "wrong arguments"),
        (step('do = "cut n1"'), "wrong arguments"),
        (step('do = "loss n1 n2 2"'), "from 0 to 1"),
        (step('do = "kill n1.db"'), "no 'n1.db'"),
        (step('do = "heal n1"'), "wrong arguments"),
        (step('wait = "5"'), "write it like"),
        (step('wait = "1s"\ndo = "heal"'), "exactly one"),
        (step("within = '1s'"), "exactly one"),
        (step('expect = "node n1 happy"'), "not understood"),
        (step('expect = "vm db online"'), "not understood"),
        (HEAD.replace("[[vms]]", '[properties]\nheartbeat = "1s"\n[[vms]]'), "unknown property"),
        ("name = ", "Invalid value"),
    ],
)
def test_mistakes_are_named_with_their_place(text: str, reason: str) -> None:
    with pytest.raises(OperatorError, match=reason):
        parse_scenario(text)


@given(st.text(max_size=200))
def test_any_text_raises_only_our_error(text: str) -> None:
    with pytest.raises(OperatorError):
        parse_scenario(text)


def test_sessions_of_a_lab_follow_its_isolation_time() -> None:
    assert lab_properties({})["store_session"] == "20s"
    assert lab_properties({"heartbeat_interval": "200ms"})["store_session"] == "4s"
    assert lab_properties({"heartbeat_interval": "50ms"})["store_session"] == "2s"
    assert lab_properties({"store_session": "9s"}) == {"store_session": "9s"}


def test_expectations_are_judged_on_a_status_document() -> None:
    status = {
        "nodes": {"n1": {"state": "up"}},
        "vms": {"web": {"state": "online", "owner": "n1", "epoch": 2, "pid": 7}},
    }
    first = {"web": (2, 7)}
    cases = [
        (("node", "n1", "up", None), True),
        (("node", "n1", "isolated", None), False),
        (("node", "n2", "up", None), False),
        (("vm", "web", "online", None), True),
        (("vm", "web", "online", "n1"), True),
        (("vm", "web", "online", "n2"), False),
        (("vm", "web", "same-run", None), True),
        (("vm", "web", "new-run", None), False),
    ]
    for (subject, name, word, on), expected in cases:
        assert Expectation("", subject, name, word, on).holds(status, first) is expected
    assert Expectation("", "vm", "web", "new-run").holds(status, {"web": (1, 7)})
    assert not Expectation("", "vm", "web", "new-run").holds(status, {})


def test_the_status_to_believe_is_of_a_node_that_is_not_isolated() -> None:
    def document(name: str, state: str, store: str) -> dict[str, object]:
        return {"answered_by": name, "store": store, "nodes": {name: {"state": state}}, "leader": "n4"}

    documents = {
        "n1": document("n1", "isolated", "unknown"),
        "n2": document("n2", "up", "unknown"),
        "n3": document("n3", "up", "ok"),
        "n4": document("n4", "up", "ok"),
    }
    for expected in ("n4", "n3", "n2", "n1"):
        chosen = choose_status(documents)
        assert chosen is not None
        assert chosen["answered_by"] == expected
        del documents[expected]
    assert choose_status({}) is None

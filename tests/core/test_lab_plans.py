"""scenario.toml as the lab reads it."""

from pathlib import Path

import pytest

from daemonkit.errors import OperatorError
from holdfast.lab.plans import read_plan

GOOD = """
name = "pulled-cable"
title = "a cable is pulled"
nodes = 3
seed = 1
[properties]
resiliency_period = "3s"
[[vms]]
name = "web"
on = "n1"
memory = "64MiB"
disks = 1
[[steps]]
do = "isolate n1"
[[steps]]
wait = "1s"
[[steps]]
expect = "vm web unmonitored"
within = "4s"
holds = "2s"
"""


def test_lab_plan_of_a_scenario(tmp_path: Path) -> None:
    (tmp_path / "scenario.toml").write_text(GOOD)
    plan = read_plan(tmp_path)
    assert plan == read_plan(tmp_path / "scenario.toml")
    assert (plan.name, plan.nodes, plan.properties) == ("pulled-cable", 3, {"resiliency_period": "3s"})
    do, wait, expect = plan.steps
    assert do.action is not None and do.action.verb == "isolate"
    assert wait.wait_ns == 1_000_000_000
    assert str(expect.expectation) == "vm web unmonitored"
    assert (expect.within_ns, expect.holds_ns) == (4_000_000_000, 2_000_000_000)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('wait = "1s"', 'wait = "1 fortnight"', "duration"),
        ('wait = "1s"', 'wait = "1s"\ndo = "heal"', "step 2: give exactly one"),
        ('wait = "1s"', 'wait = "1s"\nwithin = "1s"', "belong to expect"),
        ("isolate n1", "smash n1", "smash"),
        ("nodes = 3", "node = 3", "did you mean 'nodes'"),
        ("disks = 1", "disks = 0", "played by the simulator only"),
        ("[properties]", "[properties", "not a TOML file"),
    ],
)
def test_lab_plan_refusals(tmp_path: Path, old: str, new: str, said: str) -> None:
    (tmp_path / "scenario.toml").write_text(GOOD.replace(old, new))
    with pytest.raises(OperatorError, match=said):
        read_plan(tmp_path)

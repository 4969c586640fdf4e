"""The mass-failure brake, told in the simulated world: what it holds, for how long, and what lets go."""

from typing import Any

import pytest
from clusterd_story import Story, vm

from clusterd.core import commands as c
from clusterd.core.events import ShutdownRequested
from daemonkit.units import SECOND


def held(story: Story) -> list[str]:
    return [item["id"] for item in story.status["held"]]


def states(story: Story, *vms: str) -> list[str]:
    return [story.status["vms"][name]["state"] for name in vms]


def lose(story: Story, *nodes: str, verb: str = "kill") -> None:
    """At once; returns when whoever is left holds what they ran."""
    for node in nodes:
        story.do(f"{verb} {node}")
    story.until(lambda s: all(s["nodes"][node]["state"] in ("isolated", "down") for node in nodes))
    story.until(lambda s: {f"brake-{node}" for node in nodes} <= {item["id"] for item in s["held"]})


def with_vms(story: Story, **where: str) -> Story:
    for name, node in where.items():
        story.command(c.AddVm(vm(name, on=node)))
    for name, node in where.items():
        story.online(name, on=node)
    return story


def test_the_last_node_standing_waits_and_goes_on_by_proof_or_by_an_operators_word() -> None:
    story = with_vms(Story(), web="n2", db="n3", more="n3")
    lose(story, "n2", "n3")
    story.until(lambda s: [s["vms"][name]["state"] for name in ("web", "db", "more")] == ["held"] * 3)
    story.world.run_for(60 * SECOND)
    assert held(story) == ["brake", "brake-n2", "brake-n3", "failover-db", "failover-more", "failover-web"]
    assert not story.noted("vm.failed_over")
    story.command(c.ConfirmDead("n2"), "n1")
    story.online("web", on="n1")
    assert held(story) == ["brake", "brake-n3", "failover-db", "failover-more"]
    story.command(c.FailoverVm("db"), "n1")
    story.online("db", on="n1")
    assert states(story, "more") == ["held"]
    story.command(c.ReleaseHold("failover-more"), "n1")
    story.online("more", on="n1")
    story.do("start n2")
    story.do("start n3")
    story.until(lambda s: s["held"] == [] and all(n["state"] == "up" for n in s["nodes"].values()))
    assert [n["ungraceful_exits"] for n in story.status["nodes"].values()] == [0, 0, 0]


@pytest.mark.parametrize(("nodes", "lost"), [(2, ["n2"]), (3, ["n2"]), (5, ["n4", "n5"])])
def test_too_few_are_no_mass_failure(nodes: int, lost: list[str]) -> None:
    """One of two is one member; two of five are less than half."""
    story = with_vms(Story(nodes=nodes), web=lost[0])
    for node in lost:
        story.do(f"kill {node}")
    story.until(lambda s: s["vms"]["web"]["owner"] not in lost and s["vms"]["web"]["state"] == "online")
    assert not story.noted("brake.engaged")


def test_losses_more_than_an_isolation_time_apart_are_none_also_for_a_new_leader() -> None:
    story = with_vms(Story(nodes=5, mass_failure_brake="0.4"), web="n4", db="n5")
    story.do("kill n4")
    story.world.run_for(2 * SECOND)
    story.do("kill n5")
    story.until(lambda s: s["nodes"]["n5"]["state"] == "isolated" and s["leader"] in ("n1", "n2", "n3"))
    leader = story.status["leader"]
    host = story.world.hosts[leader]
    story.world.deliver(host, ShutdownRequested(), host.generation)  # it says goodbye: no loss
    for name in ("web", "db"):
        story.until(lambda s, n=name: s["vms"][n]["owner"] not in ("n4", "n5"), 30)
    assert not story.noted("brake.engaged")


@pytest.mark.parametrize("gap_ms", [0, 150, 700])
def test_losses_within_an_isolation_time_are_one_also_where_there_is_no_window(gap_ms: int) -> None:
    """The first is noticed before the others: its failover waits while they are silent."""
    story = with_vms(Story(nodes=4, resiliency_level="off"), web="n3", db="n4")
    leader = story.status["leader"]
    if leader in ("n3", "n4"):
        story.do(f"kill {leader}.clusterd")
        story.until(lambda s: s["leader"] in ("n1", "n2"))
        story.do(f"start {leader}.clusterd")
        story.until(lambda s: all(n["state"] == "up" for n in s["nodes"].values()))
    before = len(story.noted("vm.failed_over"))
    story.do("isolate n3")
    story.world.run_for(gap_ms * SECOND // 1000)
    story.do("isolate n4")
    story.world.run_for(20 * SECOND)
    assert states(story, "web", "db") == ["held", "held"] or gap_ms == 700
    assert states(story, "db") == ["held"]
    assert len(story.noted("vm.failed_over")) - before == (1 if states(story, "web") != ["held"] else 0)


def test_what_the_brake_holds_passes_to_the_next_leader_and_is_never_held_for_less() -> None:
    story = with_vms(Story(nodes=6, mass_failure_hold="20s"), web="n5")
    lose(story, "n4", "n5", "n6")
    begun = story.world.now
    for _ in range(2):
        story.world.run_for(3 * SECOND)
        leader = story.status["leader"]
        story.do(f"kill {leader}.clusterd")
        story.until(lambda s, old=leader: s["leader"] not in (old, None))
        story.do(f"start {leader}.clusterd")
        assert {"brake-n4", "brake-n5", "brake-n6"} <= set(held(story))
    story.until(lambda _: story.noted("vm.failed_over"), 60)
    assert 20 * SECOND <= story.world.now - begun <= 32 * SECOND
    assert "mass_failure_hold is over" in story.noted("brake.released")[-1]
    assert story.online("web")["owner"] in ("n1", "n2", "n3")
    assert held(story) == []


def test_enough_back_lets_the_others_go_but_not_before_they_had_the_time_to_be_back_too() -> None:
    story = with_vms(Story(nodes=4, quarantine_threshold="1"), web="n3", db="n4")
    lose(story, "n3", "n4", verb="isolate")
    story.until(lambda s: s["vms"]["web"]["state"] == s["vms"]["db"]["state"] == "held")
    for other in ("n1", "n2", "store"):
        story.do(f"heal n3 {other}")
    story.until(lambda s: s["nodes"]["n3"]["state"] == "up")
    assert states(story, "web", "db") == ["online", "held"]
    story.until(lambda s: s["vms"]["db"]["owner"] != "n4")
    assert "enough others are back" in story.noted("brake.released")[-1]
    story.do("heal")
    story.until(lambda s: s["nodes"]["n4"]["state"] == "up")
    story.world.run_for(3 * SECOND)
    assert [n["ungraceful_exits"] for n in story.status["nodes"].values()] == [0] * 4
    assert not story.noted("node.quarantined")


def test_no_exit_during_a_brake_counts_and_the_next_one_after_it_does() -> None:
    story = with_vms(Story(nodes=6), web="n5")
    lose(story, "n4", "n5", "n6", verb="isolate")
    story.world.run_for(3 * SECOND)
    alone = next(name for name in ("n1", "n2", "n3") if name != story.status["leader"])
    story.do(f"isolate {alone}")
    story.until(lambda s: s["nodes"][alone]["state"] == "isolated")
    story.world.run_for(SECOND)
    assert f"brake-{alone}" not in held(story)
    story.do("heal")
    everybody: Any = lambda s: all(n["state"] == "up" for n in s["nodes"].values())  # noqa: E731 # used twice
    story.until(everybody)
    story.world.run_for(3 * SECOND)
    assert [n["ungraceful_exits"] for n in story.status["nodes"].values()] == [0] * 6
    story.do(f"isolate {alone}")
    story.until(lambda s: s["nodes"][alone]["state"] == "isolated")
    story.do("heal")
    story.until(lambda s: s["nodes"][alone]["ungraceful_exits"] == 1)


def test_announced_restarts_are_no_losses_unless_the_promise_is_broken() -> None:
    story = with_vms(Story(nodes=4), web="n3", db="n4")
    for name in ("n3", "n4"):
        host = story.world.hosts[name]
        story.world.deliver(host, ShutdownRequested(), host.generation)
    story.until(lambda s: s["vms"]["web"]["state"] == s["vms"]["db"]["state"] == "unmonitored")
    story.world.run_for(4 * SECOND)
    assert held(story) == []
    story.until(lambda s: {"brake-n3", "brake-n4"} <= {item["id"] for item in s["held"]}, 10)
    story.world.run_for(20 * SECOND)
    assert states(story, "web", "db") == ["held", "held"]


def test_what_operators_do_meanwhile() -> None:
    story = with_vms(Story(nodes=4), web="n3", here="n1")
    story.command(c.AddVm(vm("never", on="n3", resiliency_period_ns=-1)))
    story.command(c.AddVm(vm("lone", on="n4", disks=())))
    story.online("never", on="n3")
    story.online("lone", on="n4")
    lose(story, "n3", "n4")
    story.until(lambda s: s["vms"]["web"]["state"] == s["vms"]["lone"]["state"] == "held")
    assert states(story, "never") == ["unmonitored"]
    story.command(c.PauseNode("n1", drain=True))
    story.online("here", on="n2")
    story.command(c.ResumeNode("n1"))
    story.command(c.PauseNode("n3", drain=True))
    story.command(c.LeaveNode("n4"))
    story.world.run_for(10 * SECOND)
    assert {"brake-n3", "brake-n4", "failover-web"} <= set(held(story))
    assert "nothing is held under 'brake-n1'" in story.refused(c.ReleaseHold("brake-n1"))
    assert "'clusterctl hold list'" in story.refused(c.ReleaseHold("x" * 200))
    refusal = story.refused(c.ReleaseHold("failover-lone"))
    assert "cannot be released by hand" in refusal
    assert "confirm-dead n4" in refusal
    assert "released already" not in story.command(c.ReleaseHold("brake"))
    assert "released already" in story.command(c.ReleaseHold("brake"))
    assert story.online("web")["owner"] in ("n1", "n2")
    assert held(story) == ["failover-lone"]  # S2 holds it still
    assert states(story, "never") == ["unmonitored"]


def test_turning_it_off_ends_it() -> None:
    story = with_vms(Story(nodes=4), web="n3")
    lose(story, "n3", "n4")
    story.until(lambda s: s["vms"]["web"]["state"] == "held")
    story.command(c.SetProperty("mass_failure_brake", "1"), "n1")
    assert story.online("web")["owner"] in ("n1", "n2")
    assert held(story) == []


def test_what_is_held_and_let_go_outlives_a_restart_of_every_clusterd() -> None:
    """They begin without knowing who is lost: until they do, nobody counts as back."""
    story = with_vms(Story(nodes=4, resiliency_period="20s"), web="n3", db="n4")
    lose(story, "n3", "n4")
    story.command(c.ReleaseHold("brake-n3"), "n1")
    story.until(lambda s: [item["id"] for item in s["held"]] == ["brake", "brake-n4"])
    for name in ("n1", "n2"):
        story.do(f"kill {name}.clusterd")
    for name in ("n1", "n2"):
        story.do(f"start {name}.clusterd")
    released = len(story.noted("brake.released"))
    for _ in range(12):
        story.world.run_for(SECOND // 2)
        if story.world.statuses().keys() >= {"n1", "n2"} and story.status["store"] == "ok":
            assert held(story) == ["brake", "brake-n4"]
    assert len(story.noted("brake.released")) == released
    assert len(story.noted("brake.engaged")) == 1
    story.online("web")
    story.until(lambda s: s["vms"]["db"]["state"] == "held")

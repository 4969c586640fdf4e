"""Stories that take an operator or a broken store, told in the simulated world."""

import attrs
import pytest
from clusterd_story import Story, vm

from clusterd.core import commands as c
from clusterd.core.effects import Put
from clusterd.core.events import ShutdownRequested
from clusterd.core.records import ClusterId, EpochCounter, encode_record
from clusterd.core.state import decode_state, encode_state
from clusterd.core.types import Disk
from daemonkit.units import SECOND, GiB


def test_the_life_of_a_vm() -> None:
    story = Story()
    assert "added" in story.command(c.AddVm(vm()))
    first = story.online(on="n1")
    assert "exists" in story.refused(c.AddVm(vm()))
    assert "belongs to VM web" in story.refused(c.AddVm(vm("web2", disks=(Disk("d", "web"),))))
    assert "not offline" in story.refused(c.RemoveVm("web"))
    assert "runs on n1 already" in story.refused(c.MoveVm("web", "n1"))
    assert "no node 'n9'" in story.refused(c.MoveVm("web", "n9"))
    assert "not unmonitored" in story.refused(c.FailoverVm("web"))
    story.command(c.MoveVm("web", "n3"))
    moved = story.online(on="n3")
    assert moved["epoch"] > first["epoch"]
    story.command(c.StopVm("web"))
    story.until(lambda s: s["vms"]["web"]["state"] == "offline")
    assert story.world.processes_of("web") == []
    story.command(c.StartVm("web"))
    story.online()
    story.command(c.StopVm("web"))
    story.until(lambda s: s["vms"]["web"]["state"] == "offline")
    story.command(c.RemoveVm("web"))
    story.until(lambda s: s["vms"] == {})
    assert "no VM 'web'" in story.refused(c.StartVm("web"))


def test_a_vm_that_keeps_failing_is_failed_until_it_is_started_by_an_operator() -> None:
    story = Story()
    story.command(c.AddVm(vm()))
    for _ in range(4):
        story.online()
        host, process = story.world.processes_of("web")[0]
        story.world.end_process(host, process, 1, "it crashed")
        story.world.run_for(SECOND)
    entry = story.until(lambda s: s["vms"]["web"]["state"] == "failed")["vms"]["web"]
    assert "it crashed (exit code 1)" in entry["reason"]
    story.command(c.StartVm("web"))
    story.online()


def test_an_announced_restart_is_no_exit_and_moves_nothing() -> None:
    story = Story()
    story.command(c.AddVm(vm()))
    first = story.online(on="n1")
    host = story.world.hosts["n1"]
    story.world.deliver(host, ShutdownRequested(), host.generation)
    story.until(lambda _: host.core is None, 3)
    assert story.noted("node.restarting")
    story.until(lambda s: s["vms"]["web"]["state"] == "unmonitored")
    story.world.run_for(4 * SECOND)
    story.do("start n1.clusterd")
    story.until(lambda s: s["nodes"]["n1"]["state"] == "up")
    again = story.online(on="n1")
    assert (again["epoch"], again["pid"]) == (first["epoch"], first["pid"])
    assert story.status["nodes"]["n1"]["ungraceful_exits"] == 0
    assert not story.noted("vm.failed_over")


def test_a_promise_to_be_back_that_is_not_kept_counts() -> None:
    story = Story()
    story.command(c.AddVm(vm()))
    story.online(on="n1")
    host = story.world.hosts["n1"]
    story.world.deliver(host, ShutdownRequested(), host.generation)
    story.until(lambda s: s["vms"]["web"]["owner"] in ("n2", "n3"), 20)
    story.do("start n1.clusterd")
    story.until(lambda s: s["nodes"]["n1"]["ungraceful_exits"] == 1)


def test_leaving_moves_the_vms_first_and_is_proof_for_them() -> None:
    story = Story()
    story.command(c.AddVm(vm()))
    story.command(c.AddVm(vm("lone", disks=())))
    story.online(on="n1")
    story.online("lone", on="n1")
    story.command(c.LeaveNode("n1"))
    story.until(lambda s: s["nodes"]["n1"]["state"] == "down")
    assert story.noted("node.left")
    assert story.online()["owner"] != "n1"
    assert story.online("lone")["owner"] != "n1"
    story.command(c.RemoveNode("n1"))
    story.until(lambda s: "n1" not in s["nodes"])
    story.do("start n1.clusterd")
    story.until(lambda s: s["nodes"].get("n1", {}).get("state") == "up")


def test_paused_nodes_keep_their_vms_and_get_no_new_ones_and_drained_ones_are_emptied() -> None:
    story = Story()
    story.command(c.AddVm(vm()))
    story.online(on="n1")
    story.command(c.PauseNode("n1"))
    story.command(c.AddVm(vm("other")))
    assert story.online("other")["owner"] != "n1"
    assert story.status["vms"]["web"]["owner"] == "n1"
    story.command(c.PauseNode("n1", drain=True))
    story.until(lambda s: s["vms"]["web"]["owner"] != "n1" and s["vms"]["web"]["state"] == "online")
    assert story.status["nodes"]["n1"]["state"] == "paused"
    story.command(c.ResumeNode("n1"))
    story.until(lambda s: s["nodes"]["n1"]["state"] == "up")


def test_what_fits_nowhere_is_held_with_the_reason() -> None:
    story = Story()
    story.command(c.AddVm(vm(memory_bytes=64 * GiB)))
    status = story.until(lambda s: s["vms"]["web"]["state"] == "held")
    assert "needs 64GiB" in status["vms"]["web"]["reason"]
    (item,) = status["held"]
    assert (item["kind"], item["subject"]) == ("start", "web")
    assert item["ends_when"]
    story.command(c.AddVm(vm(memory_bytes=GiB), replace=True))
    story.online()
    story.until(lambda s: s["held"] == [])


def test_confirmed_death_ends_the_hold_and_the_window() -> None:
    story = Story(resiliency_period="3600s")
    story.command(c.AddVm(vm("lone", disks=())))
    story.online("lone", on="n1")
    assert "in contact" in story.refused(c.ConfirmDead("n1"))
    story.do("kill n1")
    story.until(lambda s: s["vms"]["lone"]["state"] == "unmonitored")
    story.command(c.ConfirmDead("n1"))
    assert story.online("lone")["owner"] != "n1"
    assert story.noted("node.proven_dead")


def test_an_operator_ends_a_window_but_not_the_proof() -> None:
    story = Story(resiliency_period="3600s")
    story.command(c.AddVm(vm()))
    story.command(c.AddVm(vm("lone", disks=())))
    story.online(on="n1")
    story.online("lone", on="n1")
    story.do("isolate n1")
    story.until(lambda s: s["vms"]["web"]["state"] == s["vms"]["lone"]["state"] == "unmonitored")
    story.command(c.FailoverVm("web"))
    story.command(c.FailoverVm("lone"))
    assert story.online()["owner"] != "n1"
    story.until(lambda s: s["vms"]["lone"]["state"] == "held")
    story.do("heal")
    story.until(lambda s: s["nodes"]["n1"]["state"] == "up")
    assert story.online("lone")["owner"] == "n1"


def test_a_fence_without_answer_is_held_and_cancelled_by_a_return() -> None:
    """The leases are asked for, but n2 and n3 lose diskd before they are acquired: nothing is started; the
    old owner is back before the first lease, and goes on with the same run."""
    story = Story(resiliency_period="2s")
    story.command(c.AddVm(vm()))
    first = story.online(on="n1")
    story.do("isolate n1")
    world = story.world
    assert world.run_while(lambda: not story.noted("vm.failed_over"), world.now + 20 * SECOND, 500_000)
    for node in ("n2", "n3"):
        story.do(f"cut {node} diskd")
    story.until(lambda s: s["vms"]["web"]["state"] == "held")
    assert "unanswered" in story.status["vms"]["web"]["reason"]
    for other in ("n2", "n3", "store"):
        story.do(f"heal n1 {other}")
    story.until(lambda s: s["nodes"]["n1"]["state"] == "up")
    again = story.online(on="n1")
    assert (again["epoch"], again["pid"]) == (first["epoch"], first["pid"])
    assert story.noted("vm.failover_cancelled")
    assert story.status["held"] == []


def test_the_cap_holds_a_quarantine_back_and_shows_it() -> None:
    story = Story(nodes=4, quarantine_threshold="1", quarantine_window="20s", mass_failure_brake="1")
    for node in ("n1", "n2"):
        story.do(f"isolate {node}")
    story.until(lambda s: [s["nodes"][n]["state"] for n in ("n1", "n2")] == ["isolated"] * 2, 10)
    story.until(lambda s: s["leader"] in ("n3", "n4"), 10)
    story.world.run_for(SECOND)
    story.do("heal")
    status = story.until(lambda s: any(item["kind"] == "quarantine" for item in s["held"]))
    assert story.noted("quarantine.held_by_cap")
    inside = [name for name, n in status["nodes"].items() if n["state"] == "quarantined"]
    assert len(inside) == 1
    story.command(c.ClearQuarantine(inside[0]), "n3")
    story.until(lambda s: s["nodes"][inside[0]]["state"] == "up")
    story.until(lambda s: all(n["state"] == "up" for n in s["nodes"].values()), 60)
    assert story.status["held"] == []


def test_an_exit_is_counted_once_also_across_a_change_of_leader() -> None:
    story = Story(nodes=4, mass_failure_brake="1")
    leader = story.status["leader"]
    victim = "n1" if leader != "n1" else "n2"
    story.do(f"isolate {victim}")
    story.until(lambda s: s["nodes"][victim]["state"] == "isolated", 10)
    story.do(f"kill {leader}.clusterd")
    story.until(lambda s: s["leader"] not in (leader, None))
    story.do("heal")
    story.do(f"start {leader}.clusterd")
    story.until(lambda s: all(n["state"] == "up" for n in s["nodes"].values()))
    story.world.run_for(3 * SECOND)
    assert story.status["nodes"][victim]["ungraceful_exits"] == 1


@pytest.mark.parametrize("what", ["empty", "foreign", "older"])
def test_a_store_that_is_not_ours_is_unknown_and_changes_nothing(what: str) -> None:
    story = Story()
    story.command(c.AddVm(vm()))
    first = story.online(on="n1")
    story.world.run_for(SECOND)  # every node has read of it
    store = story.world.store
    entries, revision = dict(store.entries), store.revision
    if what == "empty":
        store.entries.clear()
    elif what == "foreign":
        store.transact((), (Put("/holdfast/sim/id", encode_record(ClusterId("other"))),), (), story.world.now)
    else:
        store.transact((), (Put("/holdfast/sim/epoch", encode_record(EpochCounter(0))),), (), story.world.now)
    store.revision += 5
    story.until(lambda s: s["store"] == "unknown")
    story.world.run_for(10 * SECOND)
    assert [(h.name, p.pid) for h, p in story.world.processes_of("web")] == [("n1", first["pid"])]
    assert story.noted("store.foreign")
    store.entries, store.revision = entries, revision + 50
    story.until(lambda s: s["store"] == "ok" and s["nodes"]["n1"]["state"] == "up")
    assert story.online(on="n1")["pid"] == first["pid"]


def test_a_node_with_an_old_state_file_jumps_above_its_own_past() -> None:
    story = Story()
    host = story.world.hosts["n1"]
    story.world.kill_clusterd(host)
    host.document = encode_state(attrs.evolve(decode_state(host.document), incarnation=0))
    story.do("start n1.clusterd")
    story.until(lambda _: story.noted("node.incarnation_jumped"))
    story.until(lambda s: s["nodes"]["n1"]["state"] == "up")
    assert decode_state(host.document).incarnation >= 2


def test_properties_are_validated_together() -> None:
    story = Story()
    assert "store_session" in story.refused(c.SetProperty("heartbeat_interval", "20s"))
    assert "did you mean" in story.refused(c.SetProperty("resiliency_perid", "1s"))
    assert "never" in story.refused(c.SetProperty("mass_failure_hold", "0s"))
    story.command(c.SetProperty("resiliency_period", "9s"))
    story.until(lambda s: s["properties"]["resiliency_period"] == 9.0)


def test_commands_wait_for_the_store_and_then_say_so() -> None:
    story = Story()
    story.do("kill store")
    assert "store" in story.refused(c.AddVm(vm()))


def test_resiliency_off_fails_over_at_once_and_never_means_never() -> None:
    story = Story(resiliency_level="off")
    story.command(c.AddVm(vm()))
    story.online(on="n1")
    story.do("isolate n1")
    story.until(lambda s: s["vms"]["web"]["owner"] != "n1", 4)
    never = Story()
    never.command(c.AddVm(vm(resiliency_period_ns=-1)))
    first = never.online(on="n1")
    never.do("isolate n1")
    never.world.run_for(40 * SECOND)
    entry = never.status["vms"]["web"]
    assert (entry["state"], entry["pid"], entry["window_remaining_s"]) == ("unmonitored", first["pid"], None)


def test_isolation_response_stop_ends_the_runs_of_an_isolated_node() -> None:
    story = Story(isolation_response="stop", resiliency_period="3s")
    story.command(c.AddVm(vm("lone", disks=())))
    story.online("lone", on="n1")
    story.do("isolate n1")
    story.until(lambda _: not story.world.processes_of("lone"), 15)
    story.world.run_for(5 * SECOND)
    assert story.status["vms"]["lone"]["state"] == "held"  # stopping is a courtesy, never a proof (S2)
    story.do("heal")
    story.online("lone")


def test_explain_answers_from_the_code_that_decides() -> None:
    story = Story()
    story.command(c.AddVm(vm()))
    story.command(c.AddVm(vm("lone", disks=())))
    story.online(on="n1")
    story.online("lone", on="n1")
    leader = story.world.hosts[story.status["leader"]].core
    assert leader is not None
    answers = {entry["vm"]: entry for entry in leader.explain_node("n1", story.world.now)}
    assert answers["web"]["outcome"] == "start"
    assert answers["web"]["target"] in ("n2", "n3")
    assert answers["web"]["after_s"] == 6.0
    assert answers["lone"]["outcome"] == "hold"


def test_the_leaders_own_isolation_is_counted_once_as_well() -> None:
    story = Story()
    leader = story.status["leader"]
    for times in (1, 2):
        story.do(f"isolate {leader}")
        story.until(lambda s: s["nodes"][leader]["state"] == "isolated", 10)
        story.do("heal")
        story.until(lambda s: s["nodes"][leader]["state"] == "up")
        story.until(lambda s, n=times: s["nodes"][leader]["ungraceful_exits"] == n, 10)
    story.world.run_for(10 * SECOND)
    assert [n["ungraceful_exits"] for _, n in sorted(story.status["nodes"].items())].count(0) == 2
    assert story.status["nodes"][leader]["ungraceful_exits"] == 2


def test_a_copy_that_meets_a_newer_epoch_is_stopped_and_the_counter_is_raised_above_it() -> None:
    story = Story()
    story.command(c.AddVm(vm()))
    first = story.online(on="n1")
    story.do("pause n1.web")  # its own writes would find out first
    story.world.storage.acquire("web", 99, "somebody else")
    story.until(lambda _: story.noted("vm.fenced"), 10)
    again = story.until(lambda s: s["vms"]["web"]["state"] == "online" and s["vms"]["web"]["epoch"] > 99)
    assert again["vms"]["web"]["pid"] != first["pid"]


def test_a_stall_of_the_own_loop_isolates_nobody_in_its_eyes() -> None:
    story = Story()
    story.do("pause n1.clusterd")
    story.world.run_for(3 * SECOND)
    before = len(story.world.trace)
    story.do("resume n1.clusterd")
    assert story.noted("loop.stalled")
    story.until(lambda s: s["nodes"]["n1"]["state"] == "up")
    after = story.world.trace[before:]
    assert [line for line in after if " n1 node.isolated " in line] == []

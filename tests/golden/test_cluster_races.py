"""Commands and faults that meet at a bad moment, told in the simulated world."""

import pytest
from clusterd_story import Story, vm

from clusterd.core import commands as c
from clusterd.core.effects import AcquireLeases
from clusterd.core.types import Disk
from clusterd.sim.world import Host
from daemonkit.units import MILLISECOND, SECOND, GiB


def test_of_two_vms_added_at_once_with_one_image_one_is_refused() -> None:
    story = Story()
    tickets = [
        story.world.command(node, c.AddVm(vm(name, disks=(Disk("d", "shared"),))))
        for node, name in (("n1", "a"), ("n2", "b"), ("n3", "c"))
    ]
    story.until(lambda _: all(ticket in story.world.answers for ticket in tickets))
    answers = [story.world.answers[ticket] for ticket in tickets]
    assert sorted(answer.accepted for answer in answers) == [False, False, True]
    assert all("shared belongs to VM" in answer.text for answer in answers if not answer.accepted)


def test_a_vm_wanted_offline_whose_node_is_proven_dead_is_offline() -> None:
    story = Story()
    story.command(c.AddVm(vm(disks=())))
    story.online(on="n1")
    story.do("kill n1")
    story.until(lambda s: s["vms"]["web"]["state"] == "unmonitored")
    story.command(c.StopVm("web"))
    story.until(lambda s: s["vms"]["web"]["state"] == "held")
    story.command(c.ConfirmDead("n1"))
    story.until(lambda s: s["vms"]["web"]["state"] == "offline")
    story.command(c.RemoveVm("web"))


def test_a_vm_that_was_never_started_can_be_stopped_though_its_node_is_lost() -> None:
    story = Story()
    story.world.cut_after = lambda host, effect: host.name == "n1" and isinstance(effect, AcquireLeases)
    story.command(c.AddVm(vm()))
    story.until(lambda _: story.world.hosts["n1"].core is None)
    story.do("kill n1")
    story.command(c.StopVm("web"))
    story.until(lambda s: s["vms"]["web"]["state"] == "offline")


def test_a_run_that_is_given_back_is_not_started_a_second_time_under_its_epoch() -> None:
    """Its process died while the node was away, and so did the clusterd that had seen it end."""
    story = Story(nodes=3, resiliency_period="2s")
    story.command(c.AddVm(vm()))
    first = story.online(on="n1")
    story.do("isolate n1")
    story.until(lambda s: s["vms"]["web"]["state"] == "unmonitored")
    story.do("kill n1.web")
    story.world.run_for(SECOND // 2)
    story.do("kill n1.clusterd")

    def gets_no_lease(host: Host, effect: object) -> bool:
        """The new owner has claimed it already."""
        if isinstance(effect, AcquireLeases):
            story.do(f"cut {host.name} diskd")
        return False

    story.world.cut_after = gets_no_lease
    story.until(lambda s: s["vms"]["web"]["owner"] != "n1" and s["vms"]["web"]["state"] == "held", 10)
    story.do("heal n1 n2")
    story.do("heal n1 n3")
    story.do("heal n1 store")
    story.do("start n1.clusterd")
    story.until(lambda _: story.noted("vm.failover_cancelled"))
    assert story.noted("vm.assigned")[-1].endswith("preferred node 1'")  # nobody else got it meanwhile
    story.world.cut_after = None
    story.do("heal")
    story.until(lambda s: s["vms"]["web"]["state"] == "online" and s["vms"]["web"]["epoch"] > first["epoch"])


@pytest.mark.parametrize("again", [False, True])
def test_a_run_that_is_given_back_is_left_alone(again: bool) -> None:
    """Contact comes before the session does, and may be lost again before the run is recorded anew."""
    story = Story(resiliency_period="2s")
    story.command(c.AddVm(vm()))
    first = story.online(on="n1")
    story.do("isolate n1")

    def gets_no_lease(host: Host, effect: object) -> bool:
        if isinstance(effect, AcquireLeases):
            story.do(f"cut {host.name} diskd")
        return False

    story.world.cut_after = gets_no_lease
    story.until(lambda s: s["vms"]["web"]["owner"] != "n1" and s["vms"]["web"]["state"] == "held", 10)
    story.world.cut_after = None
    story.do("heal n1 n2")
    story.do("heal n1 n3")
    story.until(lambda _: story.noted("vm.failover_cancelled"))
    story.world.run_for(SECOND)
    if again:
        story.do("isolate n1")
        story.world.run_for(2 * SECOND)
    story.do("heal")
    story.until(lambda s: s["nodes"]["n1"]["state"] == "up")
    after = story.online(on="n1")
    assert (after["epoch"], after["pid"]) == (first["epoch"], first["pid"])


def test_the_word_that_a_node_is_dead_ends_when_it_is_back() -> None:
    """It had only been frozen, and comes back under the same boot id: what it runs afterwards is not dead."""
    story = Story(resiliency_period="2s")
    story.command(c.AddVm(vm(disks=())))
    story.online(on="n1")
    story.do("pause n1")
    story.until(lambda s: s["nodes"]["n1"]["state"] in ("isolated", "down"))
    story.world.hosts["n1"].hypervisor.processes.clear()  # the operator made sure of that
    story.command(c.ConfirmDead("n1"))
    story.online(on="n2")
    story.do("resume n1")
    story.world.run_for(3 * SECOND)
    story.until(lambda s: s["nodes"]["n1"]["state"] == "up")
    story.command(c.MoveVm("web", "n1"))
    story.online(on="n1")
    story.do("isolate n1")
    held = story.until(lambda s: s["vms"]["web"]["state"] == "held")["vms"]["web"]
    assert "no disks to fence" in held["reason"]


def test_owners_without_a_session_do_not_take_the_places_of_others() -> None:
    """A node that lost only its store, having claimed as many runs as may be under way at once."""
    story = Story()

    def loses_its_store(host: Host, effect: object) -> bool:
        if isinstance(effect, AcquireLeases) and host.name == "n1":
            story.do("cut n1 store")
        return False

    story.world.cut_after = loses_its_store
    for number in range(4):
        story.world.command("n2", c.AddVm(vm(f"slow{number}")))
    story.until(lambda _: story.noted("store.unknown"))
    story.command(c.AddVm(vm("late", on="n2", priority=-1)))
    story.online("late", on="n2")
    for number in range(4):
        story.online(f"slow{number}")


def test_a_vm_whose_diskd_answers_no_node_is_held_while_one_after_the_other_is_asked() -> None:
    story = Story(nodes=5)
    story.do("kill diskd")
    story.command(c.AddVm(vm()))
    story.until(lambda s: s["vms"]["web"]["state"] == "held")
    held = story.status["vms"]["web"]
    assert "diskd did not answer" in held["reason"]
    before = len(story.world.trace)
    story.world.run_for(20 * SECOND)
    assert [line for line in story.world.trace[before:] if " hold.ended " in line] == []
    story.do("start diskd")
    story.online()


def test_a_node_is_drained_of_one_vm_at_a_time() -> None:
    story = Story()
    for name in ("a", "b", "c"):
        story.command(c.AddVm(vm(name)))
        story.online(name, on="n1")
    story.command(c.PauseNode("n1", drain=True))
    most = 0
    while story.world.hosts["n1"].hypervisor.processes or most == 0:
        story.world.run_for(5 * MILLISECOND)
        most = max(most, sum(not story.world.processes_of(name) for name in ("a", "b", "c")))
    assert most == 1


def test_a_leaving_node_is_emptied_of_several_vms_that_fit_nowhere() -> None:
    story = Story(nodes=2)
    for name in ("a", "b"):
        story.command(c.AddVm(vm(name, memory_bytes=GiB)))
        story.online(name, on="n1")
    story.command(c.PauseNode("n2"))
    story.command(c.LeaveNode("n1"))
    story.until(lambda s: s["nodes"]["n1"]["state"] == "down", 60)

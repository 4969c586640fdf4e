"""One diskd per host over shared storage: a VM's disks come along, or the VM is held (S2, S5)."""

from typing import Any

import attrs
from clusterd_story import Story, vm

from clusterd.core import commands as c
from clusterd.core.owner import dead_boots
from clusterd.core.records import ConfirmedDead
from daemonkit.units import SECOND


def per_host(nodes: int = 3, **properties: str) -> Story:
    story = Story(nodes, **properties)
    story.world.storage.per_host = True
    return story


def held(status: dict[str, Any]) -> dict[str, Any] | None:
    return next((item for item in status["held"] if item["subject"] == "web"), None)


def has(story: Story) -> str | None:
    return story.world.storage.image("web").at


def test_a_move_brings_the_disks_along_and_back() -> None:
    story = per_host()
    story.command(c.AddVm(vm()))
    story.online(on="n1")
    assert has(story) == "n1"
    for node in ("n2", "n3", "n1"):
        story.command(c.MoveVm("web", node))
        story.online(on=node)
        assert has(story) == node
    report = story.world.storage.report("web", story.world.acknowledged["web"])
    assert (report.lost, report.overlaps) == (0, 0)


def test_a_dead_host_holds_its_failovers_until_its_death_is_proven() -> None:
    story = per_host()
    story.command(c.AddVm(vm()))
    first = story.online(on="n1")
    story.do("kill n1")
    status = story.until(lambda s: held(s) is not None, 30)
    item = held(status)
    assert item is not None
    assert "belongs to the diskd of n1, which does not answer" in item["why"]
    story.world.run_for(30 * SECOND)  # never because a timer ran out
    assert story.world.processes_of("web") == []
    assert has(story) == "n1"
    story.command(c.ConfirmDead("n1"))
    again = story.until(lambda s: s["vms"]["web"]["state"] == "online", 30)["vms"]["web"]
    assert again["owner"] in ("n2", "n3")
    assert again["epoch"] > first["epoch"]
    assert has(story) == again["owner"]


def test_a_host_that_boots_again_has_proven_its_own_death() -> None:
    story = per_host(resiliency_level="off")
    story.command(c.AddVm(vm()))
    story.online(on="n1")
    story.do("kill n1")
    story.until(lambda s: held(s) is not None, 30)
    story.do("start n1")
    entry = story.until(lambda s: s["vms"]["web"]["state"] == "online", 40)["vms"]["web"]
    assert story.world.processes_of("web")[0][0].name == entry["owner"]
    assert held(story.status) is None


def test_an_isolated_host_is_no_dead_host() -> None:
    """Its VM runs on, since the diskd beside it serves it; it goes on under its own epoch when it is back."""
    story = per_host()
    story.command(c.AddVm(vm()))
    first = story.online(on="n1")
    story.do("isolate n1")
    story.until(lambda s: held(s) is not None, 30)
    story.world.run_for(20 * SECOND)
    ((host, process),) = story.world.processes_of("web")
    assert (host.name, process.epoch) == ("n1", first["epoch"])
    story.do("heal n1")
    entry = story.until(lambda s: s["vms"]["web"]["state"] == "online", 40)["vms"]["web"]
    assert len(story.world.processes_of("web")) == 1
    assert story.world.processes_of("web")[0][0].name == entry["owner"]
    report = story.world.storage.report("web", story.world.acknowledged["web"])
    assert (report.lost, report.overlaps) == (0, 0)


def test_the_proof_is_kept_while_owners_come_and_go() -> None:
    """n1 dies; n2, to which the VM was given, dies before it could start it: n1's death still counts."""
    story = per_host(nodes=5, mass_failure_brake="1.0")
    story.command(c.AddVm(vm()), node="n5")
    story.online(on="n1")
    story.do("kill n1")
    second = story.until(lambda s: held(s) is not None, 30)["vms"]["web"]["owner"]
    story.do(f"kill {second}")
    third = story.until(lambda s: s["vms"]["web"]["owner"] not in ("n1", second), 30)["vms"]["web"]["owner"]
    story.until(lambda s: held(s) is not None, 30)
    core = story.world.hosts[third].core
    assert core is not None
    assignment = core.desk.view.assignment("web")
    assert assignment is not None
    assert (assignment.last_node, assignment.last_boot) == ("n1", "n1-boot-1")
    assert dead_boots(core.desk.view, "web") == ()
    story.command(c.ConfirmDead("n1"), node=third)
    story.online(on=third)
    assert "n1-boot-1" in dead_boots(core.desk.view, "web")


def test_a_boot_whose_vm_runs_elsewhere_does_not_stand_in_the_way_of_a_proof() -> None:
    """db ran on n1's first boot and has long been on n3; web ran on the second, which dies."""
    story = per_host(resiliency_level="off")
    story.command(c.AddVm(vm("db")))
    story.online("db", on="n1")
    story.command(c.MoveVm("db", "n3"))
    story.online("db", on="n3")
    story.do("kill n1")
    story.world.run_for(10 * SECOND)
    story.do("start n1")
    story.until(lambda s: s["nodes"]["n1"]["state"] == "up")
    story.command(c.AddVm(vm()))
    story.online(on="n1")
    story.do("kill n1")
    story.until(lambda s: held(s) is not None, 30)
    story.world.run_for(30 * SECOND)  # its session is over, and with it what it said of itself
    story.command(c.ConfirmDead("n1"))
    assert story.online()["owner"] in ("n2", "n3")
    assert story.online("db")["owner"] == "n3"


def test_one_word_proves_all_that_is_awaited_of_a_host() -> None:
    """db waits for n1's first boot all the time, since storage answers nobody; app ran on the second."""
    story = per_host(resiliency_level="off")
    story.command(c.AddVm(vm()))
    story.online(on="n1")
    story.do("kill n1")
    story.until(lambda s: held(s) is not None, 30)
    story.do("kill diskd")
    story.do("start n1")
    story.until(lambda s: s["nodes"]["n1"]["state"] == "up")
    story.command(c.AddVm(vm("app", disks=(), stateless=False)))
    story.online("app", on="n1")
    story.do("kill n1")
    story.world.run_for(30 * SECOND)
    story.command(c.ConfirmDead("n1"))
    assert story.online("app")["owner"] in ("n2", "n3")
    story.do("start diskd")
    assert story.online()["owner"] in ("n2", "n3")


def test_a_proof_outlives_the_membership_of_the_dead_node() -> None:
    story = per_host()
    story.command(c.AddVm(vm()))
    story.online(on="n1")
    story.do("kill n1")
    story.until(lambda s: held(s) is not None, 30)
    story.do("kill diskd")
    story.until(lambda s: s["nodes"]["n1"]["state"] == "down", 60)
    story.command(c.ConfirmDead("n1"))
    story.command(c.RemoveNode("n1"))
    story.do("start diskd")
    assert story.online()["owner"] in ("n2", "n3")


def test_a_node_that_was_removed_can_still_be_confirmed_dead() -> None:
    story = per_host()
    story.command(c.AddVm(vm()))
    story.online(on="n1")
    story.do("kill n1")
    story.until(lambda s: held(s) is not None and s["nodes"]["n1"]["state"] == "down", 60)
    story.world.run_for(30 * SECOND)
    story.command(c.RemoveNode("n1"))
    assert "there is no node 'n9'" in story.refused(c.ConfirmDead("n9"))
    story.command(c.ConfirmDead("n1"))
    assert story.online()["owner"] in ("n2", "n3")


def test_a_host_that_lives_takes_back_the_word_about_this_boot_only() -> None:
    """An operator was wrong about n1's second boot, not about its first."""
    story = per_host(store_session="10s")
    for fault, end in (("kill n1", "start n1"), ("isolate n1", "heal n1")):
        story.do(fault)
        story.until(lambda s: s["nodes"]["n1"]["state"] == "isolated")
        story.command(c.ConfirmDead("n1"))
        core = story.world.hosts["n2"].core
        assert core is not None
        confirmed = core.desk.view.record("confirmed/n1", ConfirmedDead)
        story.do(end)
        story.world.run_for(5 * SECOND)  # it is heard before it has read what was said of it
    assert confirmed is not None
    assert confirmed.boots() == ("n1-boot-2", "n1-boot-1")
    assert core.desk.view.record("confirmed/n1", ConfirmedDead) == attrs.evolve(
        confirmed, boot_id="n1-boot-1", also=()
    )
    assert dead_boots(core.desk.view, "web") == ("n1-boot-1",)


def test_a_vm_that_was_stopped_while_it_was_held_still_waits_for_its_host() -> None:
    story = per_host()
    story.command(c.AddVm(vm()))
    story.online(on="n1")
    story.do("kill n1")
    story.until(lambda s: held(s) is not None, 30)
    story.command(c.StopVm("web"))
    story.until(lambda s: s["vms"]["web"]["state"] == "offline")
    story.command(c.StartVm("web"))
    story.until(lambda s: held(s) is not None, 30)
    story.world.run_for(30 * SECOND)
    story.command(c.ConfirmDead("n1"))
    assert story.online()["owner"] in ("n2", "n3")

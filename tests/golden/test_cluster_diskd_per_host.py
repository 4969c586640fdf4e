"""One diskd per host over shared storage: a VM's disks come along, or the VM is held (S2, S5)."""

from typing import Any

from clusterd_story import Story, vm

from clusterd.core import commands as c
from clusterd.core.owner import dead_boots
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

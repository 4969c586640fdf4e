"""What a recovery from stale pictures may not conclude: a VM without disks may live on any node that was not
asked, and is held until each of them has been heard or is proven dead."""

import json

import pytest
from clusterd_lost_store import all_up, lose, pids
from clusterd_story import Story, vm

from clusterd.core import commands as c
from clusterd.core.effects import Put
from clusterd.core.records import ConfirmedDead, encode_record
from clusterd.core.recovery import Request
from clusterd.sim.recovery import Recovery
from clusterd.sim.store import SimStore
from daemonkit.units import SECOND

HIDDEN = Request(without=("n2", "n3"))


def hidden(without: tuple[str, ...] = ()) -> tuple[Story, list[tuple[str, str, int, int]]]:
    """The store is lost and rebuilt on n1 alone, from a picture in which ``lone`` runs on n2 (but for the
    records ``without``); in truth it has moved on to n3."""
    story = Story(3)
    story.command(c.AddVm(vm("lone", on="n2", disks=())))
    story.online("lone", on="n2")
    story.world.run_for(5 * SECOND)
    stale = story.world.hosts["n1"].picture
    assert stale is not None
    story.command(c.MoveVm("lone", "n3"))
    story.online("lone", on="n3")
    for host in story.world.hosts.values():
        story.world.kill_clusterd(host)
    document = json.loads(stale)
    for part in without:
        del document["records"][f"vms/lone/{part}"]
    story.world.hosts["n1"].picture = json.dumps(document).encode()
    story.world.store = SimStore(next_lease=5000)
    story.world.start(story.world.hosts["n1"])
    story.world.run_for(3 * SECOND)
    assert Recovery(story.world, "n1", HIDDEN).run()
    story.until(lambda s: s["store"] == "ok" and s["leader"])
    return story, pids(story, "lone")


STALE = [(), ("run",), ("run", "assignment")]


@pytest.mark.parametrize("without", STALE)
def test_the_return_of_one_does_not_free_what_may_live_on_another(without: tuple[str, ...]) -> None:
    story, before = hidden(without)
    story.do("start n2.clusterd")
    story.until(lambda s: s["nodes"]["n2"]["state"] == "up")
    story.world.run_for(30 * SECOND)
    assert pids(story, "lone") == before
    [item] = story.status["held"]
    assert "n3" in item["why"] and "n2" not in item["why"]
    story.do("start n3.clusterd")
    story.online("lone", on="n3")
    all_up(story)
    story.world.run_for(10 * SECOND)
    assert pids(story, "lone") == before and story.status["held"] == []
    story.command(c.MoveVm("lone", "n1"))
    story.online("lone", on="n1")


@pytest.mark.parametrize("without", STALE)
def test_the_death_of_one_does_not_free_it_either_but_that_of_all_does(without: tuple[str, ...]) -> None:
    story, before = hidden(without)
    story.do("kill n2")
    story.world.run_for(30 * SECOND)
    story.command(c.ConfirmDead("n2"), "n1")
    story.world.run_for(10 * SECOND)
    assert pids(story, "lone") == before
    story.until(lambda s: any("n3" in item["why"] for item in s["held"] if item["subject"] == "lone"))
    assert "n3" in story.refused(c.RemoveNode("n3"), "n1")
    story.do("kill n3")
    story.command(c.ConfirmDead("n3"), "n1")
    story.online("lone", on="n1")


def test_a_vm_that_no_picture_knew_is_back_with_its_node() -> None:
    story, before = hidden(("run", "assignment", "spec"))
    assert "lone" not in story.status["vms"]
    story.do("start n2.clusterd")
    story.do("start n3.clusterd")
    story.online("lone", on="n3")
    all_up(story)
    story.world.run_for(10 * SECOND)
    assert pids(story, "lone") == before


def test_who_comes_back_first_with_it_alive_has_it() -> None:
    story, before = hidden()
    story.do("start n3.clusterd")
    story.online("lone", on="n3")
    story.do("start n2.clusterd")
    all_up(story)
    story.world.run_for(10 * SECOND)
    assert pids(story, "lone") == before


def test_it_is_not_started_by_hand_nor_removed_while_it_may_live() -> None:
    story, before = hidden()
    story.command(c.StopVm("lone"), "n1")
    story.do("start n2.clusterd")
    story.until(lambda s: s["vms"]["lone"]["state"] == "offline")
    assert "n3" in story.refused(c.RemoveVm("lone"), "n1")
    story.command(c.StartVm("lone"), "n1")
    story.world.run_for(20 * SECOND)
    assert pids(story, "lone") == before
    story.do("start n3.clusterd")
    story.online("lone", on="n3")
    assert pids(story, "lone") == before


def test_a_second_loss_forgets_no_doubt() -> None:
    story, before = hidden()
    story.do("start n2.clusterd")
    story.world.run_for(20 * SECOND)
    lose(story)
    assert Recovery(story.world, "n2", Request(without=("n3",))).run()
    story.world.run_for(30 * SECOND)
    assert pids(story, "lone") == before
    story.do("start n3.clusterd")
    story.online("lone", on="n3")
    assert pids(story, "lone") == before


def test_what_the_brake_holds_is_held_after_a_recovery_too() -> None:
    story = Story(3)
    story.command(c.AddVm(vm("web", on="n2")))
    story.online("web")
    story.do("kill n2")
    story.do("kill n3")
    story.until(lambda s: "failover-web" in {item["id"] for item in s["held"]})
    story.world.run_for(5 * SECOND)
    lose(story)
    assert Recovery(story.world, "n1", HIDDEN).run()
    story.until(lambda s: s["store"] == "ok" and s["leader"])
    story.world.run_for(40 * SECOND)
    assert {"brake-n2", "brake-n3", "failover-web"} <= {item["id"] for item in story.status["held"]}
    assert not story.noted("vm.failed_over")


def test_the_word_about_an_unknown_boot_ends_with_the_return_of_its_node() -> None:
    story = Story(2)
    key = "/holdfast/sim/confirmed/n2"
    put = Put(key, encode_record(ConfirmedDead("", 0, ("other",))))
    story.world.store.transact((), (put,), (), story.world.now)
    story.world.run_for(3 * SECOND)
    entry = story.world.store.entries[key]
    assert json.loads(entry.value)["boot_id"] == "other" and json.loads(entry.value)["also"] == []

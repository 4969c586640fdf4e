"""Stories of a store that is lost and rebuilt, in the simulated world: no VM is stopped or started twice."""

import itertools

import attrs
import pytest
from clusterd_lost_store import all_up, lose, pids
from clusterd_story import Story, vm

from clusterd.core import commands as c
from clusterd.core.effects import Put
from clusterd.core.records import ClusterId, encode_record
from clusterd.core.recovery import EPOCH_MARGIN, Request
from clusterd.core.state import decode_state
from clusterd.errors import Refused
from clusterd.sim.recovery import Recovery
from clusterd.sim.store import SimStore
from daemonkit.units import SECOND

NOBODY = Request()


def running(nodes: int = 3) -> Story:
    """web on n1, db on n2, lone (without disks) on n3; off was stopped."""
    story = Story(nodes)
    vms = (("web", "n1", {}), ("db", "n2", {}), ("lone", "n3", {"disks": ()}), ("off", "n2", {}))
    for name, host, more in vms:
        story.command(c.AddVm(vm(name, on=host, **more)))
        story.online(name, on=host)
    story.command(c.StopVm("off"))
    story.until(lambda s: s["vms"]["off"]["state"] == "offline")
    story.world.run_for(5 * SECOND)  # the pictures are kept
    return story


@pytest.mark.parametrize("what", ["empty", "older"])
def test_a_lost_store_is_rebuilt_and_every_vm_goes_on(what: str) -> None:
    story = Story(3)
    story.command(c.AddVm(vm("web", on="n1")))
    story.online(on="n1")
    copy = story.world.store.revision, dict(story.world.store.entries)
    story.command(c.AddVm(vm("late", on="n2")))
    story.online("late", on="n2")
    story.command(c.SetProperty("resiliency_period", "7s"))
    story.world.run_for(5 * SECOND)
    before = pids(story, "web", "late")
    lose(story, copy if what == "older" else None)
    epochs = [image.epoch for image in story.world.storage.images.values()]
    recovery = Recovery(story.world, "n2", NOBODY)
    assert {fate.kind for fate in recovery.planned().fates.values()} == {"lives"}
    assert recovery.run()
    all_up(story)
    assert story.noted("store.recovered")
    assert story.status["vms"].keys() == {"web", "late"}
    assert story.status["properties"]["resiliency_period"] == 7.0
    story.world.run_for(20 * SECOND)
    assert pids(story, "web", "late") == before
    # Another start takes an epoch above everything, and the store is an ordinary one again.
    story.command(c.MoveVm("web", "n3"))
    assert story.online(on="n3")["epoch"] > max(epochs) + EPOCH_MARGIN
    with pytest.raises(Refused, match="is good"):
        recovery.run()


def test_what_was_stopped_stays_so_and_a_vm_without_disks_is_kept() -> None:
    story = running()
    before = pids(story, "web", "db", "lone")
    lose(story)
    assert Recovery(story.world, "n1", NOBODY).run()
    all_up(story)
    story.world.run_for(20 * SECOND)
    assert pids(story, "web", "db", "lone", "off") == before
    assert story.status["vms"]["off"]["state"] == "offline"


def test_a_node_that_is_not_asked_keeps_its_vms_until_it_is_back() -> None:
    story = running()
    before = pids(story, "web", "db", "lone")
    story.do("kill n3.clusterd")
    story.do("kill n2.clusterd")
    lose(story)
    with pytest.raises(Refused, match="--without n2 --without n3"):
        Recovery(story.world, "n1", NOBODY).run()
    with pytest.raises(Refused, match="n1 answers"):
        Recovery(story.world, "n1", Request(without=("n1", "n2", "n3"))).run()
    recovery = Recovery(story.world, "n1", Request(without=("n2", "n3")))
    fates = recovery.planned().fates
    assert {name: (fate.kind, fate.assignment and fate.assignment.owner) for name, fate in fates.items()} == {
        "web": ("lives", "n1"),
        "db": ("elsewhere", "n2"),
        "lone": ("elsewhere", "n3"),
        "off": ("ended", "n2"),
    }
    assert recovery.run()
    story.until(lambda s: s["store"] == "ok" and s["vms"]["db"]["state"] == "unmonitored")
    assert pids(story, "web", "db", "lone") == before
    story.do("start n2.clusterd")
    story.do("start n3.clusterd")
    all_up(story)
    assert pids(story, "web", "db", "lone") == before
    # Without disks and on a node that stays away: never by a timer.
    story.do("kill n3.clusterd")
    story.until(lambda s: s["held"], 40)
    assert pids(story, "lone") == [row for row in before if row[0] == "lone"]


def test_a_host_that_died_meanwhile_is_failed_over_by_the_rules() -> None:
    story = running()
    lose(story)
    story.do("kill n2")
    story.world.run_for(3 * SECOND)
    assert Recovery(story.world, "n1", Request(without=("n2",))).run()
    story.until(lambda s: s["vms"].get("db", {}).get("owner") in ("n1", "n3"), 40)
    story.online("db")
    assert [row[1] for row in pids(story, "db")] != ["n2"]


def test_a_recovery_interrupted_anywhere_leaves_the_store_unknown_and_is_run_again() -> None:
    for steps in itertools.count(2):
        story = running()
        copy = story.world.store.revision, dict(story.world.store.entries)
        story.command(c.SetProperty("resiliency_period", "7s"))
        story.world.run_for(5 * SECOND)
        before = pids(story, "web", "db", "lone")
        lose(story, copy)
        if Recovery(story.world, "n1", NOBODY).run(steps=steps):
            break
        story.world.run_for(3 * SECOND)
        if any(s["store"] == "ok" for s in story.world.statuses().values()):
            continue  # it was the last transaction, and only its answer was lost
        assert Recovery(story.world, "n3", NOBODY, drawn="other").run()
        all_up(story)
        assert pids(story, "web", "db", "lone") == before
    assert steps > 4


def test_of_two_recoveries_only_the_one_that_claimed_last_goes_on() -> None:
    story = running()
    lose(story)
    one, two = (Recovery(story.world, node, NOBODY, drawn=node) for node in ("n1", "n2"))
    first, second = one.script(), two.script()
    assert not one.run(first, steps=1)
    with pytest.raises(Refused, match="another recovery"):
        two.run(second)  # planned before the other's claim
    assert not two.run(two.script(), steps=1)
    with pytest.raises(Refused, match="another recovery"):
        one.run(first)
    assert two.run(two.script())
    all_up(story)


def test_a_store_of_another_cluster_is_overwritten_only_by_its_id() -> None:
    story = running()
    story.world.store = SimStore(next_lease=5000)
    foreign = Put("/holdfast/sim/id", encode_record(ClusterId("other")))
    story.world.store.transact((), (foreign,), (), story.world.now)
    story.until(lambda _: all(s["store"] == "unknown" for s in story.world.statuses().values()))
    with pytest.raises(Refused, match="--replace other"):
        Recovery(story.world, "n1", NOBODY).run()
    assert Recovery(story.world, "n1", Request(replace_id="other")).run()
    all_up(story)


def test_a_node_that_is_new_never_founds_a_cluster_in_a_store_that_is_being_rebuilt() -> None:
    story = running()
    story.do("kill n3")
    lose(story)
    recovery = Recovery(story.world, "n1", Request(without=("n3",)))
    script = recovery.script()
    assert not recovery.run(script, steps=1)
    story.world.hosts["n3"].document = None
    story.do("start n3")
    story.world.run_for(5 * SECOND)
    assert "/holdfast/sim/id" not in story.world.store.entries
    assert recovery.run(recovery.script())
    all_up(story)
    assert (
        decode_state(story.world.hosts["n3"].document).store_id
        == decode_state(story.world.hosts["n1"].document).store_id
    )


def test_a_copy_of_before_the_recovery_is_an_older_one() -> None:
    story = running()
    copy = story.world.store.revision, dict(story.world.store.entries)
    lose(story)
    assert Recovery(story.world, "n1", NOBODY).run()
    all_up(story)
    lose(story, (copy[0] + 1000, copy[1]))
    assert all("before its recovery" in str(s) for s in story.noted("store.foreign")[-3:])
    again = Recovery(story.world, "n1", NOBODY)
    assert again.planned().number == 2
    assert again.run()
    all_up(story)


def test_an_older_copy_is_known_as_one_after_a_restart_of_every_clusterd() -> None:
    story = running()
    copy = story.world.store.revision, dict(story.world.store.entries)
    story.command(c.AddVm(vm("late", on="n1", disks=())))
    story.online("late")
    story.world.run_for(5 * SECOND)
    before = pids(story, "web", "db", "lone", "late")
    for host in story.world.hosts.values():
        story.world.kill_clusterd(host)
    story.world.store = SimStore(copy[0], copy[1], next_lease=5000)
    for host in story.world.hosts.values():
        story.world.start(host)
    story.world.run_for(5 * SECOND)
    assert {s["store"] for s in story.world.statuses().values()} == {"unknown"}
    assert Recovery(story.world, "n3", NOBODY).run()
    all_up(story)
    assert pids(story, "web", "db", "lone", "late") == before


def test_the_pictures_survive_a_restart_of_every_clusterd() -> None:
    story = running()
    before = pids(story, "web", "db", "lone")
    for host in story.world.hosts.values():
        story.world.kill_clusterd(host)
    story.world.store = SimStore(next_lease=5000)
    for host in story.world.hosts.values():
        assert host.picture is not None
        story.world.start(host)
    story.world.run_for(2 * SECOND)
    assert Recovery(story.world, "n1", NOBODY).run()
    all_up(story)
    assert pids(story, "web", "db", "lone") == before
    assert attrs.asdict(story.world.storage.image("off"))["epoch"] > 0

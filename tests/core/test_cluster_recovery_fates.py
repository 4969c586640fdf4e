"""Fates of VMs in a recovery's plan that a stale picture could get wrong, one by one."""

import attrs

from clusterd.core import records
from clusterd.core import testimony as t
from clusterd.core.picture import Picture
from clusterd.core.recovery import Evidence, Plan, Request, plan
from clusterd.core.store_identity import Marks
from clusterd.core.types import Disk, VmConfig
from clusterd.core.vm_fate import LeaseSeen

WEB = VmConfig("web", argv=("guest",), disks=(Disk("d", "web"),))
LONE = VmConfig("lone", argv=("guest",))


def planned(
    values: dict[str, object],
    runs: tuple[t.LiveRun, ...] = (),
    leases: tuple[LeaseSeen, ...] = (),
    **more: object,
) -> Plan:
    """On n1, which tells of these runs; n2 was not asked. ``values``: of the picture."""
    base = {"members/n1": records.Member("n1"), "members/n2": records.Member("n2"), **values}
    kept = tuple((key, records.encode_record(value)) for key, value in sorted(base.items()))
    told = {"n1": t.Testimony("n1", "b1", "c", False, 0, "", 0, runs)}
    picture, silent = Picture("c", 0, 50, kept), {"n2": "it does not answer"}
    evidence = Evidence("n1", Marks("c", 0, 60), told, silent, picture, leases, {}, "/p/", 1, ())
    return plan(attrs.evolve(evidence, **more), Request(("n2",), ("main",)))


def of_web(epoch: int, run: records.Run | None) -> dict[str, object]:
    found: dict[str, object] = {
        "vms/web/spec": records.VmSpec(WEB),
        "vms/web/assignment": records.Assignment("n2", epoch),
    }
    return found | ({"vms/web/run": run} if run is not None else {})


def test_an_older_run_does_not_take_the_vm_from_the_newer_one_of_a_node_that_was_not_asked() -> None:
    """Nobody tells its leases: n1's run is fenced, and that of n2 would be stopped if it lost the VM."""
    values = of_web(7, records.Run("n2", 7, "online", "b2"))
    made = planned(values, (t.LiveRun(WEB, 5, "online", "b1"),), silent_diskds={"main": "silent"})
    fate = made.fates["web"]
    assert fate.kind == "elsewhere" and fate.assignment is not None
    assert (fate.assignment.owner, fate.assignment.epoch) == ("n2", 7)
    # One that nobody has recorded as begun takes nothing from a run that lives.
    begun = planned(of_web(7, None), (t.LiveRun(WEB, 5, "online", "b1"),), silent_diskds={"main": "silent"})
    assert begun.fates["web"].kind == "lives"
    # Both may have a run to stop before they are up again.
    assert {"moves/n1", "moves/n2"} <= made.records.keys()


def test_an_epoch_that_may_have_been_used_is_no_start_that_is_still_to_come() -> None:
    """S1: it is left as one only where its disks show that it took no lease."""
    for run in (None, records.Run("n2", 7, "fencing", "b2")):
        released = planned(of_web(7, run), leases=(LeaseSeen("main", "web", 7, None),)).fates["web"]
        assert released.run is not None and released.run.state == "online"
        unseen = planned(of_web(7, run), silent_diskds={"main": "silent"}).fates["web"]
        assert unseen.run is not None and unseen.run.state == "online"
        untouched = planned(of_web(7, run), leases=(LeaseSeen("main", "web", 6, None),)).fates["web"]
        assert untouched.run == run and untouched.desired == "online"


def test_a_window_of_before_counts_for_nothing() -> None:
    """It may be that of an earlier isolation: a recovery may lengthen a window, never shorten it."""
    old = records.NodeRecord(records.Window(9, 3, 2, ended=True), (5,), 4)
    made = planned({"nodes/n2": old})
    kept = records.decode_record(records.NodeRecord, "nodes/n2", made.records["nodes/n2"])
    assert kept == records.NodeRecord(records.Window(0, 3, 2), (5,), 4)


def test_a_vm_whose_place_is_known_is_in_no_doubt() -> None:
    values: dict[str, object] = {"vms/lone/spec": records.VmSpec(LONE)}
    assert planned(values).fates["lone"].doubts.keys() == {"n2"}
    assert planned(values, (t.LiveRun(LONE, 3, "online", "b1"),)).fates["lone"].doubts == {}
    stateless = {"vms/lone/spec": records.VmSpec(attrs.evolve(LONE, stateless=True))}
    assert planned(dict(stateless)).fates["lone"].doubts == {}

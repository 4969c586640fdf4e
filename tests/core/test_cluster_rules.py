"""Tables of the pure decisions: properties, placement, quarantine, windows, verdicts, run phases, records."""

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterd.core import quarantine
from clusterd.core.failover import RESTARTS_MAX, Facts, judge
from clusterd.core.fencing import TABLE, LocalRun, Phase, Step
from clusterd.core.isolation import longest_ns, opened, period_ns, progressed, remaining_ns
from clusterd.core.placement import Room, place
from clusterd.core.properties import (
    DEFAULTS,
    Properties,
    parse_properties,
    property_document,
    property_texts,
)
from clusterd.core.records import (
    KINDS,
    Assignment,
    ConfirmedDead,
    NodeRecord,
    Run,
    VmRequest,
    VmSpec,
    Window,
    decode_record,
    encode_record,
    kind_of,
)
from clusterd.core.state import Intent, NodeState, begin_incarnation, decode_state, encode_state
from clusterd.core.types import Disk, VmConfig, check_vm
from clusterd.errors import Refused, StoreUnknown
from daemonkit.errors import InvariantBroken
from daemonkit.units import SECOND, GiB

P = Properties()
DISKED = VmConfig("web", argv=("x",), memory_bytes=GiB, disks=(Disk("d", "web"),))
DISKLESS = VmConfig("web", argv=("x",), memory_bytes=GiB)
STATELESS = attrs.evolve(DISKLESS, stateless=True)
ON_N1 = Assignment("n1", 5)


def run(state: str, **more: object) -> Run:
    return Run("n1", 5, state, "boot", **more)  # type: ignore[arg-type]


# -- properties


def test_defaults_are_those_of_the_design() -> None:
    assert parse_properties({}) == P
    assert parse_properties(DEFAULTS) == P
    assert property_texts({"quarantine_cap": "0.5"})["quarantine_cap"] == "0.5"
    assert property_document({})["heartbeat_interval"] == 1.0


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ({"heartbeat_intervall": "1s"}, "did you mean 'heartbeat_interval'"),
        ({"heartbeat_interval": "1"}, "write it like"),
        ({"heartbeat_interval": "1ms"}, "between 20ms and 60s"),
        ({"heartbeat_threshold": "2"}, "whole number from 3"),
        ({"heartbeat_threshold": "ten"}, "whole number"),
        ({"heartbeat_interval": "10s"}, "store_session"),
        ({"store_session": "5s"}, "shorter than the isolation time"),
        ({"quarantine_cap": "1.5"}, "share from 0 to 1"),
        ({"quarantine_cap": "nan"}, "share from 0 to 1"),
        ({"resiliency_level": "maybe"}, "not one of"),
        ({"quarantine_duration": "0s"}, "more than 0"),
    ],
)
def test_impossible_properties_are_refused_with_the_reason(texts: dict[str, str], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        parse_properties(texts)


# -- placement

rooms = st.lists(
    st.builds(
        Room,
        name=st.sampled_from([f"n{n}" for n in range(6)]),
        memory_bytes=st.integers(0, 8).map(lambda n: n * GiB),
        vcpus=st.integers(0, 8),
        used_memory_bytes=st.integers(0, 8).map(lambda n: n * GiB),
        used_vcpus=st.integers(0, 8),
        vms=st.integers(0, 5),
        why_not=st.sampled_from(["", "", "is paused"]),
    ),
    max_size=6,
    unique_by=lambda room: room.name,
)


@given(rooms, st.integers(1, 4), st.lists(st.sampled_from(["n0", "n1", "n5"]), unique=True), st.randoms())
def test_placement_agrees_with_a_naive_search(
    given_rooms: list[Room], gib: int, preferred: list[str], randomness: object
) -> None:
    vm = VmConfig("web", argv=("x",), memory_bytes=gib * GiB, vcpus=2, preferred_nodes=tuple(preferred))
    fits = [
        room
        for room in given_rooms
        if not room.why_not
        and room.memory_bytes - room.used_memory_bytes >= vm.memory_bytes
        and room.vcpus - room.used_vcpus >= 2
    ]
    shuffled = list(given_rooms)
    randomness.shuffle(shuffled)  # type: ignore[attr-defined]
    choice = place(vm, shuffled)
    assert choice == place(vm, given_rooms)
    if not fits:
        assert choice.node is None
        return
    liked = [name for name in preferred if name in {room.name for room in fits}]
    if liked:
        assert choice.node == liked[0]
    else:
        chosen = next(room for room in fits if room.name == choice.node)
        assert chosen.vms == min(room.vms for room in fits)
    for room in fits:
        assert place(vm, given_rooms, wanted=room.name).node == room.name
    everyone = {room.name: "not now" for room in given_rooms}
    assert place(vm, given_rooms, excluded=everyone).node is None


# -- quarantine and windows


def test_cap_is_rounded_down_but_at_least_one_from_two_members() -> None:
    assert [quarantine.cap(P, n) for n in (0, 1, 2, 4, 7, 8, 64)] == [0, 0, 1, 1, 1, 2, 16]


@given(st.lists(st.integers(1, 2 * P.quarantine_window_ns), max_size=30))
def test_exits_agree_with_a_naive_sliding_window(gaps: list[int]) -> None:
    record, times, now = NodeRecord(), [], 0
    for gap in gaps:
        now += gap
        record = quarantine.count_exit(quarantine.aged(record, gap, P))
        times.append(now)
        recent = [at for at in times if now - at < P.quarantine_window_ns]
        assert list(record.exit_ages_ns) == [now - at for at in recent]
        assert quarantine.is_due(record, P) == (len(recent) >= P.quarantine_threshold)


def test_release_clears_the_exits() -> None:
    record = NodeRecord(exit_ages_ns=(3, 2, 1))
    inside = quarantine.enter(record)
    assert not quarantine.is_due(inside, P)
    assert not quarantine.is_over(quarantine.aged(inside, P.quarantine_duration_ns - 1, P), P)
    assert quarantine.is_over(quarantine.aged(inside, P.quarantine_duration_ns, P), P)
    assert quarantine.release(inside) == NodeRecord()


def test_windows_by_level_vm_and_proof() -> None:
    off = attrs.evolve(P, resiliency_level="off")
    always = attrs.evolve(P, resiliency_level="always")
    never, at_once = (attrs.evolve(DISKED, resiliency_period_ns=ns) for ns in (-1, 0))
    assert period_ns(DISKED, P, False) == 240 * SECOND
    assert period_ns(DISKED, P, True) == 0
    assert period_ns(DISKED, always, True) == 240 * SECOND
    assert period_ns(DISKED, off, False) == 0
    assert period_ns(never, P, False) is None
    assert period_ns(at_once, P, False) == 0
    assert longest_ns([never, at_once], P) == 0
    assert longest_ns([never], P) == longest_ns([], P) == 240 * SECOND
    assert remaining_ns(Window(5, grace_ns=3), 10) == 8
    assert remaining_ns(Window(50, grace_ns=3), 10) == 0
    assert remaining_ns(Window(50), None) is None


def test_an_announced_restart_counts_only_once_its_grace_is_over() -> None:
    assert progressed(opened(1, 0, None), 10).counts
    announced = opened(1, 0, 5)
    assert not progressed(announced, 10).counts
    late = progressed(attrs.evolve(announced, elapsed_ns=5), 10)
    assert late.counts
    assert not late.ended
    assert progressed(attrs.evolve(announced, elapsed_ns=15), 10).ended


# -- verdicts

MOVE, FAIL_OVER = {"request": VmRequest("move", "n2")}, {"request": VmRequest("failover")}
BACK = {"previous_in_contact": True}
TAKEN, TAKING = Assignment("n2", 5, previous="n1"), Assignment("n2", 6, previous="n1")
WORN = Assignment("n1", 5, attempt=RESTARTS_MAX)
LOST = {"owner_in_contact": False, "window": Window(0)}
OVER = {"owner_in_contact": False, "window": Window(240 * SECOND)}
CASES = [
    ("new", DISKED, "online", None, None, {}, "start"),
    ("runs", DISKED, "online", ON_N1, run("online"), {}, "rest"),
    ("wanted offline", DISKED, "offline", ON_N1, run("online"), {}, "stop"),
    ("is offline", DISKED, "offline", ON_N1, run("stopped"), {}, "rest"),
    ("never assigned", DISKED, "offline", None, None, {}, "rest"),
    ("unclaimed", DISKED, "online", ON_N1, None, {}, "rest"),
    ("unclaimed, session gone", DISKED, "online", ON_N1, None, {"owner_is_present": False}, "start"),
    ("unclaimed, owner lost", DISKLESS, "online", ON_N1, None, LOST, "start"),
    ("claimed, owner lost", DISKLESS, "online", ON_N1, run("fencing"), LOST, "start"),
    ("window open", DISKED, "online", ON_N1, run("online"), LOST, "window"),
    ("window over", DISKED, "online", ON_N1, run("online"), OVER, "start"),
    ("window over, starting", DISKED, "online", ON_N1, run("starting"), OVER, "start"),
    ("no disks", DISKLESS, "online", ON_N1, run("online"), OVER, "hold"),
    ("no disks, starting", DISKLESS, "online", ON_N1, run("starting"), OVER, "hold"),
    ("stateless", STATELESS, "online", ON_N1, run("online"), OVER, "start"),
    ("proven dead", DISKLESS, "online", ON_N1, run("online"), {**LOST, "proven_dead": True}, "start"),
    ("no window yet", DISKED, "online", ON_N1, run("online"), {"owner_in_contact": False}, "window"),
    ("ended by itself, owner lost", DISKLESS, "online", ON_N1, run("failed"), LOST, "start"),
    ("failed", DISKED, "online", ON_N1, run("failed"), {}, "start"),
    ("failed often", DISKED, "online", WORN, run("failed"), {}, "failed"),
    ("held", DISKED, "online", ON_N1, run("held"), {}, "hold"),
    ("held by a newer epoch", DISKED, "online", ON_N1, run("held", seen_epoch=9), {}, "start"),
    ("drained", DISKED, "online", ON_N1, run("online"), {"owner_is_drained": True}, "drain"),
    ("move", DISKED, "online", ON_N1, run("online"), MOVE, "drain"),
    ("failover of the living", DISKED, "online", ON_N1, run("online"), FAIL_OVER, "forget"),
    ("failover now", DISKED, "online", ON_N1, run("online"), {**LOST, **FAIL_OVER}, "start"),
    ("failover without proof", DISKLESS, "online", ON_N1, run("online"), {**LOST, **FAIL_OVER}, "hold"),
    ("back before the lease", DISKED, "online", TAKING, None, BACK, "cancel"),
    ("back after a lease", DISKED, "online", TAKEN, run("held", leased=1), BACK, "hold"),
    ("back, nothing leased", DISKED, "online", TAKEN, run("held"), BACK, "cancel"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "desired", "assignment", "observed", "more", "kind"), CASES)
def test_verdicts(name, config, desired, assignment, observed, more, kind) -> None:
    verdict = judge(Facts(VmSpec(config, desired), assignment, observed, **more), P)
    assert verdict.kind == kind, verdict
    if kind in ("hold", "failed", "start", "window"):
        assert verdict.why
    if kind == "hold":
        assert verdict.ends_when


facts = st.builds(
    Facts,
    spec=st.builds(VmSpec, st.sampled_from([DISKED, DISKLESS, STATELESS]), st.just("online")),
    assignment=st.builds(Assignment, st.just("n1"), st.just(5), st.sampled_from(["run", "stop"])),
    run=st.none()
    | st.sampled_from(["fencing", "held", "starting", "online", "stalled", "stopping"]).map(run),
    request=st.none() | st.sampled_from([VmRequest("failover"), VmRequest("move", "n2")]),
    owner_in_contact=st.booleans(),
    owner_is_present=st.booleans(),
    owner_is_drained=st.booleans(),
    proven_dead=st.booleans(),
    window=st.none() | st.integers(0, 10**15).map(Window),
)


@given(facts, st.sampled_from(["off", "always", "uncertain"]))
def test_s2_a_vm_without_disks_never_starts_because_of_time(given_facts: Facts, level: str) -> None:
    verdict = judge(given_facts, attrs.evolve(P, resiliency_level=level))
    seen = given_facts.run
    may_live = seen is not None and seen.state in ("starting", "online", "stalled", "stopping")
    bare = not given_facts.spec.config.disks and not given_facts.spec.config.stateless
    if bare and may_live and not given_facts.proven_dead:
        assert verdict.kind != "start"
    if may_live and given_facts.owner_in_contact:
        assert verdict.kind != "start"


# -- phases, records, state


def test_every_phase_ends_and_what_is_not_in_the_table_is_an_error() -> None:
    for phase in Phase:
        reached = {phase}
        for _ in Phase:
            reached |= {after for (before, _), after in TABLE.items() if before in reached}
        assert Phase.ENDED in reached
        for step in Step:
            local = LocalRun(DISKED, 1, "boot", phase)
            if (phase, step) in TABLE:
                local.step(step)
            else:
                with pytest.raises(InvariantBroken):
                    local.step(step)


def test_only_spawning_follows_the_commit_and_only_the_commit_follows_the_leases() -> None:
    into = {phase: {before for (before, _), after in TABLE.items() if after is phase} for phase in Phase}
    assert into[Phase.SPAWNING] == {Phase.COMMITTING}
    assert into[Phase.COMMITTING] == {Phase.FENCING, Phase.CLAIMING}
    assert into[Phase.FENCING] == {Phase.CLAIMING}


def test_records_read_back_and_garbage_is_unknown() -> None:
    for record in (NodeRecord(Window(1), (2, 3), 4), VmSpec(DISKED), ON_N1, run("online", pid=3)):
        assert decode_record(type(record), "k", encode_record(record)) == record
    for garbage in (b"", b"[]", b"{}", b'{"owner": 1}', b"\xff", b'{"owner":"a","epoch":1,"more":2}'):
        with pytest.raises(StoreUnknown):
            decode_record(Assignment, "vms/web/assignment", garbage)
    before = decode_record(ConfirmedDead, "confirmed/n1", b'{"boot_id":"b","incarnation":3}')
    assert before.boots() == ("b",)  # a record of before there could be several
    assert kind_of("vms/web/spec") is VmSpec
    assert kind_of("nodes/n1") is NodeRecord
    assert [kind_of(key) for key in ("vms/web/other", "nodes/", "else", "vms")] == [None] * 4
    assert set(KINDS.values()) >= {VmSpec, NodeRecord}


def test_the_state_survives_and_damage_is_refused() -> None:
    state = NodeState(3, "id", 7, 9, {"web": Intent(DISKED, 7, "boot")})
    assert decode_state(encode_state(state)) == state
    assert decode_state(None) == decode_state(b"") == NodeState()
    assert begin_incarnation(state).incarnation == 4
    for damage in (b"{", b"[]", b'{"incarnation": "x"}'):
        with pytest.raises(Refused, match="state file"):
            decode_state(damage)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": "Web"}, "a name is"),
        ({"driver": "qemu"}, "not built"),
        ({"argv": ()}, "argv"),
        ({"stateless": True}, "not stateless"),
        ({"disks": (Disk("d", "i"), Disk("d", "j"))}, "one name"),
        ({"disks": (Disk("d", "i"), Disk("e", "i"))}, "one image"),
        ({"disks": (Disk("d", "i", "x"), Disk("e", "j", "y"))}, "one diskd"),
        ({"resiliency_period_ns": -2}, "resiliency_period"),
    ],
)
def test_vms_that_cannot_run_are_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        check_vm(attrs.evolve(DISKED, **changes))


def test_a_run_that_was_stopped_while_it_was_held_has_brought_no_disks() -> None:
    assert not any(run(state).has_disks() for state in ("fencing", "held", "stopped", "failed"))
    assert not run("held", leased=1).has_disks()
    assert run("stopped", leased=1).has_disks()
    assert all(run(state).has_disks() for state in ("starting", "online", "stalled", "stopping"))

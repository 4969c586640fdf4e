"""Tables of the mass-failure brake: what is one, who is held, what lets go, what follows for a failover."""

import attrs
import pytest

from clusterd.core import brake
from clusterd.core.brake import Losses, is_mass, judged, returns_needed, struck, suspected
from clusterd.core.events import StoreEntry
from clusterd.core.failover import Facts, judge
from clusterd.core.properties import Properties, parse_properties, property_document
from clusterd.core.records import (
    Assignment,
    BrakedNode,
    BrakeRecord,
    HeldItem,
    Run,
    VmRequest,
    VmSpec,
    Window,
    decode_record,
    encode_record,
    kind_of,
)
from clusterd.core.store_view import StoreView
from clusterd.core.types import Disk, VmConfig
from clusterd.errors import Refused
from daemonkit.units import SECOND

P = Properties()
T = P.isolation_ns
FOUR = ("n1", "n2", "n3", "n4")


@pytest.mark.parametrize(
    ("lost", "members", "share", "expected"),
    [
        (1, 1, 0.5, False),
        (1, 2, 0.5, False),  # one of two is one member
        (1, 3, 0.0, False),
        (2, 3, 0.5, True),
        (2, 4, 0.5, True),
        (2, 5, 0.5, False),
        (3, 5, 0.5, True),
        (3, 4, 1.0, False),
        (2, 64, 0.0, True),
        (11, 20, 0.55, True),  # 0.55 * 20 is more than 11 in floating point
        (7, 10, 0.7, True),
        (6, 10, 0.7, False),
    ],
)
def test_what_is_a_mass_failure(lost: int, members: int, share: float, expected: bool) -> None:
    assert is_mass(lost, members, attrs.evolve(P, mass_failure_brake=share)) is expected


@pytest.mark.parametrize(
    ("ages", "counted", "expected"),
    [
        ({"n1": 0, "n2": 0}, FOUR, {"n1", "n2"}),
        ({"n1": T, "n2": 0}, FOUR, {"n1", "n2"}),
        ({"n1": T + 1, "n2": 0}, FOUR, set()),
        ({"n1": 2 * T, "n2": T, "n3": 0}, FOUR, {"n1", "n2", "n3"}),  # two pairs, each of them half
        ({"n1": 9 * T, "n2": 1, "n3": 0}, FOUR, {"n2", "n3"}),
        ({"n1": 0, "n2": -1}, FOUR, set()),  # an announced restart
        ({"n1": 0, "n2": 0, "n9": 0}, FOUR, {"n1", "n2", "n9"}),  # does not count, but is held as well
        ({"n1": 0, "n9": 0}, FOUR, set()),
        ({"n1": 0, "n2": 0}, ("n1", "n2", "n3", "n4", "n5"), set()),
        ({}, (), set()),
    ],
)
def test_who_was_lost_in_one(ages: dict[str, int], counted: tuple[str, ...], expected: set[str]) -> None:
    assert struck(Losses(ages, counted), P) == expected


def test_who_is_silent_makes_the_lost_suspected() -> None:
    losses = Losses({"n1": T // 2}, FOUR)
    assert suspected(losses, ["n2"], P) == {"n1"}
    assert suspected(losses, [], P) == set()
    assert suspected(Losses({"n1": 2 * T}, FOUR), ["n2"], P) == set()


BOTH_LOST = {"n1": 5 * T, "n2": 5 * T}
CASES = [
    ("engages", {}, BOTH_LOST, {}, {"n1": "held", "n2": "held"}),
    ("one is back", {"n1": "held", "n2": "held"}, {"n2": 5 * T}, {}, {"n2": "held"}),
    ("for long", {"n1": "held", "n2": "held"}, {"n2": T}, {"enough": T}, {"n2": "spared"}),
    ("not yet", {"n1": "held", "n2": "held"}, {"n2": T}, {"enough": T - 1}, {"n2": "held"}),
    ("both away", {"n1": "held", "n2": "held"}, {"n1": 3 * T, "n2": 0}, {}, {"n1": "held", "n2": "held"}),
    ("proof", {"n1": "held", "n2": "held"}, BOTH_LOST, {"proven": ["n1"]}, {"n1": "proven", "n2": "held"}),
    ("let go", {"n1": "released", "n2": "held"}, BOTH_LOST, {}, {"n1": "released", "n2": "held"}),
    ("let go twice", {"n1": "released", "n2": "expired"}, BOTH_LOST, {}, {"n1": "released", "n2": "expired"}),
    ("closing", {"n1": "held", "n2": "held"}, {"n2": T}, {"unsettled": ["n1"]}, {"n1": "back", "n2": "held"}),
    ("closed", {"n1": "back"}, {}, {}, {}),
    ("lost alone", {"n1": "back"}, {"n1": 0}, {"unsettled": ["n1"]}, {}),
    ("struck again", {"n1": "spared"}, {"n1": T, "n2": 0}, {}, {"n1": "held", "n2": "held"}),
    ("not struck", {"n1": "spared"}, {"n1": 9 * T}, {}, {"n1": "spared"}),
    (
        "one more, later",
        {"n1": "held", "n2": "held"},
        {**BOTH_LOST, "n3": 0},
        {},
        {"n1": "held", "n2": "held", "n3": "spared"},
    ),
]


@pytest.mark.parametrize(("name", "before", "ages", "more", "after"), CASES)
def test_what_follows(name: str, before: dict, ages: dict, more: dict, after: dict) -> None:  # type: ignore[type-arg]
    record = BrakeRecord({node: BrakedNode(state) for node, state in before.items()})
    facts = {key: value for key, value in more.items() if key != "enough"}
    result = judged(record, Losses(ages, FOUR, **facts), P, more.get("enough"))
    assert {node: braked.state for node, braked in result.nodes.items()} == after


def test_a_hold_ends_when_its_time_is_over_and_not_before() -> None:
    limited = attrs.evolve(P, mass_failure_hold_ns=60 * SECOND)
    record = BrakeRecord({"n1": BrakedNode("held", 60 * SECOND - 1), "n2": BrakedNode("held", 60 * SECOND)})
    result = judged(record, Losses(BOTH_LOST, FOUR), limited)
    assert [result.nodes[name].state for name in ("n1", "n2")] == ["held", "expired"]
    assert judged(record, Losses(BOTH_LOST, FOUR), P).held() == ["n1", "n2"]


def test_one_that_leaves_or_is_drained_meanwhile_is_still_one_of_the_lost() -> None:
    record = BrakeRecord({"n1": BrakedNode("held"), "n2": BrakedNode("held")})
    assert judged(record, Losses(BOTH_LOST, ("n2", "n3", "n4")), P, 9 * T).held() == ["n1", "n2"]


def test_how_many_must_be_back() -> None:
    record = BrakeRecord({name: BrakedNode("held") for name in ("n1", "n2", "n3")})
    assert returns_needed(record, FOUR, P) == 2
    assert returns_needed(record, FOUR, attrs.evolve(P, mass_failure_brake=0.75)) == 1
    assert returns_needed(record, FOUR, attrs.evolve(P, mass_failure_brake=1.0)) == 0


# -- the verdict

DISKED = VmConfig("web", argv=("x",), disks=(Disk("d", "web"),))
DISKLESS = VmConfig("web", argv=("x",))
OVER, OPEN = Window(240 * SECOND), Window(0)
ORDERED = VmRequest("failover")


@pytest.mark.parametrize(
    ("config", "grip", "more", "kind"),
    [
        (DISKED, "", {}, "start"),
        (DISKED, "held", {}, "hold"),
        (DISKED, "suspected", {}, "window"),
        (DISKED, "held", {"window": OPEN}, "window"),
        (DISKED, "held", {"proven_dead": True}, "start"),
        (DISKED, "held", {"request": ORDERED}, "start"),
        (DISKED, "suspected", {"request": ORDERED}, "start"),
        (DISKED, "held", {"owner_in_contact": True}, "rest"),
        (attrs.evolve(DISKED, resiliency_period_ns=0), "held", {"window": OPEN}, "hold"),
        (attrs.evolve(DISKED, resiliency_period_ns=-1), "held", {}, "window"),
        (attrs.evolve(DISKLESS, stateless=True), "held", {}, "hold"),
    ],
)
def test_a_failover_that_is_due_waits(config: VmConfig, grip: brake.Grip, more: dict, kind: str) -> None:  # type: ignore[type-arg]
    facts = {"owner_in_contact": False, "window": OVER, "grip": grip, **more}
    run = Run("n1", 5, "online", "boot")
    verdict = judge(Facts(VmSpec(config), Assignment("n1", 5), run, **facts), P)
    assert verdict.kind == kind
    if kind == "hold":
        assert "mass failure" in verdict.why
        assert "hold release failover-web" in verdict.ends_when


def test_s2_comes_first_and_what_never_began_waits_for_nothing() -> None:
    lost = {"owner_in_contact": False, "window": OVER, "grip": "held"}
    run = Run("n1", 5, "online", "boot")
    assert "no disks to fence" in judge(Facts(VmSpec(DISKLESS), Assignment("n1", 5), run, **lost), P).why
    assert judge(Facts(VmSpec(DISKED), Assignment("n1", 5), None, **lost), P).kind == "start"


# -- properties and records


def test_the_hold_is_a_time_or_never_and_never_nothing() -> None:
    assert parse_properties({"mass_failure_hold": "10m"}).mass_failure_hold_ns == 600 * SECOND
    assert property_document({"mass_failure_hold": "10m"})["mass_failure_hold"] == 600.0
    assert property_document({})["mass_failure_hold"] == "never"
    for text, reason in (("0s", "more than 0"), ("later", "write it like"), ("5", "write it like")):
        with pytest.raises(Refused, match=reason):
            parse_properties({"mass_failure_hold": text})


def test_the_record_has_a_key_of_its_own_and_nodes_skip_keys_that_they_do_not_know() -> None:
    record = BrakeRecord({"n1": BrakedNode("held", 5), "n2": BrakedNode("released", counts=False)})
    assert kind_of("brake") is BrakeRecord
    assert decode_record(BrakeRecord, "brake", encode_record(record)) == record
    view = StoreView("/p/")
    unknown = StoreEntry("/p/brake2", b'{"later": 1}', 3, 3)
    assert view.replace(3, (StoreEntry("/p/brake", encode_record(record), 2, 2), unknown))
    assert view.brake() == record
    assert list(view.seen) == ["brake"]
    # What is shown as held, and the records of nodes, are read by nodes of before there was a brake.
    assert [field.name for field in attrs.fields(HeldItem)] == ["id", "kind", "subject", "why", "ends_when"]
    assert [field.name for field in attrs.fields(Window)] == [
        "elapsed_ns",
        "grace_ns",
        "incarnation",
        "counts",
        "ended",
    ]

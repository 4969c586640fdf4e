"""The state of a lab's links: what is cut, what heals, what is refused."""

import pytest

from daemonkit.errors import OperatorError
from holdfast.lab.links import Fault, Link, LinkChange, LinkState, LinkTable, both_ways, links_of

ENDS = ["n1", "n2", "n3", "store", "diskd", "target"]
AB = Link("n1", "n2")


def test_lab_links_cut_is_directed_and_heals() -> None:
    table = LinkTable(ENDS)
    assert table.is_open(AB, None) and table.faults() == []
    table.change(LinkChange([AB], is_cut=True))
    assert not table.is_open(AB, None) and not table.is_open(AB, "a")
    assert table.is_open(AB.reverse, None)
    assert table.faults() == [LinkState(AB, Fault(is_cut=True))]
    table.heal([AB])
    assert table.is_open(AB, None) and table.faults() == []


def test_lab_links_networks_are_cut_one_by_one() -> None:
    table = LinkTable(ENDS)
    table.change(LinkChange([AB], network="a", is_cut=True))
    table.change(LinkChange([AB], network="b", is_cut=True))
    assert not table.is_open(AB, "a") and not table.is_open(AB, "b") and table.is_open(AB, None)
    table.change(LinkChange([AB], network="a", is_cut=False))
    assert table.is_open(AB, "a") and not table.is_open(AB, "b")
    table.change(LinkChange([AB], is_cut=False))
    assert table.is_open(AB, "b") and table.faults() == []


def test_lab_links_delay_and_loss_stay_when_a_cut_comes() -> None:
    table = LinkTable(ENDS)
    table.change(LinkChange([AB], delay_ns=5, loss=0.25))
    table.change(LinkChange([AB], is_cut=True))
    assert table.fault(AB) == Fault(is_cut=True, delay_ns=5, loss=0.25)
    table.change(LinkChange([AB], delay_ns=0, loss=0.0, is_cut=False))
    assert table.faults() == []


def test_lab_links_without_power_nothing_heals() -> None:
    table = LinkTable(ENDS)
    table.power("n1", is_on=False)
    table.heal(None)
    assert table.off() == ["n1"]
    assert not table.is_open(AB, "a") and not table.is_open(AB.reverse, None)
    assert table.is_open(Link("n2", "n3"), None)
    table.power("n1", is_on=True)
    assert table.is_open(AB, "a")


def test_lab_links_of_an_end() -> None:
    cut = links_of("n1", ENDS, without=("diskd", "target"))
    assert set(cut) == {link for other in ("n2", "n3", "store") for link in both_ways("n1", other)}
    assert len(links_of("n1", ENDS)) == 10


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (LinkChange([Link("n1", "n9")], is_cut=True), "n9"),
        (LinkChange([AB, Link("n1", "n1")], is_cut=True), "two ends"),
        (LinkChange([AB], loss=1.5), "share"),
        (LinkChange([AB], delay_ns=-1), "delay"),
        (LinkChange([AB] * 9000, is_cut=True), "at most"),
    ],
)
def test_lab_links_refusals_change_nothing(change: LinkChange, reason: str) -> None:
    table = LinkTable(ENDS)
    with pytest.raises(OperatorError, match=reason):
        table.change(change)
    assert table.faults() == []

"""A lab's addresses: all different, and no part is told how to reach another but through a proxy."""

import itertools
import tomllib

import pytest

from daemonkit.errors import OperatorError
from holdfast.lab.cluster import effective_properties
from holdfast.lab.layout import Layout, node_document, plan, to_toml


def a_layout(nodes: int = 3, networks: int = 2) -> Layout:
    return plan(nodes, networks, iter(range(20_000, 30_000)))


def document(layout: Layout, node: str) -> dict:
    return node_document(layout, node, key_file="/k", data_dir="/d", boot_id_file="/b")


def test_lab_layout_gives_every_listener_its_own_address() -> None:
    layout = a_layout()
    listens = [*layout.direct.values(), *(route.listen for route in layout.routes)]
    assert len(set(listens)) == len(listens)
    assert {route.target for route in layout.routes} == set(layout.direct.values()) - {layout.direct["proxy"]}
    assert layout.ends == ["n1", "n2", "n3", "store", "diskd", "target"]


@pytest.mark.parametrize("node", ["n1", "n3"])
def test_lab_layout_tells_a_node_proxied_addresses_only(node: str) -> None:
    layout = a_layout()
    told = document(layout, node)
    own = {told["control"], *(network["listen"] for network in told["networks"])}
    others = set(layout.direct.values()) - own
    text = to_toml(told)
    assert not any(f'"{address}"' in text or f"//{address}" in text for address in others)
    by_listen = {route.listen: route for route in layout.routes}
    for peer, entry in told["peers"].items():
        route = by_listen[entry["control"]]
        assert (route.source, route.destination, route.kind) == (node, peer, "tcp")
        for network, address in entry["networks"].items():
            route = by_listen[address]
            assert (route.source, route.destination, route.network) == (node, peer, network)
    assert by_listen[told["store"][0].removeprefix("http://")].destination == "store"
    assert by_listen[told["diskd"]["main"]["nbd"]].destination == "diskd"


def test_lab_layout_writes_toml_that_reads_back() -> None:
    layout = a_layout()
    told = document(layout, "n2")
    assert tomllib.loads(to_toml(told)) == told
    odd = {"a": 'q"uo\\te', "b": True, "n": 3, "l": ["x", "y"], "t": {"u": {"v": "w"}}, "e": []}
    assert tomllib.loads(to_toml(odd)) == odd


@pytest.mark.parametrize(("nodes", "networks"), [(0, 1), (33, 1), (3, 0), (3, 5)])
def test_lab_layout_refuses_impossible_counts(nodes: int, networks: int) -> None:
    with pytest.raises(OperatorError, match="a lab has"):
        plan(nodes, networks, itertools.count(1))


def test_lab_properties_follow_each_other() -> None:
    assert effective_properties({}) == {
        "heartbeat_interval": "200ms",
        "heartbeat_threshold": "5",
        "store_session": "2s",
    }
    slower = effective_properties({"heartbeat_interval": "1s", "heartbeat_threshold": "10"})
    assert slower["store_session"] == "20s"
    assert effective_properties({"store_session": "7s"})["store_session"] == "7s"
    assert "store_session" not in effective_properties({"heartbeat_interval": "soon"})

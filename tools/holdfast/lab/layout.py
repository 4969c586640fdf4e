"""Where everything of a lab listens, and what each part is told about the others: pure.

Every part has a *direct* address, which lab.json publishes; what the parts are told about each other are
the addresses of routes through the link proxies. So an operator always gets through, and the parts
meet only where the lab can cut.
"""

from collections.abc import Iterator
from typing import Any, Final

import attrs

from daemonkit.errors import OperatorError
from holdfast.lab.links import DISKD, STORE, TARGET
from holdfast.lab.proxy import ProxyConfig, Route

HOST: Final = "127.0.0.1"
CLUSTER: Final = "lab"
DISKD_NAME: Final = "main"
NODES_MAX: Final = 32  # A lab is one machine; beyond this its own load would be the fault under test.
NETWORKS_MAX: Final = 4
NODE_MEMORY: Final = "4GiB"
NODE_VCPUS: Final = 64


@attrs.frozen
class Layout:
    """``direct``: name of a listener -> its address; ``routes``: through the proxies. ``diskd_per_node``:
    each node has a diskd of its own, over the one storage; the lab's own only makes images."""

    nodes: list[str]
    networks: list[str]
    direct: dict[str, str]
    routes: list[Route]
    diskd_per_node: bool = False

    @property
    def ends(self) -> list[str]:
        return [*self.nodes, STORE, DISKD, TARGET]

    def proxied(self, source: str, listener: str) -> str:
        """The address at which ``source`` reaches ``listener``."""
        target = self.direct[listener]
        for route in self.routes:
            if route.source == source and route.target == target:
                return route.listen
        raise OperatorError(f"no route leads from {source} to {listener}")

    def proxy_config(self, seed: int) -> ProxyConfig:
        return ProxyConfig(self.ends, self.direct["proxy"], self.routes, seed)


def plan(
    node_count: int, network_count: int, ports: Iterator[int], *, diskd_per_node: bool = False
) -> Layout:
    """A layout on ``ports``. Raises OperatorError for impossible counts."""
    if not 1 <= node_count <= NODES_MAX:
        raise OperatorError(f"a lab has 1 to {NODES_MAX} nodes, not {node_count}")
    if not 1 <= network_count <= NETWORKS_MAX:
        raise OperatorError(f"a lab has 1 to {NETWORKS_MAX} networks, not {network_count}")

    def address() -> str:
        return f"{HOST}:{next(ports)}"

    nodes = [f"n{number}" for number in range(1, node_count + 1)]
    networks = ["abcd"[number] for number in range(network_count)]
    direct = {name: address() for name in ("proxy", "store", "diskd.nbd", "diskd.control", "target")}
    for node in nodes:
        direct[f"{node}.control"] = address()
        direct |= {f"{node}.{network}": address() for network in networks}
        if diskd_per_node:
            direct |= {f"{node}.diskd.{part}": address() for part in ("nbd", "control")}
    routes = [Route(DISKD, TARGET, "tcp", address(), direct["target"])]
    for node in nodes:
        routes.append(Route(node, STORE, "tcp", address(), direct["store"]))
        routes += [
            Route(node, DISKD, "tcp", address(), direct[name]) for name in ("diskd.nbd", "diskd.control")
        ]
        for peer in nodes:
            if peer != node:
                routes.append(Route(node, peer, "tcp", address(), direct[f"{peer}.control"]))
                routes += [
                    Route(node, peer, "udp", address(), direct[f"{peer}.{network}"], network)
                    for network in networks
                ]
    return Layout(nodes, networks, direct, routes, diskd_per_node)


def node_document(
    layout: Layout, node: str, *, key_file: str, data_dir: str, boot_id_file: str
) -> dict[str, Any]:
    """NODE.toml's content: this node's view, in which everything else lies behind a proxy."""
    return {
        "name": node,
        "cluster": CLUSTER,
        "key_files": [key_file],
        "control": layout.direct[f"{node}.control"],
        "store": [f"http://{layout.proxied(node, 'store')}"],
        "memory": NODE_MEMORY,
        "vcpus": NODE_VCPUS,
        "data_dir": data_dir,
        "boot_id_file": boot_id_file,
        "reference_addresses": [],
        "networks": [{"name": name, "listen": layout.direct[f"{node}.{name}"]} for name in layout.networks],
        "peers": {
            peer: {
                "control": layout.proxied(node, f"{peer}.control"),
                "networks": {name: layout.proxied(node, f"{peer}.{name}") for name in layout.networks},
            }
            for peer in layout.nodes
            if peer != node
        },
        "diskd": {DISKD_NAME: _diskd_of(layout, node)},
    }


def _diskd_of(layout: Layout, node: str) -> dict[str, str]:
    """Its own is beside it: there is no link to cut."""
    if layout.diskd_per_node:
        return {part: layout.direct[f"{node}.diskd.{part}"] for part in ("nbd", "control")}
    return {part: layout.proxied(node, f"diskd.{part}") for part in ("nbd", "control")}


def to_toml(document: dict[str, Any], prefix: str = "") -> str:
    """TOML of strings, whole numbers, booleans, lists of strings, tables and lists of tables."""
    plain, tables = [], []
    for key, value in document.items():
        if isinstance(value, dict):
            tables.append(f"[{prefix}{key}]\n{to_toml(value, f'{prefix}{key}.')}")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            tables += [f"[[{prefix}{key}]]\n{to_toml(entry, f'{prefix}{key}.')}" for entry in value]
        else:
            plain.append(f"{key} = {_toml_value(value)}\n")
    return "".join(plain) + "".join(tables)


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list):
        return f"[{', '.join(_toml_value(entry) for entry in value)}]"
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'

"""NODE.toml and VM files: text into frozen values, strictly.

An unknown key is an error that names the nearest known one; durations and sizes carry units; what cannot
work together is refused here, with the reason, before anything is started.
"""

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import attrs
import tomlkit
from tomlkit.exceptions import TOMLKitError

from clusterd.core.types import (
    NEVER,
    NODES_MAX,
    Disk,
    VmConfig,
    check_name,
    check_vm,
)
from clusterd.errors import Refused
from daemonkit.durable import read_small_file
from daemonkit.errors import OperatorError
from daemonkit.hooks import check_hooks
from daemonkit.ports import Address
from daemonkit.schema import structure
from daemonkit.toml_text import NotToml, parse_toml
from daemonkit.units import UnitError, parse_duration, parse_size

VM_FILE_BYTES_MAX: Final = 64 << 10  # it travels in one store record
NETWORKS_MAX: Final = 4
STORES_MAX: Final = 9
DISKDS_MAX: Final = 64
KEYS_MAX: Final = 2  # the one in use, and the next or the previous one while keys are changed
REFERENCES_MAX: Final = 4
BOOT_ID_FILE: Final = "/proc/sys/kernel/random/boot_id"
_DISK_PLACEHOLDER: Final = re.compile(r"\{disk:([^{}]*)\}")


@attrs.frozen
class _NetworkTable:
    name: str
    listen: str


@attrs.frozen
class _PeerTable:
    control: str
    networks: dict[str, str]


@attrs.frozen
class _DiskdTable:
    nbd: str
    control: str


@attrs.frozen
class _NodeTable:
    """NODE.toml as written."""

    name: str
    cluster: str
    key_files: list[str]
    control: str
    store: list[str]
    memory: str
    vcpus: int
    data_dir: str
    networks: list[_NetworkTable]
    boot_id_file: str = BOOT_ID_FILE
    reference_addresses: list[str] = attrs.field(factory=list)
    fence_command: list[str] = attrs.field(factory=list)
    peers: dict[str, _PeerTable] = attrs.field(factory=dict)
    diskd: dict[str, _DiskdTable] = attrs.field(factory=dict)


@attrs.frozen
class PeerAddresses:
    """Where this node reaches a peer."""

    control: Address
    networks: dict[str, Address]


@attrs.frozen
class DiskdAddresses:
    nbd: Address
    control: Address


@attrs.frozen
class NodeConfig:
    """NODE.toml, checked. ``networks``: name -> the address to listen on."""

    name: str
    cluster: str
    key_files: tuple[Path, ...]
    control: Address
    store: tuple[str, ...]
    memory_bytes: int
    vcpus: int
    data_dir: Path
    networks: dict[str, Address]
    boot_id_file: Path
    reference_addresses: tuple[str, ...]
    peers: dict[str, PeerAddresses]
    diskd: dict[str, DiskdAddresses]


def read_node_config(path: Path) -> NodeConfig:
    """NODE.toml. Raises OperatorError, one line: file, place, what is wrong."""
    document = _load(path, _read(path))
    try:
        return _check_node(structure(_NodeTable, document), path.parent)
    except (OperatorError, UnitError) as error:
        raise OperatorError(f"{path}: {error}") from error


def _read(path: Path) -> bytes:
    try:
        return read_small_file(path, size_bytes_max=1 << 20)
    except OSError as error:
        raise OperatorError(f"{path}: {error.strerror}") from error


def _load(where: object, data: bytes) -> dict[str, Any]:
    try:
        return parse_toml(data.decode("utf-8"))
    except (NotToml, UnicodeDecodeError) as error:
        raise OperatorError(f"{where}: not a TOML file: {error}") from error


def _check_node(table: _NodeTable, base: Path) -> NodeConfig:
    if not 1 <= len(table.key_files) <= KEYS_MAX:
        raise Refused(f"key_files: name one or {KEYS_MAX} files with a cluster key")
    if table.fence_command:
        raise Refused("fence_command: not built; after power-off use `clusterctl node confirm-dead NODE`")
    if not 1 <= len(table.networks) <= NETWORKS_MAX:
        raise Refused(f"networks: name 1 to {NETWORKS_MAX}")
    if table.vcpus < 1:
        raise Refused("vcpus: at least 1")
    networks = {
        check_name(network.name, "network"): _heartbeat_address(network.listen, f"networks.{network.name}")
        for network in table.networks
    }
    if len(networks) < len(table.networks):
        raise Refused("networks: two have one name")
    if len(table.diskd) > DISKDS_MAX or len(table.reference_addresses) > REFERENCES_MAX:
        raise Refused(f"at most {DISKDS_MAX} diskd and {REFERENCES_MAX} reference_addresses")
    return NodeConfig(
        name=check_name(table.name, "name"),
        cluster=check_name(table.cluster, "cluster"),
        key_files=tuple(_path(base, name, "key_files") for name in table.key_files),
        control=_address(table.control, "control"),
        store=_check_store(table.store),
        memory_bytes=_size(table.memory, "memory"),
        vcpus=table.vcpus,
        data_dir=_path(base, table.data_dir, "data_dir"),
        networks=networks,
        boot_id_file=_path(base, table.boot_id_file, "boot_id_file"),
        reference_addresses=tuple(_reference(text) for text in table.reference_addresses),
        peers=_check_peers(table, networks),
        diskd={
            check_name(name, "diskd"): DiskdAddresses(
                _address(diskd.nbd, f"diskd.{name}.nbd"), _address(diskd.control, f"diskd.{name}.control")
            )
            for name, diskd in table.diskd.items()
        },
    )


def _check_peers(table: _NodeTable, networks: dict[str, Address]) -> dict[str, PeerAddresses]:
    if table.name in table.peers:
        raise Refused(f"peers.{table.name}: a node is not its own peer")
    if len(table.peers) >= NODES_MAX:
        raise Refused(f"peers: a cluster has at most {NODES_MAX} nodes")
    peers = {}
    for name, peer in table.peers.items():
        where = f"peers.{check_name(name, 'peer')}"
        for network in peer.networks:
            if network not in networks:
                raise Refused(f"{where}.networks.{network}: this node has no network of that name")
        if not peer.networks:
            raise Refused(f"{where}.networks: at least one network must lead to it")
        peers[name] = PeerAddresses(
            _address(peer.control, f"{where}.control"),
            {
                network: _heartbeat_address(text, f"{where}.networks.{network}")
                for network, text in peer.networks.items()
            },
        )
    return peers


def _check_store(urls: list[str]) -> tuple[str, ...]:
    if not 1 <= len(urls) <= STORES_MAX:
        raise Refused(f"store: name 1 to {STORES_MAX} addresses, for example http://127.0.0.1:2379")
    for url in urls:
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            good = False
        if not good:
            raise Refused(f"store: {url!r} is not an address like http://127.0.0.1:2379")
    return tuple(urls)


def _path(base: Path, text: str, where: str) -> Path:
    """Relative to the file that names it. Empty would quietly mean that file's own directory."""
    if not text or "\0" in text:
        raise Refused(f"{where}: {text!r} is not a path")
    return base / text


def _address(text: str, where: str) -> Address:
    try:
        return Address.parse(text)
    except OperatorError as error:
        raise Refused(f"{where}: {error}") from error


def _heartbeat_address(text: str, where: str) -> Address:
    address = _address(text, where)
    try:
        ipaddress.ip_address(address.host)
    except ValueError:
        # A name would have to be resolved, and a heartbeat must not wait for a name service.
        raise Refused(f"{where}: {address.host!r} must be a numeric address") from None
    return address


def _reference(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise Refused(f"reference_addresses: {text!r} is not a numeric IP address") from None


def _size(text: str, where: str) -> int:
    try:
        return parse_size(text)
    except UnitError as error:
        raise Refused(f"{where}: {error}") from error


@attrs.frozen
class _DiskTable:
    name: str
    image: str
    diskd: str = "main"


@attrs.frozen
class _VmTable:
    """A VM file as written. Values of tables that are not built stay unread: they are refused."""

    name: str
    driver: str = "process"
    argv: list[str] = attrs.field(factory=list)
    memory: str = "0"
    vcpus: int = 1
    priority: int = 0
    preferred_nodes: list[str] = attrs.field(factory=list)
    anti_affinity: Any = None
    resiliency_period: Any = None
    stateless: bool = False
    disks: list[_DiskTable] = attrs.field(factory=list)
    hooks: Any = None
    qemu: Any = None


def read_vm_file(path: Path) -> VmConfig:
    """A VM file. Raises OperatorError, one line: file, place, what is wrong."""
    try:
        text = _read(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise OperatorError(f"{path}: not a TOML file: {error}") from error
    return parse_vm(text, where=str(path))


def parse_vm(text: str, *, where: str) -> VmConfig:
    """The text of a VM file. Raises OperatorError, beginning with ``where``."""
    data = text.encode()
    if len(data) > VM_FILE_BYTES_MAX:
        raise OperatorError(f"{where}: a VM file has at most {VM_FILE_BYTES_MAX} bytes")
    document = _load(where, data)
    try:
        return _check_vm_table(structure(_VmTable, document), text)
    except (OperatorError, UnitError) as error:
        raise OperatorError(f"{where}: {error}") from error


def _check_vm_table(table: _VmTable, text: str) -> VmConfig:
    if table.driver == "qemu" or table.qemu is not None:
        raise Refused("driver 'qemu' and the table [qemu] are not built; use driver = \"process\" with argv")
    if table.hooks is not None:
        check_hooks(table.hooks)  # diskd runs them around the cut of a backup
    if table.anti_affinity is not None:
        raise Refused("anti_affinity is not built; use preferred_nodes")
    for node in table.preferred_nodes:
        check_name(node, "preferred node")
    for disk in table.disks:
        check_name(disk.diskd, "diskd")
    for name in _DISK_PLACEHOLDER.findall(" ".join(table.argv)):
        if name not in [disk.name for disk in table.disks]:
            raise Refused(f"argv: {{disk:{name}}} names a disk that is not under [[disks]]")
    config = VmConfig(
        name=table.name,
        driver=table.driver,
        argv=tuple(table.argv),
        memory_bytes=_size(table.memory, "memory"),
        vcpus=table.vcpus,
        priority=table.priority,
        preferred_nodes=tuple(table.preferred_nodes),
        resiliency_period_ns=_resiliency_period(table.resiliency_period),
        stateless=table.stateless,
        disks=tuple(Disk(disk.name, disk.image, disk.diskd) for disk in table.disks),
        text=text,
    )
    return check_vm(config)


def _resiliency_period(value: object) -> int | None:
    if value is None:
        return None
    if value in (0, "0") and not isinstance(value, bool):
        return 0
    if value in (-1, "-1"):
        return NEVER
    if isinstance(value, str):
        return parse_duration(value)
    raise Refused(f'resiliency_period: {value!r} is not a duration like "4m", 0 (at once) or -1 (never)')


def renamed_vm(text: str, *, name: str, images: Mapping[str, str], diskd: str) -> str:
    """A VM file's text with another VM name, other images (by disk name) and another diskd; all else stays as
    it is, comments included. Raises OperatorError where it is not a VM file."""
    parse_vm(text, where="the backup's VM file")
    try:
        document = tomlkit.parse(text)
        document["name"] = name
        for disk in document.get("disks", []):
            disk["image"] = images.get(disk["name"], disk["image"])
            if disk.get("diskd", "main") != diskd:
                disk["diskd"] = diskd
        return tomlkit.dumps(document)
    except (TOMLKitError, KeyError, TypeError) as error:
        raise OperatorError(f"the backup's VM file cannot be changed: {error}") from error

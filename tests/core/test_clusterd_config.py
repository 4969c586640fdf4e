"""NODE.toml and VM files: what is good is read, what is wrong is named."""

from pathlib import Path

import pytest

from clusterd.config import parse_vm, read_node_config
from clusterd.core.types import NEVER, Disk
from daemonkit.errors import OperatorError
from daemonkit.ports import Address
from daemonkit.units import SECOND, GiB, MiB

NODE = """
name = "n1"
cluster = "lab"
key_files = ["key"]
control = "127.0.0.1:7101"
store = ["http://127.0.0.1:7301"]
memory = "4GiB"
vcpus = 4
data_dir = "n1"
[[networks]]
name = "a"
listen = "127.0.0.1:7201"
[peers.n2]
control = "127.0.0.1:8102"
networks.a = "127.0.0.1:8202"
[diskd.main]
nbd = "127.0.0.1:8501"
control = "127.0.0.1:8502"
"""
VM = """
name = "web"
argv = ["guest", "--disk", "{disk:journal}"]
memory = "64MiB"
vcpus = 2
priority = 5
preferred_nodes = ["n1"]
resiliency_period = "30s"
[[disks]]
name = "journal"
image = "web-journal"
"""


def test_a_node_file(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text(NODE)
    config = read_node_config(path)
    assert (config.name, config.cluster, config.vcpus, config.memory_bytes) == ("n1", "lab", 4, 4 * GiB)
    assert config.key_files == (tmp_path / "key",)
    assert config.data_dir == tmp_path / "n1"
    assert config.networks == {"a": Address("127.0.0.1", 7201)}
    assert config.peers["n2"].networks == {"a": Address("127.0.0.1", 8202)}
    assert config.diskd["main"].control == Address("127.0.0.1", 8502)
    assert str(config.boot_id_file) == "/proc/sys/kernel/random/boot_id"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("cluster =", "clutser =", "unknown key 'clutser', did you mean 'cluster'?"),
        ('cluster = "lab"\n', "", "'cluster' is missing"),
        ("vcpus = 4", 'vcpus = "4"', "vcpus: expected int, found str"),
        ("vcpus = 4", "vcpus = 0", "vcpus: at least 1"),
        ("4GiB", "4 elephants", "memory: '4 elephants' is not a size"),
        ('"n1"\ncluster', '"N 1"\ncluster', "name 'N 1': a name is"),
        ("127.0.0.1:7101", "127.0.0.1", "control: '127.0.0.1' is not an address"),
        ("127.0.0.1:7201", "localhost:7201", "networks.a: 'localhost' must be a numeric address"),
        ("networks.a = ", "networks.z = ", "peers.n2.networks.z: this node has no network of that name"),
        ("[peers.n2]", "[peers.n1]", "peers.n1: a node is not its own peer"),
        ('["http://127.0.0.1:7301"]', "[]", "store: name 1 to"),
        ("http://127.0.0.1:7301", "127.0.0.1:7301", "is not an address like http://"),
        ('["key"]', "[]", "key_files: name one or 2"),
        ("vcpus = 4", 'vcpus = 4\nfence_command = ["off"]', "fence_command: not built"),
        ("vcpus = 4", 'vcpus = 4\nreference_addresses = ["gateway"]', "is not a numeric IP address"),
        ("name =", "name", "not a TOML file"),
    ],
)
def test_a_wrong_node_file_is_one_line(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "node.toml"
    assert old in NODE
    path.write_text(NODE.replace(old, new, 1))
    with pytest.raises(OperatorError) as caught:
        read_node_config(path)
    assert str(caught.value).startswith(str(path))
    assert says in str(caught.value)


def test_a_missing_node_file(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="No such file"):
        read_node_config(tmp_path / "none.toml")


def test_a_vm_file() -> None:
    config = parse_vm(VM, where="web.toml")
    assert (config.name, config.memory_bytes, config.vcpus, config.priority) == ("web", 64 * MiB, 2, 5)
    assert config.resiliency_period_ns == 30 * SECOND
    assert config.disks == (Disk("journal", "web-journal", "main"),)
    assert config.text == VM


@pytest.mark.parametrize(
    ("text", "period_ns"), [("0", 0), ("-1", NEVER), ('"-1"', NEVER), ('"4m"', 240 * SECOND)]
)
def test_a_window_of_its_own(text: str, period_ns: int) -> None:
    config = parse_vm(f'name = "web"\nargv = ["x"]\nresiliency_period = {text}\n', where="web.toml")
    assert config.resiliency_period_ns == period_ns


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("argv", "agrv", "unknown key 'agrv', did you mean 'argv'?"),
        ('"web"', '"Web/../1"', "VM 'Web/../1': a name is"),
        ("{disk:journal}", "{disk:system}", "{disk:system} names a disk that is not under [[disks]]"),
        ("priority = 5", "stateless = true", "a VM with disks is not stateless"),
        ("priority = 5", 'driver = "qemu"', "driver 'qemu' and the table [qemu] are not built"),
        ("priority = 5", 'driver = "docker"', "driver 'docker' is not built"),
        ("priority = 5", 'anti_affinity = "x"', "anti_affinity is not built"),
        ("image =", "size = 1\nimage =", "unknown key 'size'"),
        ('"30s"', "30", "is not a duration"),
        ('"30s"', "true", "is not a duration"),
        ('"30s"', '"30"', "is not a duration"),
        ('["guest", "--disk", "{disk:journal}"]', "[]", "argv needs 1 to"),
        ("vcpus = 2", "[hooks]\nfreeze = 1", "[hooks]: unknown key"),
    ],
)
def test_a_wrong_vm_file_is_one_line(old: str, new: str, says: str) -> None:
    assert old in VM
    with pytest.raises(OperatorError) as caught:
        parse_vm(VM.replace(old, new, 1), where="web.toml")
    assert str(caught.value).startswith("web.toml: ")
    assert says in str(caught.value)

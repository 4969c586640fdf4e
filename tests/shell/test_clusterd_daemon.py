"""How a node begins: its incarnation is durable before anything else, and what is unreadable is refused."""

from pathlib import Path

import pytest

from clusterd.config import NodeConfig, read_node_config
from clusterd.core.state import decode_state
from clusterd.shell.daemon import prepare
from clusterd.shell.references import any_answers, checksum
from daemonkit.errors import OperatorError

NODE = """
name = "n1"
cluster = "lab"
key_files = ["key"]
control = "127.0.0.1:0"
store = ["http://127.0.0.1:7301"]
memory = "4GiB"
vcpus = 4
data_dir = "data"
boot_id_file = "boot_id"
[[networks]]
name = "a"
listen = "127.0.0.1:0"
"""


@pytest.fixture
def config(tmp_path: Path) -> NodeConfig:
    (tmp_path / "node.toml").write_text(NODE)
    (tmp_path / "key").write_text("k" * 32)
    (tmp_path / "boot_id").write_text("boot-1\n")
    (tmp_path / "data").mkdir()
    return read_node_config(tmp_path / "node.toml")


def test_each_start_has_a_higher_incarnation_which_is_durable_first(config: NodeConfig) -> None:
    for incarnation in (1, 2, 3):
        node = prepare(config)
        assert node.state.incarnation == incarnation
        assert decode_state(node.state_path.read_bytes()).incarnation == incarnation
    assert node.identity.boot_id == "boot-1"
    assert node.identity.keys == (b"k" * 32,)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("data/state.json", b"{", "does not read back"),
        ("data/state.json", b'{"incarnation": 1, "extra": 2}', "does not read back"),
        ("boot_id", b"", "holds no boot id"),
        ("boot_id", b"\xff\xfe", "holds no boot id"),
        ("boot_id", None, "No such file"),
        ("key", b"short", "a key has at least"),
        ("key", None, "No such file"),
    ],
)
def test_what_does_not_read_is_refused_with_its_name(
    config: NodeConfig, tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OperatorError) as caught:
        prepare(config)
    assert says in str(caught.value)
    assert name in str(caught.value)


def test_a_damaged_state_is_left_as_it_is(config: NodeConfig, tmp_path: Path) -> None:
    (tmp_path / "data" / "state.json").write_bytes(b"precious")
    with pytest.raises(OperatorError):
        prepare(config)
    assert (tmp_path / "data" / "state.json").read_bytes() == b"precious"


def test_the_internet_checksum() -> None:
    assert checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0x220D  # RFC 1071, section 3
    assert checksum(b"\x01") == 0xFEFF


async def test_nobody_to_ask_is_no_answer() -> None:
    assert not await any_answers(())

"""Bad input, as a user gives it: one clear line and the right exit code, never a traceback, never a hang.

Every daemon and tool; what only one area has (VM files, exports) is tested with that area.
"""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from daemon_processes import BINARIES, node_toml

SCENARIO = Path(__file__).parents[2] / "scenarios" / "pulled-cable" / "scenario.toml"
NOBODY = "127.0.0.1:1"
KEY = "k" * 32
NODE = node_toml()
pytestmark = [pytest.mark.slow, pytest.mark.e2e]


def run(directory, program, *arguments, **environment):
    """The outcome of a console script, or of ``python -m`` for a dotted name."""
    argv = [sys.executable, "-m", program] if "." in program else [BINARIES / program]
    return subprocess.run(
        [*argv, *map(str, arguments)],
        cwd=directory,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": str(directory), **environment},
    )


def refused(directory, code, text, program, *arguments, **environment):
    done = run(directory, program, *arguments, **environment)
    assert (done.returncode, done.stdout) == (code, ""), done
    assert done.stderr.count("\n") == 1, done.stderr
    assert text in done.stderr
    assert done.stderr.startswith(f"{program}: ") or program == "holdfast.guest"


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "short").write_text("short")
    (tmp_path / "file").write_text("x")
    (tmp_path / "junk").write_bytes(bytes(range(128, 256)) * 40)
    (tmp_path / "root").mkdir()
    (tmp_path / "node.toml").write_text(NODE)
    return tmp_path


@pytest.mark.parametrize(
    ("program", "arguments", "text"),
    [
        ("clusterd", ["run"], "--config"),
        ("clusterd", ["run", "--confg", "x"], "--confg"),
        ("clusterd", ["nonsense"], "nonsense"),
        ("clusterd", ["witness", "--data", "w", "--listen", "here"], "HOST:PORT"),
        ("clusterd", ["witness", "--data", "file", "--listen", "127.0.0.1:0"], "file"),
        ("clusterd", ["simulate", SCENARIO, "--seed", "x"], "--seed"),
        ("clusterctl", ["status"], "HOLDFAST_NODE"),
        ("clusterctl", ["--node", "here", "status"], "HOST:PORT"),
        ("clusterctl", ["--node", NOBODY, "node", "pause"], "NODE"),
        ("diskd", ["run", "--root"], "--root"),
        ("diskd", ["target", "--root", "root", "--listen", "here"], "HOST:PORT"),
        ("diskctl", ["--control", "here", "image", "list"], "HOST:PORT"),
        ("diskctl", ["image", "create", "d", "1Gig"], "10GiB"),
        ("lab", ["up", "--nodes", "some"], "--nodes"),
        ("lab", ["up", "--dir", "file"], "file"),
        ("lab", ["fold"], "fold"),
        ("holdfast.guest", ["--disk", "nowhere"], "--help"),
        ("holdfast.guest", ["--disk", "x", "--acks", "a", "--epoch", "1", "--node", "n"], "nbd://HOST:PORT"),
        ("holdfast.checker", [], "--acks"),
        ("holdfast.bench", ["--rounds", "0"], "--rounds"),
        ("holdfast.bench.broken_rules", ["--lst"], "--lst"),
        ("holdfast.demo", ["--fast"], "--fast"),
    ],
)
def test_wrong_usage(directory, program, arguments, text):
    done = run(directory, program, *arguments)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert done.stderr.count("\n") == 1, done.stderr
    assert text in done.stderr


@pytest.mark.parametrize("program", ["clusterd", "clusterctl", "diskd", "diskctl", "lab"])
def test_a_command_without_a_verb_shows_its_verbs(directory, program):
    done = run(directory, program)
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: ")
    assert "\nCommands:\n" in done.stderr


@pytest.mark.parametrize(
    ("program", "arguments", "text"),
    [
        ("clusterd", ["run", "--config", "nowhere.toml"], "nowhere.toml: No such file"),
        ("clusterd", ["run", "--config", "junk"], "not a TOML file"),
        ("clusterd", ["witness", "--data", "file/sub", "--listen", "127.0.0.1:0"], "Not a directory"),
        ("clusterd", ["simulate", "nowhere"], "nowhere: No such file"),
        ("clusterd", ["simulate", "junk"], "not a TOML file"),
        ("clusterd", ["simulate", "file"], "file: "),
        ("clusterctl", ["--node", NOBODY, "status"], f"cannot connect to {NOBODY}"),
        ("clusterctl", ["--node", NOBODY, "--key", "nowhere", "status"], "key file nowhere"),
        ("clusterctl", ["--node", NOBODY, "--key", "short", "status"], "at least 16 bytes"),
        ("clusterctl", ["--node", NOBODY, "vm", "add", "junk"], "not a TOML file"),
        ("diskd", ["run", "--root", "nowhere"], "no such directory"),
        ("diskd", ["run", "--root", "root", "--config", "junk"], "not TOML"),
        ("diskd", ["run", "--root", "root", "--set", "merge_bach=1MiB"], "merge_batch"),
        ("diskd", ["run", "--root", "root", "--set", "shared_dir=/nowhere"], "shared_dir /nowhere"),
        ("diskd", ["run", "--root", "root", "--control", "0.0.0.0:0"], "--key FILE"),
        ("diskctl", ["--control", NOBODY, "image", "list"], f"cannot connect to {NOBODY}"),
        ("lab", ["status", "--dir", "nowhere"], "is no lab"),
        ("lab", ["up", "--nodes", "0", "--dir", "l"], "nodes"),
        ("lab", ["up", "--set", "heartbeat=1s", "--dir", "l"], "unknown property 'heartbeat'"),
        ("lab", ["run", "root", "--dir", "l"], "root/scenario.toml: No such file"),
        (
            "holdfast.guest",
            ["--disk", f"nbd://{NOBODY}/d", "--acks", "no/a", "--epoch", "1", "--node", "n"],
            "no/a: No such file",
        ),
        ("holdfast.checker", ["--acks", "nowhere", "--disk", "junk"], "nowhere: No such file"),
        ("holdfast.checker", ["--acks", "junk", "--disk", "junk"], "acknowledgements"),
        (
            "holdfast.checker",
            ["--acks", "/dev/null", "--disk", f"nbd://{NOBODY}/d"],
            f"cannot connect to {NOBODY}",
        ),
        ("holdfast.bench.broken_rules", ["nothing"], "no break is called nothing"),
    ],
)
def test_what_cannot_be_done(directory, program, arguments, text):
    done = run(directory, program, *arguments)
    assert (done.returncode, done.stdout) in [(1, ""), (2, "")], done
    assert done.stderr.count("\n") == 1, done.stderr
    assert text in done.stderr


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("memory =", "memroy =", "did you mean 'memory'?"),
        ('"4GiB"', '"4XB"', "memory: '4XB' is not a size"),
        ("vcpus = 4", 'vcpus = "4"', "vcpus: expected int"),
        ('["key"]', '["nowhere"]', "nowhere: No such file"),
        ('["key"]', '["short"]', "at least 16 bytes"),
        ('"data"', '""', "data_dir: '' is not a path"),
        ('"data"', '"file"', "file: cannot be used: File exists"),
        ('"data"', '"/proc/nowhere"', "/proc/nowhere: cannot be used"),
        ("http:", "ftp:", "store: "),
        ('control = "127.0.0.1:0"', 'control = "192.0.2.9:7"', "cannot listen on 192.0.2.9:7"),
        ('listen = "127.0.0.1:0"', 'listen = "192.0.2.9:7"', "network a: cannot listen on 192.0.2.9:7"),
        ("data_dir", 'boot_id_file = "nowhere"\ndata_dir', "boot_id_file"),
    ],
)
def test_a_bad_node_file(directory, old, new, text):
    assert old in NODE
    (directory / "node.toml").write_text(NODE.replace(old, new))
    refused(directory, 1, text, "clusterd", "run", "--config", "node.toml")


@pytest.mark.parametrize("content", [b"{garbage", b"\xff\xfe\x00", b"[1]", b'{"incarnation": "x"}'])
def test_a_damaged_state_file(directory, content):
    (directory / "data").mkdir()
    (directory / "data" / "state.json").write_bytes(content)
    refused(directory, 1, "does not read back", "clusterd", "run", "--config", "node.toml")
    assert (directory / "data" / "state.json").read_bytes() == content


def test_a_damaged_witness_database(directory):
    (directory / "w").mkdir()
    (directory / "w" / "witness.sqlite3").write_bytes(bytes(range(256)) * 40)
    witness = ["witness", "--data", "w", "--listen", "127.0.0.1:0"]
    refused(directory, 1, "not a usable witness database", "clusterd", *witness)


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("clusterd", ["run", "--config", "node.toml"]),
        ("clusterd", ["witness", "--data", "w", "--listen", "PORT"]),
        ("diskd", ["run", "--root", "root", "--nbd", "PORT", "--control", "127.0.0.1:0"]),
        ("diskd", ["run", "--root", "root", "--nbd", "127.0.0.1:0", "--control", "PORT"]),
        ("diskd", ["target", "--root", "root", "--listen", "PORT"]),
    ],
)
def test_a_port_in_use(directory, program, arguments):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = f"127.0.0.1:{taken.getsockname()[1]}"
        (directory / "node.toml").write_text(NODE.replace('control = "127.0.0.1:0"', f'control = "{port}"'))
        given = [argument.replace("PORT", port) for argument in arguments]
        refused(directory, 1, f"cannot listen on {port}: Address already in use", program, *given)

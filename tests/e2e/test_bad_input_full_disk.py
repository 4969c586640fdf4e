"""A full disk: a daemon that starts says where; one that runs refuses what it cannot do, and goes on."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

BINARIES = Path(sys.executable).parent
SECONDS_MAX = 30
FREE = "127.0.0.1:0"
pytestmark = [pytest.mark.slow, pytest.mark.e2e]

NODE = """\
name = "n1"
cluster = "lab"
key_files = ["{key}"]
control = "127.0.0.1:0"
store = ["{store}"]
memory = "4GiB"
vcpus = 4
data_dir = "{data}"
[[networks]]
name = "a"
listen = "127.0.0.1:0"
"""


class Disk:
    """A small file system that can be filled to the last byte and given space again."""

    def __init__(self, path):
        self.path = path
        self._filler = path / "filler"

    def fill(self):
        with self._filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def empty(self):
        self._filler.unlink()


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        for name in ("store", "node", "root", "target"):
            (path / name).mkdir()
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@contextlib.contextmanager
def daemon(log, *argv):
    with log.open("wb") as err:
        process = subprocess.Popen(
            [BINARIES / argv[0], *map(str, argv[1:])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=err,
        )
    try:
        yield json.loads(process.stdout.readline())
        assert process.poll() is None, log.read_text()
        process.terminate()
        assert process.wait(SECONDS_MAX) == 0
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def ask(*argv):
    done = subprocess.run(
        [BINARIES / argv[0], *map(str, argv[1:])],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert done.stderr.count("\n") == (done.returncode != 0), done.stderr
    return done


def refused(text, *argv):
    done = ask(*argv)
    assert (done.returncode, done.stdout) == (1, ""), done
    assert text in done.stderr
    assert "Errno" not in done.stderr


def test_starting_on_a_full_disk(disk, tmp_path):
    (tmp_path / "key").write_text("k" * 32)
    node = NODE.format(key=tmp_path / "key", store="http://127.0.0.1:1", data=disk.path / "node")
    (tmp_path / "node.toml").write_text(node)
    disk.fill()
    full = "No space left on device"
    refused(f"{disk.path}/node/state.json: {full}", "clusterd", "run", "--config", tmp_path / "node.toml")
    refused("cannot be opened: database or disk is full",
            "clusterd", "witness", "--data", disk.path / "store", "--listen", FREE)  # fmt: skip
    refused(full, "diskd", "target", "--root", disk.path / "target", "--listen", FREE)


def test_a_disk_that_fills_up_under_running_daemons(disk, tmp_path):
    (tmp_path / "key").write_text("k" * 32)
    (tmp_path / "vm.toml").write_text(
        'name = "web"\nargv = ["sleep", "100"]\nmemory = "1MiB"\nstateless = true'
    )
    with contextlib.ExitStack() as started:

        def start(name, *argv):
            return started.enter_context(daemon(tmp_path / f"{name}.log", *argv))

        store = start("store", "clusterd", "witness", "--data", disk.path / "store", "--listen", FREE)["url"]
        node = NODE.format(key=tmp_path / "key", store=store, data=tmp_path / "node")
        (tmp_path / "node.toml").write_text(node)
        node = start("node", "clusterd", "run", "--config", tmp_path / "node.toml")
        diskd = start("diskd", "diskd", "run", "--root", disk.path / "root", "--nbd", FREE, "--control", FREE)
        target = start("target", "diskd", "target", "--root", disk.path / "target", "--listen", FREE)
        diskctl = ("diskctl", "--control", diskd["control"])
        backup = (*diskctl, "backup", "--vm", "d", "--image", "d", "--target", target["listen"])
        add = ("clusterctl", "--node", node["control"], "vm", "add", "--no-start", tmp_path / "vm.toml")
        assert ask(*diskctl, "image", "create", "d", "8MiB").returncode == 0
        disk.fill()
        refused("No space left on device", *diskctl, "image", "create", "e", "8MiB")
        refused(
            "No space left on device", *diskctl, "lease", "acquire", "d", "--epoch", 3, "--holder", "n1/d"
        )
        refused("less than low_disk_limit", *backup)
        refused("disk is full", *add)
        disk.empty()
        images = json.loads(ask(*diskctl, "image", "list", "--json").stdout)
        assert [(image["name"], image["state"], image["epoch"]) for image in images] == [("d", "open", 0)]
        assert ask(*backup).returncode == 0
        assert ask(*add).returncode == 0
        assert (
            len(json.loads(ask("diskctl", "target", "list", "--target", target["listen"], "--json").stdout))
            == 1
        )

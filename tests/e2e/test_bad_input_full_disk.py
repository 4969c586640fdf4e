"""A full disk: a daemon that starts says where; one that runs refuses what it cannot do, and goes on."""

import contextlib
import json
import subprocess

import pytest
from daemon_processes import BINARIES, FREE, SECONDS_MAX, daemon, node_toml

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


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
    node = node_toml(key=tmp_path / "key", data=disk.path / "node")
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
        node = node_toml(store, key=tmp_path / "key", data=tmp_path / "node")
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

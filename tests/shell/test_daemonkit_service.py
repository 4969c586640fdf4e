"""What systemd is told, over a real datagram socket."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from diskd_process import BINARIES, SECONDS_MAX

from daemonkit.service import watchdog_seconds


class Systemd:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.settimeout(SECONDS_MAX)
        self.address = address

    def next(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.socket.recv(4096).decode().splitlines())

    def until(self, name: str) -> dict[str, str]:
        """The next message with that field."""
        deadline = time.monotonic() + SECONDS_MAX
        while time.monotonic() < deadline:
            message = self.next()
            if name in message:
                return message
        raise AssertionError(f"no {name}")

    def close(self) -> None:
        self.socket.close()


def start(argv: list[str], systemd: Systemd, log: Path, **environment: str) -> subprocess.Popen:
    with log.open("ab") as file:
        return subprocess.Popen(
            [str(BINARIES / argv[0]), *argv[1:]],
            env={**os.environ, "NOTIFY_SOCKET": systemd.address, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
        )


def daemons(tmp_path: Path) -> dict[str, list[str]]:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "target").mkdir()
    free = "127.0.0.1:0"
    return {
        "diskd": ["diskd", "run", "--root", str(root), "--nbd", free, "--control", free],
        "target": ["diskd", "target", "--root", str(tmp_path / "target"), "--listen", free],
        "witness": ["clusterd", "witness", "--data", str(tmp_path / "witness"), "--listen", free],
        "clusterd": ["clusterd", "run", "--config", str(node_file(tmp_path))],
    }


def node_file(tmp_path: Path) -> Path:
    (tmp_path / "key").write_text("k" * 32)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = tmp_path / "node.toml"
    path.write_text(f"""
name = "n1"
cluster = "test"
key_files = ["key"]
control = "127.0.0.1:0"
store = ["http://127.0.0.1:1"]
memory = "1GiB"
vcpus = 1
data_dir = "data"
[[networks]]
name = "a"
listen = "127.0.0.1:{port}"
""")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [("diskd", "path"), ("diskd", "abstract"), ("target", "path"), ("witness", "path"), ("clusterd", "path")],
)
def test_every_daemon_says_that_it_serves_lives_and_stops(name, kind, tmp_path):
    address = str(tmp_path / "notify") if kind == "path" else f"@holdfast-test-{os.getpid()}"
    with contextlib.closing(Systemd(address)) as systemd:
        process = start(daemons(tmp_path)[name], systemd, tmp_path / "log", WATCHDOG_USEC="600000")
        try:
            ready = systemd.until("READY")
            assert ready["READY"] == "1" and ready["STATUS"].startswith("serving")
            systemd.until("WATCHDOG")
        finally:
            process.terminate()
        assert systemd.until("STOPPING")["STATUS"].startswith("stopping: ")
        assert process.wait(SECONDS_MAX) == 0, (tmp_path / "log").read_text()


@pytest.mark.slow
def test_signs_of_life_end_with_the_loop(tmp_path):
    """They come while it lives; a stopped process gives none, and they come again when it goes on."""
    with contextlib.closing(Systemd(str(tmp_path / "notify"))) as systemd:
        process = start(daemons(tmp_path)["diskd"], systemd, tmp_path / "log", WATCHDOG_USEC="300000")
        try:
            for _ in range(3):
                systemd.until("WATCHDOG")
            process.send_signal(signal.SIGSTOP)
            stopped = Path(f"/proc/{process.pid}/stat")
            deadline = time.monotonic() + SECONDS_MAX
            while stopped.read_text().rsplit(")", 1)[1].split()[0] != "T":
                assert time.monotonic() < deadline
            systemd.socket.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    systemd.next()
            systemd.socket.settimeout(1.0)
            with pytest.raises(TimeoutError):
                systemd.next()
            process.send_signal(signal.SIGCONT)
            systemd.socket.settimeout(SECONDS_MAX)
            systemd.until("WATCHDOG")
        finally:
            process.kill()
            process.wait()


def test_the_watchdog_of_another_process_is_not_ours():
    assert watchdog_seconds({"WATCHDOG_USEC": "30000000"}) == 30.0
    assert watchdog_seconds({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}) == 30.0
    for none in (
        {},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "x"},
        {"WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"},
    ):
        assert watchdog_seconds(none) is None


def test_a_socket_that_is_gone_or_of_another_kind_hurts_nobody(tmp_path):
    argv = [str(BINARIES / "diskd"), "target", "--root", str(tmp_path), "--listen", "127.0.0.1:0"]
    for address in (str(tmp_path / "absent"), "vsock:2:1234", ""):
        process = subprocess.Popen(
            argv,
            env={**os.environ, "NOTIFY_SOCKET": address},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["event"] == "ready"
        process.terminate()
        assert process.wait(SECONDS_MAX) == 0
        process.stdout.close()

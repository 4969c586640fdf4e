"""A peer that talks nonsense loses its own connection and nothing else, on every port of every daemon."""

import contextlib
import json
import random
import socket
import struct
import subprocess

import pytest
from daemon_processes import BINARIES, SECONDS_MAX, daemon, node_toml

UNHEARD = ("Traceback", '"level": "error"')
pytestmark = [pytest.mark.slow, pytest.mark.e2e]


def _post(path, body, length=None):
    length = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
    return head.encode() + body


def _nbd(*options):
    """The client's flags and options of a haggling."""
    return struct.pack(">I", 3) + b"".join(
        b"IHAVEOPT" + struct.pack(">II", number, length) + data for number, length, data in options
    )


_GO = (7, 7, struct.pack(">I", 1) + b"d" + struct.pack(">H", 0))
_REQUEST = struct.Struct(">IHHQQI")
NOISE = {
    "zeroes": bytes(70_000),
    "ones": b"\xff" * 70_000,
    "random": random.Random(2).randbytes(200_000),
    "tls": bytes.fromhex("1603010200010001fc0303") + bytes(500),
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "endless header": b"GET / HTTP/1.1\r\nX: " + b"a" * 1_000_000,
    "more promised than fits": _post("/v3/kv/range", b"{}", length=99_999_999_999),
    "no json": _post("/v3/kv/range", b"{nope"),
    "deep json": _post("/v3/kv/txn", b"[" * 100_000),
    "wrong types": _post("/v3/kv/range", b'{"key": ["a", 1]}'),
    "no base64": _post("/v3/kv/range", b'{"key": "!!!"}'),
    "no number": _post("/v3/lease/grant", b'{"TTL": "-55x"}'),
    "long frame": b"\xff\xff\xff\xff" + bytes(100),
    "deep msgpack": struct.pack(">I", 5000) + b"\x91" * 5000,
    "long option": _nbd((7, 0xFFFFFFFF, b"x" * 100)),
    "unknown options": _nbd(*[(9999, 3, b"abc")] * 40),
    "no such export": _nbd((1, 7, b"nowhere")),
    "no request": _nbd(_GO) + bytes(1000),
    "long write": _nbd(_GO) + _REQUEST.pack(0x25609513, 0, 1, 7, 0, 0xFFFFFFFF) + bytes(10_000),
    "beyond the end": _nbd(_GO) + _REQUEST.pack(0x25609513, 0, 0, 7, 1 << 62, 4096),
    "unknown command": _nbd(_GO) + _REQUEST.pack(0x25609513, 0xFFFF, 77, 7, 0, 1),
}


def address_of(text):
    host, _, port = text.removeprefix("http://").rpartition(":")
    return host, int(port)


def talk(address, data, *, reset):
    """Say it all, then hang up: politely, or with a reset in the middle of it."""
    with socket.create_connection(address, timeout=SECONDS_MAX) as stream, contextlib.suppress(OSError):
        if reset:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            stream.sendall(data[: len(data) // 2])
            return
        stream.sendall(data)
        stream.shutdown(socket.SHUT_WR)
        while stream.recv(65536):
            pass


def ask(*argv):
    done = subprocess.run(
        [BINARIES / argv[0], *argv[1:]], capture_output=True, text=True, timeout=SECONDS_MAX, check=False
    )
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == (done.returncode != 0)
    return done


def test_nonsense_on_every_port(tmp_path):
    (tmp_path / "key").write_text("k" * 32)
    (tmp_path / "wrong").write_text("w" * 32)
    for name in ("root", "target"):
        (tmp_path / name).mkdir()
    free = "127.0.0.1:0"
    with contextlib.ExitStack() as started:

        def start(name, *argv):
            return started.enter_context(daemon(tmp_path / f"{name}.log", *argv, unheard=UNHEARD))

        store = start("store", "clusterd", "witness", "--data", tmp_path / "w", "--listen", free)["url"]
        (tmp_path / "node.toml").write_text(node_toml(store))
        node = start("node", "clusterd", "run", "--config", tmp_path / "node.toml")
        diskd = start(
            "diskd", "diskd", "run", "--root", tmp_path / "root", "--nbd", free, "--control", free,
            "--key", tmp_path / "key",
        )  # fmt: skip
        target = start("target", "diskd", "target", "--root", tmp_path / "target", "--listen", free)
        assert ask("diskctl", "--control", diskd["control"], "image", "create", "d", "8MiB").returncode == 0
        for port in (store, node["control"], diskd["nbd"], diskd["control"], target["listen"]):
            for data in NOISE.values():
                talk(address_of(port), data, reset=False)
                talk(address_of(port), data, reset=True)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
            for data in (b"", b"\0", *NOISE.values()):
                datagrams.sendto(data[:60_000], address_of(node["networks"]["a"]))

        status = ask("clusterctl", "--node", node["control"], "status", "--json")
        assert json.loads(status.stdout)["store"] == "ok"
        shown = json.loads(ask("diskctl", "--control", diskd["control"], "image", "list", "--json").stdout)
        assert [image["state"] for image in shown] == ["open"]
        assert ask("diskctl", "target", "list", "--target", target["listen"]).returncode == 0

        wrong = ("--key", str(tmp_path / "wrong"))
        for argv in (
            ("clusterctl", "--node", node["control"], *wrong, "status"),
            ("diskctl", "--control", diskd["control"], *wrong, "image", "list"),
            ("clusterctl", "--node", diskd["nbd"], "status"),
            ("diskctl", "--control", node["control"], "image", "list"),
            ("diskctl", "target", "list", "--target", diskd["control"]),
        ):
            done = ask(*argv)
            assert done.returncode == 1, argv
            assert any(
                word in done.stderr
                for word in ("use --key FILE", "not a control address", "another daemon's")
            ), done.stderr

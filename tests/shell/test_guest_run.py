"""The guest against a scripted NBD server: records are acknowledged once, through every kind of trouble."""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast.checker.__main__ import check
from holdfast.guest import run
from holdfast.guest.acks import Line, parse_acks
from holdfast.guest.journal import BLOCK_BYTES, JournalError
from holdfast.guest.nbd import ConnectionLost, Fenced, NbdClient, RequestFailed
from holdfast.guest.run import Settings, run_guest

SIZE = 64 * BLOCK_BYTES
READ, WRITE, DISC, FLUSH = 0, 1, 2, 3
Hook = Callable[["FakeServer", int], "int | str | None"]


class Dropped(Exception):
    """The script says: close this connection."""


class FakeServer:
    """Enough of an NBD server for one client: ``hook(server, command)`` may answer an errno or "drop".

    ``greetings``: what the next connections get instead of service: "policy", "unknown", "garbage", "close".
    """

    def __init__(self, hook: Hook | None = None, greetings: list[str] | None = None) -> None:
        self.disk = bytearray(SIZE)
        self.size = SIZE
        self.flags = 1
        self.hook = hook
        self.greetings = list(greetings or [])
        self.counts = dict.fromkeys((READ, WRITE, FLUSH), 0)
        self.connections = 0
        self.names: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._current: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    @property
    def uri(self) -> str:
        return f"nbd://127.0.0.1:{self._listener.getsockname()[1]}/journal@3"

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if self._current is not None:
            with contextlib.suppress(OSError):
                self._current.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._current = connection
            with connection, contextlib.suppress(Dropped, OSError):
                self._negotiate(connection)

    def _exactly(self, connection: socket.socket, length: int) -> bytes:
        data = b""
        while len(data) < length:
            part = connection.recv(length - len(data))
            if not part:
                raise Dropped
            data += part
        return data

    def _negotiate(self, connection: socket.socket) -> None:
        greeting = self.greetings.pop(0) if self.greetings else "serve"
        if greeting == "close":
            return
        if greeting == "garbage":
            connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            return
        connection.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        self._exactly(connection, 4)
        _, option, length = struct.unpack(">QII", self._exactly(connection, 16))
        assert option == 7
        body = self._exactly(connection, length)
        self.names.append(body[4:-2].decode())
        if greeting in ("policy", "unknown"):
            kind = (1 << 31) + (2 if greeting == "policy" else 6)
            connection.sendall(struct.pack(">QIII", 0x3E889045565A9, 7, kind, 5) + b"is no")
            return
        info = struct.pack(">HQH", 0, self.size, self.flags)
        connection.sendall(struct.pack(">QIII", 0x3E889045565A9, 7, 3, 12) + info)
        connection.sendall(struct.pack(">QIII", 0x3E889045565A9, 7, 1, 0))
        while True:
            self._request(connection)

    def _request(self, connection: socket.socket) -> None:
        magic, _, command, handle, offset, length = struct.unpack(">IHHQQI", self._exactly(connection, 28))
        assert magic == 0x25609513
        data = self._exactly(connection, length) if command == WRITE else b""
        if command == DISC:
            raise Dropped
        self.counts[command] += 1
        answer = self.hook(self, command) if self.hook else None
        if answer == "drop":
            raise Dropped
        if answer == "nonsense":
            connection.sendall(b"x" * 16)
            return
        code = answer if isinstance(answer, int) else 0
        if not code and command == WRITE:
            self.disk[offset : offset + length] = data
        reply = struct.pack(">IIQ", 0x67446698, code, handle)
        if not code and command == READ:
            reply += bytes(self.disk[offset : offset + length])
        connection.sendall(reply)


@pytest.fixture
def serve() -> Iterator[Callable[..., FakeServer]]:
    servers: list[FakeServer] = []

    def start(*args: object, **kwargs: object) -> FakeServer:
        servers.append(FakeServer(*args, **kwargs))  # type: ignore[arg-type]
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def settings(
    server: FakeServer, acks: Path, *, epoch: int = 3, node: str = "n1", load: float = 0
) -> Settings:
    return Settings(server.uri, str(acks), epoch, node, 10_000.0, load)


def lines_of(acks: Path) -> list[Line]:
    return parse_acks(acks.read_bytes())


def verdict_of(server: FakeServer, acks: Path, tmp_path: Path):
    image = tmp_path / "image.raw"
    image.write_bytes(server.disk)
    return check(str(acks), str(image))


def test_guest_writes_flushes_then_acknowledges(serve, tmp_path: Path) -> None:
    acks = tmp_path / "acks"
    seen: list[int] = []
    acknowledged: list[int] = []

    def hook(server: FakeServer, command: int) -> None:
        seen.append(command)
        if command == FLUSH:
            acknowledged.append(len(lines_of(acks)))

    server = serve(hook)
    run_guest(settings(server, acks), records_max=40)
    assert [line[:4] for line in lines_of(acks)] == [("ack", 3, "n1", number) for number in range(1, 41)]
    assert seen[:3] == [READ, WRITE, FLUSH]  # a fresh disk gets its header
    assert seen[3:5] == [WRITE, FLUSH]
    assert seen.count(WRITE) == 41 and seen.count(FLUSH) == 41
    assert acknowledged == [0, *range(40)]  # never before its flush has been answered
    assert server.names == ["journal@3"]
    assert verdict_of(server, acks, tmp_path).is_good


def test_guest_continues_where_the_journal_ends(serve, tmp_path: Path) -> None:
    acks = tmp_path / "acks"
    server = serve()
    for epoch, records in ((1, 33), (2, 31), (5, 1), (7, 200)):
        run_guest(settings(server, acks, epoch=epoch, node=f"n{epoch}", load=3000), records_max=records)
    verdict = verdict_of(server, acks, tmp_path)
    assert verdict.is_good and verdict.records == 265 and verdict.load_blocks > 10
    assert verdict.owners == [(1, "n1", 1, 33), (2, "n2", 34, 64), (5, "n5", 65, 65), (7, "n7", 66, 265)]


def test_guest_reconnects_and_acknowledges_each_record_once(serve, tmp_path: Path) -> None:
    acks = tmp_path / "acks"
    drops = {(WRITE, 5): "drop", (FLUSH, 9): "drop", (WRITE, 20): "nonsense", (FLUSH, 30): 5, (WRITE, 40): 28}
    server = serve(
        lambda s, command: drops.pop((command, s.counts[command]), None), ["close", "garbage", "unknown"]
    )
    run_guest(settings(server, acks, load=2000), records_max=60)
    assert not drops
    assert [line.sequence for line in lines_of(acks)] == list(range(1, 61))
    assert verdict_of(server, acks, tmp_path).is_good
    assert server.connections == 7


def test_guest_policy_refusal_is_final(serve, tmp_path: Path) -> None:
    acks = tmp_path / "acks"
    server = serve()
    run_guest(settings(server, acks), records_max=3)
    server.greetings = ["policy"]
    with pytest.raises(Fenced, match="is no"):
        run_guest(settings(server, acks), records_max=3)
    assert [line.kind for line in lines_of(acks)] == ["ack"] * 3 + ["refused"]


def test_guest_shutdown_errno_is_confirmed_by_one_more_connection(serve, tmp_path: Path) -> None:
    acks = tmp_path / "acks"
    server = serve(lambda s, command: 108 if command == WRITE and s.counts[WRITE] == 5 else None)
    run_guest(settings(server, acks), records_max=10)  # a server that was shut down, and came back
    assert [line.kind for line in lines_of(acks)] == ["ack"] * 10
    assert server.connections == 2
    fenced = serve(lambda s, command: 108 if command == WRITE and s.counts[WRITE] >= 5 else None)
    acks.unlink()
    with pytest.raises(Fenced, match="endpoint shutdown"):
        run_guest(settings(fenced, acks), records_max=10)
    assert [line[:4] for line in lines_of(acks)][-1] == ("refused", 3, "n1", 4)
    assert fenced.connections == 2


def test_guest_slow_flush_is_confirmed_before_it_counts(serve, tmp_path: Path) -> None:
    acks = tmp_path / "acks"
    never = threading.Event()

    def hook(server: FakeServer, command: int) -> int | None:
        if command == FLUSH and server.counts[FLUSH] == 2:
            never.wait(2 * run.CONFIRM_SECONDS_MIN)  # the reply is simply late
        # Meanwhile another owner has got the disk: this run may not even read.
        return 108 if server.counts[FLUSH] >= 2 and command != FLUSH else None

    with pytest.raises(Fenced):
        run_guest(settings(serve(hook), acks), records_max=2)
    assert [line.kind for line in lines_of(acks)] == ["refused"]


def test_guest_on_a_slow_disk_goes_on(serve, tmp_path: Path) -> None:
    acks = tmp_path / "acks"
    never = threading.Event()
    server = serve(lambda s, command: never.wait(1.5 * run.CONFIRM_SECONDS_MIN) and None)
    run_guest(settings(server, acks), records_max=2)
    assert [line.kind for line in lines_of(acks)] == ["ack", "ack"]


def test_guest_leaves_a_foreign_disk_alone(serve, tmp_path: Path) -> None:
    server = serve()
    server.disk[:4] = b"\x7fELF"
    before = bytes(server.disk)
    with pytest.raises(JournalError, match="something else"):
        run_guest(settings(server, tmp_path / "acks"), records_max=1)
    assert server.disk == before


def test_guest_client_is_bounded(serve) -> None:
    server = serve()
    with NbdClient(server.uri) as client:
        for offset, length in ((-1, 4), (0, SIZE + 1), (SIZE, 1)):
            with pytest.raises(ValueError, match="outside"):
                client.read(offset, length)
        client.write(8192, b"abc" * 100)
        assert client.read(8192, 300) == b"abc" * 100
        server.hook = lambda s, command: 22
        with pytest.raises(RequestFailed, match="Invalid argument"):
            client.flush()
        server.hook = lambda s, command: "nonsense"
        with pytest.raises(ConnectionLost, match="makes no sense"):
            client.read(0, 10)
    server.size = 1 << 60
    with pytest.raises(ConnectionLost, match="impossible size"):
        NbdClient(server.uri)
    with pytest.raises(ConnectionLost, match="cannot connect"):
        NbdClient("nbd://127.0.0.1:1/x")


def _spawn(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "holdfast.guest", *args],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


def test_guest_process_exit_codes(serve, tmp_path: Path) -> None:
    acks = tmp_path / "acks"
    server = serve()
    args = ["--disk", server.uri, "--acks", str(acks), "--epoch", "3", "--node", "n1", "--rate", "200"]
    with _spawn(*args) as process:
        _wait_until(lambda: acks.exists() and acks.read_bytes().count(b"\n") >= 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    server.greetings = ["policy"]
    with _spawn(*args) as process:
        assert process.wait(10) == run.EXIT_FENCED
        assert process.stderr is not None
        assert process.stderr.read() == "guest: fenced: export journal@3: is no\n"
    for bad in (
        ["--disk", "http://x"],
        [*args, "--rate", "0"],
        [*args, "--node", "a b"],
        [*args, "--epoch", "-1"],
    ):
        with _spawn(*bad) as process:
            assert process.wait(10) == 2


def test_guest_and_checker_need_the_standard_library_only() -> None:
    imports = "import sys, holdfast.guest.__main__, holdfast.checker.__main__"
    code = imports + "; print('\\n'.join(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    roots = {name.split(".")[0] for name in modules.split()}
    assert not roots & {
        "trio",
        "attrs",
        "attr",
        "msgpack",
        "structlog",
        "click",
        "daemonkit",
        "clusterd",
        "diskd",
    }

"""RPC over real sockets: what works, and what every kind of bad peer gets."""

import contextlib
import errno
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing

from daemonkit.codec import decode, encode
from daemonkit.errors import OperatorError
from daemonkit.frames import FrameReader, frame
from daemonkit.methods import Method
from daemonkit.ports import Address
from daemonkit.rpc import Call, CallFailed, CallRefused, Registry, connect, serve

KEY = b"k" * 32


@attrs.frozen
class Text:
    text: str


ECHO = Method("echo", Text, Text)
REFUSE = Method("refuse", Text, Text)
FULL = Method("full", Text, Text)
BREAK = Method("break", Text, Text)
COUNT = Method("count", Text, Text)
WAIT = Method("wait", Text, Text)
MISSING = Method("missing", Text, Text)


class Server:
    def __init__(self) -> None:
        self.waiting = trio.Event()
        self.cancelled = trio.Event()
        self.registry = Registry()
        self.registry.add(ECHO, self.echo)
        self.registry.add(REFUSE, self.refuse)
        self.registry.add(FULL, self.full)
        self.registry.add(BREAK, self.break_)
        self.registry.add(COUNT, self.count)
        self.registry.add(WAIT, self.wait)

    async def echo(self, params: Text, call: Call) -> Text:
        return params

    async def refuse(self, params: Text, call: Call) -> Text:
        async with trio.open_nursery() as nursery:  # so that the error arrives inside a group
            nursery.start_soon(self._refuse)
        return params

    async def _refuse(self) -> None:
        raise OperatorError("image 'd' is in use; end its checkpoint first")

    async def full(self, params: Text, call: Call) -> Text:
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere")

    async def break_(self, params: Text, call: Call) -> Text:
        raise ZeroDivisionError("a defect")

    async def count(self, params: Text, call: Call) -> Text:
        for number in range(3):
            await call.progress({"done": number})
        return params

    async def wait(self, params: Text, call: Call) -> Text:
        self.waiting.set()
        try:
            await trio.sleep_forever()
        finally:
            self.cancelled.set()


@contextlib.asynccontextmanager
async def running(keys: tuple[bytes, ...] = ()) -> AsyncIterator[tuple[Server, Address]]:
    server = Server()
    async with trio.open_nursery() as nursery:

        async def start(*, task_status: trio.TaskStatus[Address]) -> None:
            await serve(server.registry, Address("127.0.0.1", 0), keys=keys, task_status=task_status)

        address = await nursery.start(start)
        with trio.fail_after(10):
            yield server, address
        nursery.cancel_scope.cancel()


async def test_calls_answers_and_progress() -> None:
    async with running() as (_, address), connect(address) as client:
        assert await client.call(ECHO, Text("ä" * 100_000)) == Text("ä" * 100_000)
        seen: list[object] = []
        assert await client.call(COUNT, Text("x"), on_progress=seen.append) == Text("x")
        assert seen == [{"done": 0}, {"done": 1}, {"done": 2}]


async def test_a_refusal_keeps_the_connection() -> None:
    async with running() as (_, address), connect(address) as client:
        with pytest.raises(CallRefused, match="end its checkpoint first"):
            await client.call(REFUSE, Text(""))
        with pytest.raises(CallRefused, match="/somewhere: No space left on device"):
            await client.call(FULL, Text(""))
        assert await client.call(ECHO, Text("on")) == Text("on")


async def test_a_defect_in_a_handler_is_an_answer_and_no_more() -> None:
    async with running() as (_, address):
        async with connect(address) as client:
            with pytest.raises(CallFailed, match="ZeroDivisionError"):
                await client.call(BREAK, Text(""))
        async with connect(address) as client:
            assert await client.call(ECHO, Text("on")) == Text("on")


async def test_unknown_method_and_wrong_parameters() -> None:
    async with running() as (_, address):
        async with connect(address) as client:
            with pytest.raises(
                CallFailed, match="unknown method 'missing': this address is another daemon's"
            ):
                await client.call(MISSING, Text(""))
        async with connect(address) as client:
            with pytest.raises(CallFailed, match="expected str, found int"):
                await client.call(ECHO, Text(5))  # type: ignore[arg-type]


async def _greeted(address: Address) -> trio.SocketStream:
    stream = await trio.open_tcp_stream(address.host, address.port)
    reader = FrameReader()
    while reader.next_frame() is None:
        reader.feed(await stream.receive_some())
    await stream.send_all(frame(encode(["auth", b""])))
    return stream


async def _until_closed(stream: trio.SocketStream) -> bytes:
    """What the server says before it closes; a reset counts as closing."""
    said = bytearray()
    try:
        while data := await stream.receive_some():
            said += data
    except trio.BrokenResourceError:
        pass
    await stream.aclose()
    return bytes(said)


@pytest.mark.parametrize(
    "noise",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\xff\xff\xff",
        frame(b"\xc1"),
        frame(encode("not a request")),
        frame(encode([1, 2, 3])),
        frame(encode(["x", "echo", {}])),
        frame(b"\x91" * 4000),
    ],
    ids=["http", "length", "garbage", "text", "method-number", "id-text", "deep"],
)
async def test_nonsense_closes_only_its_own_connection(noise: bytes) -> None:
    async with running() as (_, address), connect(address) as other:
        stream = await _greeted(address)
        await stream.send_all(noise)
        await _until_closed(stream)
        assert await other.call(ECHO, Text("undisturbed")) == Text("undisturbed")


async def test_speaking_out_of_turn_ends_the_connection() -> None:
    async with running() as (server, address):
        stream = await _greeted(address)
        await stream.send_all(frame(encode([1, "wait", {"text": ""}])))
        await server.waiting.wait()
        await stream.send_all(frame(encode([2, "echo", {"text": ""}])))
        said = await _until_closed(stream)
        assert b"before the previous one was answered" in said
        await server.cancelled.wait()


async def test_a_client_that_half_closes_cancels_its_call() -> None:
    async with running() as (server, address):
        stream = await _greeted(address)
        await stream.send_all(frame(encode([1, "wait", {"text": ""}])))
        await server.waiting.wait()
        await stream.send_eof()
        await server.cancelled.wait()
        assert await _until_closed(stream) == b""


async def test_a_server_that_vanishes_is_a_failed_call() -> None:
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")

        async def vanish(stream: trio.SocketStream) -> None:
            await stream.send_all(frame(encode(["holdfast-rpc", 1, b"n" * 32])))
            reader = FrameReader()
            for _ in range(2):
                while (payload := reader.next_frame()) is None:
                    reader.feed(await stream.receive_some())
                decode(payload)
            await stream.aclose()

        nursery.start_soon(trio.serve_listeners, vanish, listeners)
        address = Address("127.0.0.1", listeners[0].socket.getsockname()[1])
        async with connect(address) as client:
            with pytest.raises(CallFailed, match="before it answered"):
                await client.call(ECHO, Text(""))
            with pytest.raises(CallFailed, match="no longer usable"):
                await client.call(ECHO, Text(""))
        nursery.cancel_scope.cancel()


async def test_the_cluster_key() -> None:
    async with running(keys=(KEY, b"o" * 32)) as (_, address):
        for key in (KEY, b"o" * 32, None):
            async with connect(address, key=key) as client:
                assert await client.call(ECHO, Text("in")) == Text("in")
        async with connect(address, key=b"x" * 32) as client:
            with pytest.raises(CallFailed, match="cluster key"):
                await client.call(ECHO, Text("out"))


async def test_without_a_key_only_loopback_is_served() -> None:
    with pytest.raises(OperatorError, match="use --key FILE"):
        await serve(Registry(), Address("0.0.0.0", 0))


async def test_a_port_in_use_is_one_line() -> None:
    async with running() as (_, address):
        with pytest.raises(OperatorError, match=f"cannot listen on {address}"):
            await serve(Registry(), address)


async def test_nobody_listens() -> None:
    async with running() as (_, address):
        pass
    with pytest.raises(CallFailed, match=f"cannot connect to {address}"):
        async with connect(address):
            pass


async def test_a_peer_that_says_nothing_is_not_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = Address("127.0.0.1", silent.getsockname()[1])
        with pytest.raises(CallFailed, match="nobody greeted within 10 s: is it a control address"):
            async with connect(address):
                pass


@pytest.mark.parametrize(
    "noise",
    [b"NBDMAGICIHAVEOPT\0\3", b"HTTP/1.1 400 Bad Request\r\n\r\n", frame(encode(["other", 1, b""])), b""],
    ids=["nbd", "http", "greeting", "closed"],
)
async def test_another_kind_of_server_is_named_as_such(noise: bytes) -> None:
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")

        async def talk(stream: trio.SocketStream) -> None:
            await stream.send_all(noise)
            await stream.aclose()

        nursery.start_soon(trio.serve_listeners, talk, listeners)
        address = Address("127.0.0.1", listeners[0].socket.getsockname()[1])
        with pytest.raises(CallFailed, match=f"{address}: (not a control address|the connection broke)"):
            async with connect(address):
                pass
        nursery.cancel_scope.cancel()


def _timers(port: int) -> list[str]:
    """The kernel's timers of both sides of the connections to a port (proc(5), /proc/net/tcp)."""
    found = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, _, timer, *_ = line.split()
        ports = {int(address.partition(":")[2], 16) for address in (local, remote)}
        if state == "01" and port in ports:
            found.append(timer.partition(":")[0])
    return found


async def test_a_peer_whose_host_has_lost_power_is_noticed_by_both_sides() -> None:
    """Neither says anything while a client holds an image, or a call takes long."""
    keepalive = "02"
    async with running() as (_, address), connect(address) as client:
        assert await client.call(ECHO, Text("on")) == Text("on")
        with trio.fail_after(10):
            while _timers(address.port) != [keepalive, keepalive]:  # noqa: ASYNC110 - the kernel's doing
                await trio.sleep(0.01)

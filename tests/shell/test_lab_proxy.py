"""The link proxies over real sockets: silence is silent, heals, and is bounded."""

import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import attrs
import pytest
import trio

from daemonkit.ports import Address
from daemonkit.rpc import CallRefused, connect
from holdfast.lab.links import (
    LINKS_HEAL,
    LINKS_POWER,
    LINKS_RESET,
    LINKS_SET,
    LINKS_SHOW,
    Link,
    LinkChange,
    LinkNames,
    LinkReport,
    Power,
    both_ways,
)
from holdfast.lab.proxy import LinkProxies, ProxyConfig, Route

AB = Link("n1", "n2")
HANG_SECONDS = 10.0
QUIET_SECONDS = 0.15  # How long silence is watched: only ever too short to see a defect, never flaky.


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


async def echo(stream: trio.SocketStream) -> None:
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        async for data in stream:
            await stream.send_all(data)
        await stream.send_eof()


@attrs.define
class Rig:
    """n1 reaches n2's echo service at ``stream_port`` and n2's datagram socket at ``datagram_port``."""

    nursery: trio.Nursery
    control: Address
    stream_port: int
    datagram_port: int
    inbox: trio.socket.SocketType
    accepted: list[trio.SocketStream]

    async def dial(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.stream_port)

    async def set(self, **change: object) -> LinkReport:
        links = change.pop("links", both_ways("n1", "n2"))
        return await self._call(LINKS_SET, LinkChange(links, **change))  # type: ignore[arg-type]

    async def heal(self) -> LinkReport:
        return await self._call(LINKS_HEAL, LinkNames(None))

    async def reset(self) -> LinkReport:
        return await self._call(LINKS_RESET, LinkNames([AB]))

    async def show(self) -> LinkReport:
        return await self._call(LINKS_SHOW, LinkNames(None))

    async def power(self, *, is_on: bool) -> LinkReport:
        return await self._call(LINKS_POWER, Power("n2", is_on))

    async def _call(self, method, params) -> LinkReport:
        async with connect(self.control) as client:
            return await client.call(method, params)

    async def next_datagram(self) -> bytes:
        with trio.fail_after(HANG_SECONDS):
            return await self.inbox.recv(99)

    async def send_datagram(self, data: bytes) -> None:
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            await udp.sendto(data, ("127.0.0.1", self.datagram_port))


@pytest.fixture
async def rig(nursery: trio.Nursery) -> AsyncIterator[Rig]:
    accepted: list[trio.SocketStream] = []

    async def handle(stream: trio.SocketStream) -> None:
        accepted.append(stream)
        await echo(stream)

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, handle, listeners)
    inbox = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    await inbox.bind(("127.0.0.1", 0))
    stream_port, datagram_port = free_ports(2)
    echo_port = listeners[0].socket.getsockname()[1]
    routes = [
        Route("n1", "n2", "tcp", f"127.0.0.1:{stream_port}", f"127.0.0.1:{echo_port}"),
        Route(
            "n1",
            "n2",
            "udp",
            f"127.0.0.1:{datagram_port}",
            f"127.0.0.1:{inbox.getsockname()[1]}",
            network="a",
        ),
    ]
    proxies = LinkProxies(ProxyConfig(["n1", "n2", "store"], "127.0.0.1:0", routes))
    control = await nursery.start(proxies.serve)
    with inbox:
        yield Rig(nursery, control, stream_port, datagram_port, inbox, accepted)
    nursery.cancel_scope.cancel()


async def is_silent(operation: Callable[[], Awaitable[object]]) -> bool:
    with trio.move_on_after(QUIET_SECONDS) as scope:
        await operation()
    return scope.cancelled_caught


async def receive(stream: trio.SocketStream, length: int) -> bytes:
    data = b""
    with trio.fail_after(HANG_SECONDS):
        while len(data) < length:
            part = await stream.receive_some(length - len(data))
            assert part
            data += part
    return data


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    with trio.fail_after(HANG_SECONDS):
        while not await condition():
            await trio.lowlevel.checkpoint()


async def test_proxy_forwards_both_ways_and_ends(rig: Rig) -> None:
    async with await rig.dial() as stream:
        payload = bytes(range(256)) * 8192

        async def send() -> None:
            await stream.send_all(payload)
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            assert await receive(stream, len(payload)) == payload
        assert await stream.receive_some() == b""

    async def is_over() -> bool:
        return (await rig.show()).streams == 0

    await until(is_over)


async def test_proxy_cut_stalls_streams_and_heal_lets_them_go_on(rig: Rig) -> None:
    async with await rig.dial() as stream:
        await stream.send_all(b"one")
        assert await receive(stream, 3) == b"one"
        await rig.set(is_cut=True)
        await stream.send_all(b"two")
        assert await is_silent(lambda: stream.receive_some(1))
        await rig.heal()
        assert await receive(stream, 3) == b"two"


@pytest.mark.parametrize("link", [AB, AB.reverse])
async def test_proxy_one_way_cut(rig: Rig, link: Link) -> None:
    async with await rig.dial() as stream:
        await stream.send_all(b"one")
        assert await receive(stream, 3) == b"one"
        await rig.set(links=[link], is_cut=True)
        await stream.send_all(b"two")
        server = rig.accepted[0]
        assert await is_silent(lambda: stream.receive_some(1))
        await server.send_all(b"from-server")
        if link == AB:
            assert await receive(stream, 11) == b"from-server"
        else:
            assert await is_silent(lambda: stream.receive_some(1))


async def test_proxy_new_connections_are_accepted_and_silent_while_cut(rig: Rig) -> None:
    await rig.set(links=[AB.reverse], is_cut=True)
    async with await rig.dial() as stream:
        await stream.send_all(b"hello")
        assert await is_silent(lambda: stream.receive_some(1))
        assert rig.accepted == []
        await rig.heal()
        assert await receive(stream, 5) == b"hello"


async def test_proxy_forgets_clients_that_leave_a_silent_connection(rig: Rig) -> None:
    await rig.set(is_cut=True)
    for _ in range(20):
        async with await rig.dial() as stream:
            await stream.send_all(b"hello")

    async def is_over() -> bool:
        return (await rig.show()).streams == 0

    await until(is_over)
    await rig.heal()
    assert rig.accepted == []


async def test_proxy_a_death_behind_a_cut_is_not_seen_before_it_heals(rig: Rig) -> None:
    for is_reset in (False, True):
        stream = await rig.dial()
        await stream.send_all(b"x")
        assert await receive(stream, 1) == b"x"
        await rig.set(is_cut=True)
        server = rig.accepted[-1]
        if is_reset:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        server.socket.close()
        assert await is_silent(lambda s=stream: s.receive_some(1))
        await rig.heal()
        if is_reset:
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some(1)
        else:
            assert await stream.receive_some(1) == b""
        await stream.aclose()


async def test_proxy_reset_is_abrupt_and_its_own_fault(rig: Rig) -> None:
    async with await rig.dial() as stream:
        await stream.send_all(b"x")
        assert await receive(stream, 1) == b"x"
        report = await rig.reset()
        assert report.faults == []
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some(1)
        await until(lambda: _is_closed(rig.accepted[0]))
    async with await rig.dial() as again:
        await again.send_all(b"y")
        assert await receive(again, 1) == b"y"


async def test_proxy_nobody_listening_behind_it_resets_the_client(nursery: trio.Nursery) -> None:
    listen, nobody = free_ports(2)
    route = Route("n1", "n2", "tcp", f"127.0.0.1:{listen}", f"127.0.0.1:{nobody}")
    await nursery.start(LinkProxies(ProxyConfig(["n1", "n2"], "127.0.0.1:0", [route])).serve)
    async with await trio.open_tcp_stream("127.0.0.1", listen) as stream:
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some(1)
    nursery.cancel_scope.cancel()


async def test_proxy_pushes_back_while_cut(rig: Rig) -> None:
    async with await rig.dial() as stream:
        await stream.send_all(b"x")
        assert await receive(stream, 1) == b"x"
        await rig.set(links=[AB], is_cut=True)
        sent = 0

        async def flood() -> None:
            nonlocal sent
            while True:
                await stream.send_all(bytes(1 << 16))
                sent += 1 << 16

        with trio.move_on_after(4 * QUIET_SECONDS):
            await flood()
        assert sent < 64 << 20


async def test_proxy_datagrams_pass_and_vanish(rig: Rig) -> None:
    await rig.send_datagram(b"one")
    assert await rig.next_datagram() == b"one"
    await rig.set(is_cut=True)
    await rig.send_datagram(b"lost")
    await until(lambda: _dropped(rig, 1))
    await rig.heal()
    await rig.send_datagram(b"two")
    assert await rig.next_datagram() == b"two"
    await rig.set(is_cut=True, network="a")
    await rig.send_datagram(b"lost")
    await until(lambda: _dropped(rig, 2))
    await rig.set(is_cut=True, network="b", links=[AB])
    await rig.heal()
    await rig.send_datagram(b"three")
    assert await rig.next_datagram() == b"three"


async def _is_closed(stream: trio.SocketStream) -> bool:
    return stream.socket.fileno() == -1


async def _dropped(rig: Rig, count: int) -> bool:
    return (await rig.show()).datagrams_dropped == count


async def test_proxy_delays_datagrams_in_their_order(rig: Rig) -> None:
    await rig.set(delay_ns=200_000_000)
    begun = trio.current_time()
    for number in range(3):
        await rig.send_datagram(b"%d" % number)
    assert [await rig.next_datagram() for _ in range(3)] == [b"0", b"1", b"2"]
    assert trio.current_time() - begun >= 0.2


async def test_proxy_delays_streams_without_slowing_them(rig: Rig) -> None:
    async with await rig.dial() as stream:
        await rig.set(delay_ns=100_000_000)
        begun = trio.current_time()
        await stream.send_all(b"x")
        assert await receive(stream, 1) == b"x"
        assert trio.current_time() - begun >= 0.2  # once each way


async def test_proxy_loses_a_share_of_datagrams(rig: Rig) -> None:
    await rig.set(loss=1.0)
    await rig.send_datagram(b"gone")
    await until(lambda: _dropped(rig, 1))
    await rig.set(loss=0.0)
    await rig.send_datagram(b"here")
    assert await rig.next_datagram() == b"here"


async def test_proxy_a_host_without_power_is_silent_even_when_healed(rig: Rig) -> None:
    report = await rig.power(is_on=False)
    assert report.off == ["n2"]
    await rig.heal()
    await rig.send_datagram(b"lost")
    await until(lambda: _dropped(rig, 1))
    async with await rig.dial() as stream:
        await stream.send_all(b"x")
        assert await is_silent(lambda: stream.receive_some(1))
        await rig.power(is_on=True)
        assert await receive(stream, 1) == b"x"


async def test_proxy_refuses_unknown_links_and_goes_on(rig: Rig) -> None:
    with pytest.raises(CallRefused, match="n9"):
        await rig.set(links=[Link("n1", "n9")], is_cut=True)
    async with await rig.dial() as stream:
        await stream.send_all(b"x")
        assert await receive(stream, 1) == b"x"

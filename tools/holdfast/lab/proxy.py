"""The link proxies: one process through which every datagram and stream of a lab passes.

A *route* listens where one end believes the other to be, and forwards to where it really is. A datagram
route carries one directed link; a stream route two, since answers travel the other way.

    stream:  client --read--> [queue] --wait until the link is open--> server      link A→B
             client <--wait until the link is open-- [queue] <--read-- server      link B→A

The queues are bounded, so a stalled link pushes back on the writer, as a full window does. End of stream
and reset travel through the queues like data: while a link is cut, nothing of a peer's death arrives.
A connection is made onwards only while both directions are open; until then it is accepted and silent.
Loss on a stream is what TCP makes of it: a chunk is late by a retransmission time.

Nothing here depends on the daemons; a peer that vanishes ends its own stream only.
"""

import argparse
import contextlib
import heapq
import itertools
import json
import random
import resource
import signal
import socket
import struct
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, Literal

import attrs
import structlog
import trio

from daemonkit import log as logging_setup
from daemonkit.cli import announce_ready
from daemonkit.durable import read_small_file
from daemonkit.errors import HoldfastError, OperatorError
from daemonkit.ports import Address
from daemonkit.rpc import Call, Registry, serve
from daemonkit.schema import structure
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
    LinkTable,
    Power,
)

log = structlog.get_logger("proxy")

CHUNK_BYTES: Final = 64 << 10
CHUNKS_QUEUED_MAX: Final = 16  # 1 MiB per direction of a stream, about a window.
STREAMS_MAX: Final = 2048  # Beyond it a connection is closed at once, and logged.
DATAGRAM_BYTES_MAX: Final = 65_535
DATAGRAMS_DELAYED_MAX: Final = 4096  # Beyond it, datagrams of a delayed link are dropped.
CONNECT_SECONDS_MAX: Final = 5.0
RETRANSMISSION_NS: Final = 200_000_000  # Linux' minimum; what one lost segment costs a quiet stream.
FILES_MAX: Final = 65_536
CONFIG_BYTES_MAX: Final = 8 << 20


@attrs.frozen
class Route:
    """``network`` names the network of a datagram route; a stream route has none."""

    source: str
    destination: str
    kind: Literal["tcp", "udp"]
    listen: str
    target: str
    network: str | None = None

    @property
    def link(self) -> Link:
        return Link(self.source, self.destination)


@attrs.frozen
class ProxyConfig:
    ends: list[str]
    control: str
    routes: list[Route]
    seed: int = 0


class Reset(Exception):
    """This stream ends with RST, on both sides."""


@attrs.frozen
class _Chunk:
    """``data`` is empty at the end of the stream, None where the stream was reset."""

    due: float
    data: bytes | None


class LinkProxies:
    """All routes of one lab, the faults of its links, and the streams that pass now."""

    def __init__(self, config: ProxyConfig) -> None:
        self._config = config
        self._table = LinkTable(config.ends)
        self._random = random.Random(config.seed)
        self._changed = trio.Event()
        self._streams: dict[int, tuple[Link, trio.CancelScope]] = {}
        self._stream_ids = itertools.count()
        self._passed = 0
        self._dropped = 0

    # ---- control

    def registry(self) -> Registry:
        registry = Registry()
        registry.add(LINKS_SET, self._on(lambda change: self._table.change(change)))
        registry.add(LINKS_HEAL, self._on(lambda names: self._table.heal(names.links)))
        registry.add(LINKS_RESET, self._on(self._reset))
        registry.add(LINKS_POWER, self._on(lambda power: self._table.power(power.end, is_on=power.is_on)))
        registry.add(LINKS_SHOW, self._on(lambda names: None))
        return registry

    def _on(self, change: Callable[[Any], None]) -> Callable[[Any, Call], Awaitable[LinkReport]]:
        async def handle(params: LinkChange | LinkNames | Power, call: Call) -> LinkReport:
            change(params)
            self._changed.set()
            self._changed = trio.Event()
            return self.report()

        return handle

    def report(self) -> LinkReport:
        return LinkReport(
            self._table.faults(), self._table.off(), len(self._streams), self._passed, self._dropped
        )

    def _reset(self, names: LinkNames) -> None:
        self._table.check(names.links or [])
        for link, scope in list(self._streams.values()):
            if names.links is None or link in names.links or link.reverse in names.links:
                scope.cancel(reason="reset")

    async def _wait_open(self, *links: Link) -> None:
        while not all(self._table.is_open(link, None) for link in links):
            await self._changed.wait()

    # ---- serving

    async def serve(self, *, task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen on every route and on the control address until cancelled."""
        async with trio.open_nursery() as nursery:
            for route in self._config.routes:
                run = self._serve_streams if route.kind == "tcp" else self._serve_datagrams
                await nursery.start(run, route)
            address = await nursery.start(serve, self.registry(), Address.parse(self._config.control))
            task_status.started(address)

    async def _serve_streams(
        self, route: Route, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        listen = Address.parse(route.listen)
        try:
            listeners = await trio.open_tcp_listeners(listen.port, host=listen.host)
        except OSError as error:
            raise OperatorError(f"cannot listen on {listen}: {error.strerror or error}") from error
        task_status.started()

        async def accept(stream: trio.SocketStream) -> None:
            if len(self._streams) >= STREAMS_MAX:
                log.warning("proxy.too_many_streams", limit=STREAMS_MAX, link=str(route.link))
                return
            await self._carry(stream, route)

        await trio.serve_listeners(accept, listeners)

    async def _carry(self, client: trio.SocketStream, route: Route) -> None:
        """One stream from its acceptance to its end. Only this stream dies of what goes wrong here."""
        stream_id = next(self._stream_ids)
        with trio.CancelScope() as scope:
            self._streams[stream_id] = (route.link, scope)
            server: trio.SocketStream | None = None
            try:
                sender, receiver = trio.open_memory_channel[_Chunk](CHUNKS_QUEUED_MAX)
                gone = trio.Event()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._read, client, sender, route.link, gone)
                    if await self._held(route, gone):
                        server = await _connect(Address.parse(route.target))
                        await self._exchange(client, server, receiver, route.link)
                    nursery.cancel_scope.cancel(reason="the stream has ended")
            except* (Reset, OSError, trio.BrokenResourceError):
                scope.cancel(reason="reset by a peer")
            finally:
                del self._streams[stream_id]
                for stream in (client, server):
                    if stream is not None:
                        _close(stream, is_reset=scope.cancel_called)

    async def _held(self, route: Route, gone: trio.Event) -> bool:
        """Wait until both directions are open; False where the client leaves first."""
        if self._table.is_open(route.link, None) and self._table.is_open(route.link.reverse, None):
            return True
        opened = False
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                await gone.wait()
                nursery.cancel_scope.cancel(reason="the client left a silent connection")

            nursery.start_soon(watch)
            await self._wait_open(route.link, route.link.reverse)
            opened = True
            nursery.cancel_scope.cancel(reason="the link is open")
        return opened

    async def _exchange(
        self,
        client: trio.SocketStream,
        server: trio.SocketStream,
        from_client: "trio.MemoryReceiveChannel[_Chunk]",
        link: Link,
    ) -> None:
        """Forward both ways until both have ended. Raises Reset."""
        sender, from_server = trio.open_memory_channel[_Chunk](CHUNKS_QUEUED_MAX)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read, server, sender, link.reverse, trio.Event())
            nursery.start_soon(self._write, from_client, server, link)
            nursery.start_soon(self._write, from_server, client, link.reverse)

    async def _read(
        self,
        stream: trio.SocketStream,
        sender: "trio.MemorySendChannel[_Chunk]",
        link: Link,
        ended: trio.Event,
    ) -> None:
        """Fill the queue until the stream ends; the end is the last chunk."""
        data: bytes | None = b"-"
        while data:
            try:
                data = bytes(await stream.receive_some(CHUNK_BYTES))
            except trio.BrokenResourceError:
                data = None
            if not data:
                ended.set()
            fault = self._table.fault(link)
            late_ns = fault.delay_ns
            if fault.loss and self._random.random() < fault.loss:
                late_ns += RETRANSMISSION_NS
            await sender.send(_Chunk(trio.current_time() + late_ns / 1e9, data))

    async def _write(
        self, receiver: "trio.MemoryReceiveChannel[_Chunk]", stream: trio.SocketStream, link: Link
    ) -> None:
        """Empty the queue into the stream, as the link lets. Raises Reset."""
        async for chunk in receiver:
            await trio.sleep_until(chunk.due)
            await self._wait_open(link)
            if chunk.data is None:
                raise Reset
            try:
                if not chunk.data:
                    await stream.send_eof()
                    return
                await stream.send_all(chunk.data)
            except (trio.BrokenResourceError, OSError):
                break
        # The receiver is gone; its reset travels back on the other direction of the link.
        await self._wait_open(link.reverse)
        raise Reset

    # ---- datagrams

    async def _serve_datagrams(
        self, route: Route, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        listen, target = Address.parse(route.listen), Address.parse(route.target)
        family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
        with trio.socket.socket(family, socket.SOCK_DGRAM) as udp:
            try:
                await udp.bind((listen.host, listen.port))
            except OSError as error:
                raise OperatorError(f"cannot listen on {listen}: {error.strerror or error}") from error
            task_status.started()
            late = _LateDatagrams()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send_late, late, udp, target, route)
                while True:
                    with contextlib.suppress(OSError):  # an ICMP error of an earlier send is no error of ours
                        data, _ = await udp.recvfrom(DATAGRAM_BYTES_MAX)
                        await self._datagram(data, late, udp, target, route)

    async def _datagram(
        self,
        data: bytes,
        late: "_LateDatagrams",
        udp: trio.socket.SocketType,
        target: Address,
        route: Route,
    ) -> None:
        fault = self._table.fault(route.link)
        is_lost = bool(fault.loss) and self._random.random() < fault.loss
        if is_lost or not self._table.is_open(route.link, route.network):
            self._dropped += 1
        elif not fault.delay_ns:
            self._passed += 1
            await udp.sendto(data, (target.host, target.port))
        elif not late.add(trio.current_time() + fault.delay_ns / 1e9, data):
            self._dropped += 1

    async def _send_late(
        self, late: "_LateDatagrams", udp: trio.socket.SocketType, target: Address, route: Route
    ) -> None:
        while True:
            data = await late.next()
            if not self._table.is_open(route.link, route.network):
                self._dropped += 1
                continue
            self._passed += 1
            with contextlib.suppress(OSError):
                await udp.sendto(data, (target.host, target.port))


class _LateDatagrams:
    """Datagrams that wait for their time, in its order, bounded."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, bytes]] = []
        self._count = itertools.count()
        self._added = trio.Event()

    def add(self, due: float, data: bytes) -> bool:
        if len(self._heap) >= DATAGRAMS_DELAYED_MAX:
            return False
        heapq.heappush(self._heap, (due, next(self._count), data))
        self._added.set()
        return True

    async def next(self) -> bytes:
        while True:
            self._added = trio.Event()
            due = self._heap[0][0] if self._heap else float("inf")
            if due <= trio.current_time():
                return heapq.heappop(self._heap)[2]
            with trio.move_on_at(due):
                await self._added.wait()


async def _connect(target: Address) -> trio.SocketStream:
    """Raises Reset where nobody listens: the client shall see what a refused connection looks like."""
    try:
        with trio.fail_after(CONNECT_SECONDS_MAX):
            return await trio.open_tcp_stream(target.host, target.port)
    except (OSError, trio.TooSlowError):
        raise Reset from None


def _close(stream: trio.SocketStream, *, is_reset: bool) -> None:
    """Close without waiting for anybody; with RST if so wanted."""
    with contextlib.suppress(OSError):
        if is_reset:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


def _raise_file_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = FILES_MAX if hard == resource.RLIM_INFINITY else min(FILES_MAX, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


async def run_proxies(config: ProxyConfig) -> None:
    """Serve until SIGTERM or SIGINT."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            address = await nursery.start(LinkProxies(config).serve)
            announce_ready(control=str(address), routes=len(config.routes))
            async for _ in signals:
                nursery.cancel_scope.cancel(reason="told to stop")
                break


def main() -> None:
    """``python -m holdfast.lab.proxy --config FILE``; the lab starts it."""
    parser = argparse.ArgumentParser(prog="holdfast.lab.proxy", description="The link proxies of a lab.")
    parser.add_argument("--config", required=True, type=Path, help="JSON: ends, control, routes, seed")
    given = parser.parse_args()
    logging_setup.set_up()
    refusal: str | None = None
    try:
        document = json.loads(read_small_file(given.config, size_bytes_max=CONFIG_BYTES_MAX))
        config = structure(ProxyConfig, document, where=str(given.config))
        _raise_file_limit()
        trio.run(run_proxies, config)
    except* (HoldfastError, OSError, ValueError) as group:
        refusal = _first_line(group)
    if refusal is not None:  # not within except*: there Python 3.11.2 makes a traceback of SystemExit
        print(f"holdfast.lab.proxy: {refusal}", file=sys.stderr)
        sys.exit(1)


def _first_line(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return " ".join(str(error).split())


if __name__ == "__main__":
    main()

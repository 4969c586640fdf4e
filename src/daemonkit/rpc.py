"""Typed request/response calls over TCP: msgpack values in length-prefixed frames (docs/formats/control.md).

Conversation, one call at a time on a connection:

    server: ["holdfast-rpc", 1, NONCE]            a fresh 32-byte challenge
    client: ["auth", MAC]                         keyed BLAKE2b of the challenge, or empty without a key
    client: [ID, METHOD, PARAMS]
    server: [ID, "progress", ANY] ...             none or several
    server: [ID, "ok", RESULT] | [ID, "error", KIND, MESSAGE]

A *stream* method hands the connection over: after its "ok" the bytes in both directions belong to the
method's own protocol (exports and restores: docs/formats/export-stream.md), so that one address and one
handshake serve both. The client sends nothing between such a request and its answer.

KIND says what the caller can do: ``refused`` (the request cannot be done; the message is one line for
the operator), ``protocol`` (the caller is wrong, the connection ends), ``internal`` (our defect, logged).
A client that goes away, or half-closes, while its call runs cancels that call. Nothing that a peer
sends ends anything but its own connection.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

import attrs
import trio

from daemonkit.codec import decode, encode
from daemonkit.errors import HoldfastError, InvariantBroken, OperatorError, ProtocolError, plain
from daemonkit.frames import FrameReader, frame
from daemonkit.keepalive import notice_lost_peer
from daemonkit.methods import Method
from daemonkit.ports import Address, listening_failed
from daemonkit.schema import SchemaError, structure, unstructure

P = TypeVar("P")
R = TypeVar("R")

GREETING: Final = "holdfast-rpc"
VERSION: Final = 1
REQUEST_BYTES_MAX: Final = 4 << 20
REPLY_BYTES_MAX: Final = 16 << 20
HANDSHAKE_SECONDS_MAX: Final = 5.0
GREETING_SECONDS_MAX: Final = 10.0  # to connect and be greeted: a peer that says nothing is not one of ours
SEND_SECONDS_MAX: Final = 30.0
CONNECTIONS_MAX: Final = 256
KEYS_MAX: Final = 2
_RECEIVE_BYTES: Final = 64 << 10
_BULK_BYTES: Final = 1 << 20


def _log() -> Any:
    """Only servers log: the command lines, which call this module too, start a fifth faster without it."""
    import structlog

    return structlog.get_logger("rpc")


class CallRefused(OperatorError):
    """The other side answered, and said no. The message is its one line."""


class CallFailed(OperatorError):
    """The other side could not be reached, vanished, or broke the protocol: the outcome is unknown."""


@attrs.frozen
class Call:
    """What a handler knows of the call that it serves."""

    peer: str
    _report: Callable[[Any], Awaitable[None]]

    async def progress(self, value: Any) -> None:
        """Tell the caller how far the work is; plain data."""
        await self._report(value)


Handler = Callable[[Any, Call], Awaitable[Any]]
StreamHandler = Callable[[Any, str, trio.abc.Stream], Awaitable[None]]


class Registry:
    """The methods that a server answers."""

    def __init__(self) -> None:
        self._handlers: dict[str, tuple[Method[Any, Any], Handler]] = {}
        self._streams: dict[str, tuple[Method[Any, Any], StreamHandler]] = {}

    def add(self, method: Method[P, R], handler: Callable[[P, Call], Awaitable[R]]) -> None:
        if method.name in self._handlers:
            raise InvariantBroken(f"method {method.name} is registered twice")
        self._handlers[method.name] = (method, handler)

    def add_stream(
        self, method: Method[P, R], handler: Callable[[P, str, trio.abc.Stream], Awaitable[None]]
    ) -> None:
        """``handler(params, peer, stream)`` owns the connection from then on; it ends when that returns."""
        if method.name in self._streams:
            raise InvariantBroken(f"method {method.name} is registered twice")
        self._streams[method.name] = (method, handler)

    def find_stream(self, name: object) -> tuple[Method[Any, Any], StreamHandler] | None:
        return self._streams.get(name) if isinstance(name, str) else None

    def find(self, name: object) -> tuple[Method[Any, Any], Handler]:
        if not isinstance(name, str) or name not in self._handlers:
            raise ProtocolError(
                f"unknown method {str(name)[:80]!r}: this address is another daemon's, or of another version"
            )
        return self._handlers[name]


def _mac(key: bytes, nonce: bytes) -> bytes:
    return hashlib.blake2b(nonce, key=hashlib.blake2b(key).digest()[:32], digest_size=32).digest()


class HandedOver(trio.abc.Stream):
    """A connection that another protocol has taken over; it has been read a little too far."""

    def __init__(self, stream: trio.abc.Stream, rest: bytes) -> None:
        self._stream = stream
        self._rest = rest

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if not self._rest:
            return await self._stream.receive_some(max_bytes)
        await trio.lowlevel.checkpoint()
        size = len(self._rest) if max_bytes is None else max_bytes
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    def take_rest(self) -> bytes:
        """What has been read already, for whoever reads on past this object."""
        rest, self._rest = self._rest, b""
        return rest

    def duplicate(self) -> socket.socket:
        """A socket of its own for the same connection, for a worker thread that moves bulk data in one
        direction while the loop goes on with the other. Whoever asked closes it."""
        if not isinstance(self._stream, trio.SocketStream):
            raise InvariantBroken("only a socket can be handed to a thread")
        return socket.socket(fileno=os.dup(self._stream.socket.fileno()))

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


class _Connection:
    """Frames over one stream; the only place that reads from it."""

    def __init__(self, stream: trio.abc.Stream, *, frame_bytes_max: int) -> None:
        self._stream = stream
        self._reader = FrameReader(frame_bytes_max=frame_bytes_max)
        self._buffered_bytes_max = frame_bytes_max + _RECEIVE_BYTES
        self._send_lock = trio.Lock()

    async def send(self, value: Any) -> None:
        data = frame(encode(value))
        async with self._send_lock:
            with trio.fail_after(SEND_SECONDS_MAX):
                await self._stream.send_all(data)

    async def receive(self) -> Any:
        """The next message; None when the peer has closed between messages."""
        while (payload := self._reader.next_frame()) is None:
            data = await self._stream.receive_some(_RECEIVE_BYTES)
            if not data:
                self._reader.finish()
                return None
            self._reader.feed(data)
        return decode(payload)

    def hand_over(self) -> trio.abc.Stream:
        """The stream, for another protocol; what was read beyond the last message comes first."""
        if isinstance(self._stream, trio.SocketStream):
            # trio wakes a sender up for every 16 KiB, which suits a conversation. This carries bulk data.
            with contextlib.suppress(OSError):
                self._stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _BULK_BYTES)
        return HandedOver(self._stream, self._reader.take_rest())

    async def wait_gone(self) -> None:
        """Return when the peer closes its side. Speaking out of turn is a protocol error."""
        if await self._stream.receive_some(1):
            raise ProtocolError("a request arrived before the previous one was answered")


async def _authenticate(connection: _Connection, keys: Sequence[bytes], *, required: bool) -> None:
    nonce = secrets.token_bytes(32)
    await connection.send([GREETING, VERSION, nonce])
    message = await connection.receive()
    if not isinstance(message, list) or len(message) != 2 or message[0] != "auth":
        raise ProtocolError("expected an authentication message")
    mac = message[1]
    if not isinstance(mac, bytes):
        raise ProtocolError("the authentication code is not bytes")
    if mac or required:
        good = [hmac.compare_digest(_mac(key, nonce), mac) for key in keys[:KEYS_MAX]]
        if not any(good) and (required or keys):
            await connection.send([0, "error", "protocol", "wrong or missing cluster key: use --key FILE"])
            raise ProtocolError("wrong or missing cluster key")


def _first_leaf(error: BaseException) -> BaseException:
    """The most telling leaf of a group: an operator's error before an OS error before any other."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [_first_leaf(inner) for inner in error.exceptions]
    for kind in (InvariantBroken, HoldfastError, OSError):
        for leaf in leaves:
            if isinstance(leaf, kind):
                return leaf
    return leaves[0]


async def _run_handler(
    connection: _Connection, handler: Handler, params: Any, call: Call
) -> tuple[bool, Any]:
    """(done, result): not done when the client went away, in which case the call was cancelled."""
    outcome: list[Any] = []
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                await connection.wait_gone()
            nursery.cancel_scope.cancel(reason="the client went away")

        nursery.start_soon(watch)
        outcome.append(await handler(params, call))
        nursery.cancel_scope.cancel(reason="answered")
    return bool(outcome), outcome[0] if outcome else None


async def _answer(connection: _Connection, registry: Registry, message: Any, peer: str) -> bool:
    """Serve one request; False when the connection must end."""
    if not isinstance(message, list) or len(message) != 3 or not isinstance(message[0], int):
        raise ProtocolError("a request is [ID, METHOD, PARAMS]")
    request_id, name, raw = message
    if (found := registry.find_stream(name)) is not None:
        await _run_stream(connection, found, request_id, raw, peer)
        return False
    try:
        method, handler = registry.find(name)
        params = structure(method.params, raw, where=method.name)
    except (ProtocolError, SchemaError) as error:
        await connection.send([request_id, "error", "protocol", str(error)])
        return False

    async def report(value: Any) -> None:
        await connection.send([request_id, "progress", value])

    try:
        done, result = await _run_handler(connection, handler, params, Call(peer, report))
    except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001 - supervision boundary: one call's failure stays its own
        kind, text = _describe(error, method.name)
        await connection.send([request_id, "error", kind, text])
        return kind != "protocol"
    if done:
        await connection.send([request_id, "ok", unstructure(result)])
    return done


async def _run_stream(
    connection: _Connection,
    found: tuple[Method[Any, Any], StreamHandler],
    request_id: int,
    raw: Any,
    peer: str,
) -> None:
    """Hand the connection to a stream method, and keep its failure from everybody else."""
    method, handler = found
    try:
        params = structure(method.params, raw, where=method.name)
    except SchemaError as error:
        await connection.send([request_id, "error", "protocol", str(error)])
        return
    await connection.send([request_id, "ok", None])
    try:
        await handler(params, peer, connection.hand_over())
    except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001 - supervision boundary: one stream's failure stays its own
        _, text = _describe(error, method.name)
        _log().info("rpc.stream_ended", peer=peer, method=method.name, reason=text)


def _describe(error: BaseException, name: str) -> tuple[str, str]:
    leaf = _first_leaf(error)
    if isinstance(leaf, InvariantBroken) or not isinstance(leaf, Exception):
        raise error
    if isinstance(leaf, ProtocolError):
        return "protocol", str(leaf)
    if isinstance(leaf, HoldfastError):
        return "refused", plain(str(leaf))
    if isinstance(leaf, OSError):
        where = f"{leaf.filename}: " if leaf.filename else ""
        return "refused", f"{where}{leaf.strerror or leaf}"
    _log().error("rpc.handler_failed", method=name, exc_info=leaf)
    return "internal", f"{name} failed: {type(leaf).__name__}: {leaf}"


async def _serve_connection(
    stream: trio.abc.Stream, registry: Registry, keys: Sequence[bytes], *, required: bool, peer: str
) -> None:
    connection = _Connection(stream, frame_bytes_max=REQUEST_BYTES_MAX)
    try:
        with trio.fail_after(HANDSHAKE_SECONDS_MAX):
            await _authenticate(connection, keys, required=required)
        while (message := await connection.receive()) is not None:
            if not await _answer(connection, registry, message, peer):
                break
    except (
        ProtocolError,
        trio.BrokenResourceError,
        trio.ClosedResourceError,
        trio.TooSlowError,
        OSError,
    ) as error:
        _log().info("rpc.connection_closed", peer=peer, reason=str(error) or type(error).__name__)
    except BaseExceptionGroup as group:
        leaf = _first_leaf(group)
        if not isinstance(leaf, ProtocolError | trio.BrokenResourceError | OSError):
            raise
        _log().info("rpc.connection_closed", peer=peer, reason=str(leaf))


async def serve(
    registry: Registry,
    address: Address,
    *,
    keys: Sequence[bytes] = (),
    task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Listen on ``address`` until cancelled; started() gives the bound address.

    ``keys``: up to two cluster keys, either of which a caller may know. A loopback listener also takes
    calls without one; any other listener requires one. Raises OperatorError for an address in use.
    """
    required = not address.is_loopback
    if required and not keys:
        raise OperatorError(
            f"{address}: without a cluster key only loopback addresses are served; use --key FILE"
        )
    try:
        listeners = await trio.open_tcp_listeners(address.port, host=address.host)
    except OSError as error:
        raise listening_failed(address, error) from error
    slots = trio.Semaphore(CONNECTIONS_MAX)

    async def accept(stream: trio.SocketStream) -> None:
        peer = _peer_name(stream)
        notice_lost_peer(stream)
        try:
            slots.acquire_nowait()
        except trio.WouldBlock:
            _log().warning("rpc.too_many_connections", peer=peer, limit=CONNECTIONS_MAX)
            return
        try:
            await _serve_connection(stream, registry, keys, required=required, peer=peer)
        finally:
            slots.release()

    bound = listeners[0].socket.getsockname()
    task_status.started(Address(address.host, bound[1]))
    await trio.serve_listeners(accept, listeners)


def _peer_name(stream: trio.SocketStream) -> str:
    try:
        name = stream.socket.getpeername()
    except OSError:
        return "gone"
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "local"


@attrs.frozen
class _Anything:
    """The result of a stream method: its "ok" carries nothing."""


class Client:
    """One connection; one call at a time. A call that was cancelled or failed leaves it unusable."""

    def __init__(self, connection: _Connection, address: Address) -> None:
        self._connection = connection
        self._address = address
        self._next_id = 1
        self._broken = False

    async def call(
        self, method: Method[P, R], params: P, *, on_progress: Callable[[Any], None] | None = None
    ) -> R:
        """The result. Raises CallRefused (answered no) or CallFailed (no usable answer)."""
        if self._broken:
            raise CallFailed(f"{self._address}: the connection is no longer usable")
        request_id, self._next_id = self._next_id, self._next_id + 1
        self._broken = True
        try:
            await self._connection.send([request_id, method.name, unstructure(params)])
            status, payload = await self._final(request_id, on_progress)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError) as error:
            raise CallFailed(f"{self._address}: connection lost during {method.name}: {error}") from error
        except ProtocolError as error:
            raise CallFailed(f"{self._address}: {error}") from error
        if status == "ok":
            self._broken = False
            if method.result is _Anything:
                return _Anything()  # type: ignore[return-value] # R is _Anything, which mypy cannot see
            return structure(method.result, payload[0], where=method.name)
        kind, text = payload
        if kind == "refused":
            self._broken = False
            raise CallRefused(text)
        raise CallFailed(f"{self._address}: {text}")

    async def open_stream(self, method: Method[P, R], params: P) -> trio.abc.Stream:
        """Call a stream method; the connection then carries its protocol and nothing else.

        Raises CallRefused or CallFailed. The stream ends with the ``async with`` of ``connect``.
        """
        await self.call(Method(method.name, method.params, _Anything), params)
        self._broken = True
        return self._connection.hand_over()

    async def _final(
        self, request_id: int, on_progress: Callable[[Any], None] | None
    ) -> tuple[str, list[Any]]:
        while True:
            message = await self._connection.receive()
            if message is None:
                raise ProtocolError("the server closed the connection before it answered")
            if not isinstance(message, list) or len(message) < 3 or message[0] not in (request_id, 0):
                raise ProtocolError("the server answered something else than was asked")
            status, *payload = message[1:]
            if status == "progress" and len(payload) == 1:
                if on_progress is not None:
                    on_progress(payload[0])
            elif status == "ok" and len(payload) == 1:
                return status, payload
            elif status == "error" and len(payload) == 2 and all(isinstance(part, str) for part in payload):
                return status, payload
            else:
                raise ProtocolError("the server answered in an unknown form")


@contextlib.asynccontextmanager
async def connect(address: Address, *, key: bytes | None = None) -> AsyncIterator[Client]:
    """A client for the length of the ``async with``. Raises CallFailed where nobody (of ours) answers.

    Timeouts of calls are the caller's; that somebody greets at all is bounded here.
    """
    try:
        with trio.fail_after(GREETING_SECONDS_MAX):
            stream = await trio.open_tcp_stream(address.host, address.port)
    except trio.TooSlowError as error:
        raise CallFailed(f"cannot connect to {address}: no answer in {GREETING_SECONDS_MAX:g} s") from error
    except OSError as error:
        reason = error.strerror or "connection refused"
        hint = "does its daemon run, and is that its control address (its ready line tells)?"
        raise CallFailed(f"cannot connect to {address}: {reason}: {hint}") from error
    notice_lost_peer(stream)
    connection = _Connection(stream, frame_bytes_max=REPLY_BYTES_MAX)
    try:
        await _greet(connection, address, key)
        yield Client(connection, address)
    finally:
        await trio.aclose_forcefully(stream)


async def _greet(connection: _Connection, address: Address, key: bytes | None) -> None:
    """The client's side of the handshake. Whatever else listens there is told apart here, or never."""
    try:
        with trio.fail_after(GREETING_SECONDS_MAX):
            greeting = await connection.receive()
            if not isinstance(greeting, list) or len(greeting) != 3 or greeting[:2] != [GREETING, VERSION]:
                raise ProtocolError("no greeting of this version of the control protocol")
            if not isinstance(greeting[2], bytes):
                raise ProtocolError("its challenge is not bytes")
            await connection.send(["auth", _mac(key, greeting[2]) if key else b""])
    except trio.TooSlowError as error:
        what = f"connected, but nobody greeted within {GREETING_SECONDS_MAX:g} s"
        raise CallFailed(f"{address}: {what}: is it a control address, and its daemon alive?") from error
    except ProtocolError as error:
        raise CallFailed(f"{address}: not a control address of Holdfast: {error}") from error
    except (trio.BrokenResourceError, OSError) as error:
        raise CallFailed(f"{address}: the connection broke before a greeting: {error}") from error

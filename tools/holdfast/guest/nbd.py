"""A small blocking NBD client on the standard library alone: an independent witness of diskd's server.

It speaks fixed newstyle with NBD_OPT_GO and simple replies, one request at a time. Everything that a
server sends is bounded and checked before it is used. Failures have three kinds, because they mean
three things to a guest:

    Fenced          this run may no longer write: a policy refusal, or ESHUTDOWN
    ConnectionLost  nothing is known: connect again
    RequestFailed   the server answered this request with an errno; the connection goes on
"""

import errno
import os
import socket
import struct
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self, TypeVar
from urllib.parse import unquote

T = TypeVar("T")

# The constants and layouts are those of the NBD specification (doc/proto.md), spelled as it does.
NBDMAGIC: Final = 0x4E42444D41474943
IHAVEOPT: Final = 0x49484156454F5054
REPLY_MAGIC: Final = 0x3E889045565A9
NBD_FLAG_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_NO_ZEROES: Final = 1 << 1
NBD_OPT_ABORT: Final = 2
NBD_OPT_GO: Final = 7
NBD_REP_ACK: Final = 1
NBD_REP_INFO: Final = 3
NBD_REP_ERR_POLICY: Final = (1 << 31) + 2
NBD_REP_ERROR_BIT: Final = 1 << 31
NBD_INFO_EXPORT: Final = 0
NBD_FLAG_READ_ONLY: Final = 1 << 1
NBD_CMD_READ: Final = 0
NBD_CMD_WRITE: Final = 1
NBD_CMD_DISC: Final = 2
NBD_CMD_FLUSH: Final = 3
NBD_REQUEST_MAGIC: Final = 0x25609513
NBD_SIMPLE_REPLY_MAGIC: Final = 0x67446698
NBD_ESHUTDOWN: Final = 108

_OPTION_REPLY: Final = struct.Struct(">QIII")
_REQUEST: Final = struct.Struct(">IHHQQI")
_SIMPLE_REPLY: Final = struct.Struct(">IIQ")

DEFAULT_PORT: Final = 10809
NAME_BYTES_MAX: Final = 4096  # The specification's own limit on strings.
OPTION_REPLY_BYTES_MAX: Final = 64 << 10
OPTION_REPLIES_MAX: Final = 64  # A server that sends more information items than this is not serving us.
SIZE_BYTES_MAX: Final = 1 << 56
REQUEST_BYTES_MAX: Final = 1 << 20
HANDSHAKE_SECONDS_MAX: Final = 5.0


class NbdError(Exception):
    """Base of what this client raises."""


class Fenced(NbdError):
    """The server refuses: another owner has the image. ``is_final`` for a policy refusal; ESHUTDOWN is also
    what a server that shuts down answers, so that its caller may want to ask once more."""

    def __init__(self, message: str, *, is_final: bool) -> None:
        super().__init__(message)
        self.is_final = is_final


class ConnectionLost(NbdError):
    """The connection is gone, was never there, or made no sense; the outcome of a request is unknown."""


class RequestFailed(NbdError):
    """One request was answered with an errno."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(f"{what}: {os.strerror(code)}")
        self.errno = code


def parse_uri(uri: str) -> tuple[str, int, str]:
    """(host, port, name) of ``nbd://HOST[:PORT]/NAME``; a name may hold @ and :. Raises ValueError."""
    scheme, separator, rest = uri.partition("://")
    authority, _, name = rest.partition("/")
    if scheme != "nbd" or not separator or not authority:
        raise ValueError(f"{uri!r} is not an NBD address: write nbd://HOST:PORT/NAME")
    host, port_text = authority, ""
    if authority.startswith("["):
        host, bracket, port_text = authority[1:].partition("]")
        if not bracket or (port_text and not port_text.startswith(":")):
            raise ValueError(f"{uri!r}: a bracketed host is written [v6]:PORT")
        port_text = port_text[1:]
    elif ":" in authority:
        host, _, port_text = authority.rpartition(":")
    if port_text and (not port_text.isascii() or not port_text.isdigit() or not 0 < int(port_text) < 65536):
        raise ValueError(f"{uri!r}: the port is a number from 1 to 65535")
    name = unquote(name)
    if not host or len(name.encode()) > NAME_BYTES_MAX:
        raise ValueError(f"{uri!r}: the host is missing, or the export's name is too long")
    return host, int(port_text) if port_text else DEFAULT_PORT, name


class NbdClient:
    """One connection to one export. ``reply_seconds_max`` bounds the wait for each reply."""

    def __init__(self, uri: str, *, reply_seconds_max: float = 10.0) -> None:
        host, port, self._name = parse_uri(uri)
        self._handle = 0
        try:
            self._socket = socket.create_connection((host, port), timeout=HANDSHAKE_SECONDS_MAX)
        except OSError as error:
            raise ConnectionLost(f"cannot connect to {host}:{port}: {error.strerror or error}") from error
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.size_bytes, self._flags = self._negotiate()
            self._socket.settimeout(reply_seconds_max)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_read_only(self) -> bool:
        return bool(self._flags & NBD_FLAG_READ_ONLY)

    def close(self) -> None:
        """Say goodbye if that is still possible, and close. Never raises."""
        try:
            self._socket.settimeout(0.2)
            self._socket.sendall(_REQUEST.pack(NBD_REQUEST_MAGIC, 0, NBD_CMD_DISC, 0, 0, 0))
        except OSError:
            pass
        finally:
            self._socket.close()

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes; longer reads are split."""
        self._check_range(offset, length)
        parts = []
        while length:
            take = min(length, REQUEST_BYTES_MAX)
            parts.append(self._call(NBD_CMD_READ, offset, take, b""))
            offset, length = offset + take, length - take
        return b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        """Write ``data``; it is durable only after ``flush``."""
        self._check_range(offset, len(data))
        view = memoryview(data)
        while view:
            take = view[:REQUEST_BYTES_MAX]
            self._call(NBD_CMD_WRITE, offset, len(take), bytes(take))
            offset, view = offset + len(take), view[len(take) :]

    def flush(self) -> None:
        """Return when everything answered before is durable."""
        self._call(NBD_CMD_FLUSH, 0, 0, b"")

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise ValueError(f"range {offset}+{length} is outside a disk of {self.size_bytes} bytes")

    def _receive(self, length: int) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            missing = length - len(parts)
            data = self._guard(lambda: self._socket.recv(missing))  # noqa: B023 - called before it returns
            if not data:
                raise ConnectionLost("the server closed the connection")
            parts += data
        return bytes(parts)

    def _send(self, data: bytes) -> None:
        self._guard(lambda: self._socket.sendall(data))

    def _guard(self, operation: Callable[[], T]) -> T:
        try:
            return operation()
        except TimeoutError as error:
            raise ConnectionLost("the server does not answer") from error
        except OSError as error:
            raise ConnectionLost(f"connection lost: {error.strerror or error}") from error

    def _negotiate(self) -> tuple[int, int]:
        """(size in bytes, transmission flags) of the export, after NBD_OPT_GO."""
        magic, option_magic, flags = struct.unpack(">QQH", self._receive(18))
        if magic != NBDMAGIC or option_magic != IHAVEOPT or not flags & NBD_FLAG_FIXED_NEWSTYLE:
            raise ConnectionLost("the server does not speak fixed newstyle NBD")
        name = self._name.encode()
        request = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        no_zeroes = flags & NBD_FLAG_NO_ZEROES
        self._send(
            struct.pack(">I", NBD_FLAG_FIXED_NEWSTYLE | no_zeroes)
            + struct.pack(">QII", IHAVEOPT, NBD_OPT_GO, len(request))
            + request
        )
        export: tuple[int, int] | None = None
        for _ in range(OPTION_REPLIES_MAX):
            kind, payload = self._option_reply()
            if kind == NBD_REP_ACK:
                if export is None:
                    raise ConnectionLost("the server did not tell the size of the export")
                return export
            if kind == NBD_REP_INFO and len(payload) == 12 and payload[:2] == b"\0\0":
                _, size, transmission = struct.unpack(">HQH", payload)
                if not 0 < size <= SIZE_BYTES_MAX:
                    raise ConnectionLost(f"the server tells an impossible size of {size} bytes")
                export = size, transmission
        raise ConnectionLost("the server sends information without end")

    def _option_reply(self) -> tuple[int, bytes]:
        magic, option, kind, length = _OPTION_REPLY.unpack(self._receive(_OPTION_REPLY.size))
        if magic != REPLY_MAGIC or option != NBD_OPT_GO or length > OPTION_REPLY_BYTES_MAX:
            raise ConnectionLost("the server's option reply makes no sense")
        payload = self._receive(length)
        if kind & NBD_REP_ERROR_BIT:
            text = " ".join(payload.decode(errors="replace").split())[:200] or f"option error {kind:#x}"
            if kind == NBD_REP_ERR_POLICY:
                raise Fenced(f"export {self._name}: {text}", is_final=True)
            raise ConnectionLost(f"export {self._name}: {text}")
        return kind, payload

    def _call(self, command: int, offset: int, length: int, payload: bytes) -> bytes:
        self._handle += 1
        self._send(_REQUEST.pack(NBD_REQUEST_MAGIC, 0, command, self._handle, offset, length) + payload)
        magic, code, handle = _SIMPLE_REPLY.unpack(self._receive(_SIMPLE_REPLY.size))
        if magic != NBD_SIMPLE_REPLY_MAGIC or handle != self._handle:
            raise ConnectionLost("the server's reply makes no sense")
        if code == NBD_ESHUTDOWN:
            raise Fenced(f"export {self._name}: {os.strerror(errno.ESHUTDOWN)}", is_final=False)
        if code:
            raise RequestFailed(f"export {self._name}", code)
        return self._receive(length) if command == NBD_CMD_READ else b""

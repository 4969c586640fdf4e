"""Listens for NBD clients on TCP and Unix sockets. What one peer does costs only itself.

``serve`` runs until cancelled; ``drain`` then lets what is in flight finish. The caller stops the
listeners first, so that nobody new comes while the others are sent home.
"""

import contextlib
import errno
import os
import socket
import stat
from collections.abc import AsyncIterator
from typing import Final

import structlog
import trio

from daemonkit.errors import InvariantBroken, OperatorError
from daemonkit.keepalive import notice_lost_peer
from daemonkit.ports import Address, listening_failed
from daemonkit.units import MINUTE, SECOND
from diskd.core.ports import ExportCatalog
from diskd.core.seldom import Seldom
from diskd.core.statistics import ClientStats
from diskd.shell.nbd_connection import DROP_SECONDS_MAX, Connection
from diskd.shell.nbd_linger import Company
from diskd.shell.nbd_memory import Pool

# Each takes two file descriptors at most and, when busy, nbd_memory.OWN_BYTES beside its buffers.
CONNECTIONS_MAX: Final = 512
# Fewer wake-ups for large replies than with trio's default of 16 KiB; still little is queued in the kernel.
_UNSENT_BYTES: Final = 1 << 20

log = structlog.get_logger("nbd")


class NbdServer:
    """Serves the exports of one catalog on any number of listeners."""

    def __init__(
        self, catalog: ExportCatalog, *, connections_max: int = CONNECTIONS_MAX, pool: Pool | None = None
    ) -> None:
        self._catalog = catalog
        self._connections: dict[Connection, str] = {}
        self._connections_max = connections_max
        self._company = Company()
        self._pool = pool or Pool()
        self._changed = trio.Event()
        self._full = Seldom(MINUTE)
        self._leaving: set[Connection] = set()

    @property
    def connections(self) -> int:
        return len(self._connections)

    def clients(self) -> list[ClientStats]:
        """Those that have opened an export."""
        now = trio.current_time()
        return [
            ClientStats(
                peer, connection.name, connection.requests, int((now - connection.opened_at) * SECOND)
            )
            for connection, peer in self._connections.items()
            if connection.name
        ]

    async def serve_tcp(
        self,
        address: Address,
        *,
        outliving: trio.Nursery | None = None,
        task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """started() gives the bound address. Raises OperatorError where it cannot listen.

        Connections run in ``outliving``, where given: they go on when this is cancelled, for ``drain``.
        """
        try:
            listeners = await trio.open_tcp_listeners(address.port, host=address.host)
        except OSError as error:
            raise listening_failed(address, error) from error
        task_status.started(Address(address.host, listeners[0].socket.getsockname()[1]))
        await trio.serve_listeners(self._accept, listeners, handler_nursery=outliving)

    async def serve_unix(
        self,
        path: str,
        *,
        outliving: trio.Nursery | None = None,
        task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """started() gives the path; else as serve_tcp."""
        async with _unix_listener(path) as listener:
            task_status.started(path)
            await trio.serve_listeners(self._accept, [listener], handler_nursery=outliving)

    async def serve_inherited(self, sock: socket.socket, *, outliving: trio.Nursery | None = None) -> None:
        """As serve_tcp, on a socket that listens already and does not block."""
        with sock:
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
            await trio.serve_listeners(self._accept, [listener], handler_nursery=outliving)

    async def _accept(self, stream: trio.SocketStream) -> None:
        await self.serve_socket(socket.socket(fileno=stream.socket.detach()))

    async def serve_socket(self, sock: socket.socket) -> None:
        """Serve one connected socket to its end, and close it."""
        with sock:
            sock.setblocking(False)
            peer = _peer_name(sock)
            if len(self._connections) >= self._connections_max and not self._make_way():
                self._say_full(peer)
                return
            _tune(sock)
            connection = Connection(sock, peer, self._catalog, self._company, self._pool)
            self._connections[connection] = peer
            try:
                await connection.run()
            except* (OSError, trio.ClosedResourceError) as group:
                connection.reason = str(group.exceptions[0])
            except* InvariantBroken:
                raise
            except* Exception:
                # The supervision boundary: a defect met by one peer must not end the service of the others.
                log.exception("nbd.connection_failed", peer=peer)
            finally:
                del self._connections[connection]
                self._leaving.discard(connection)
                self._changed.set()
                self._changed = trio.Event()
                say = log.info if connection.name else log.debug
                say("nbd.closed", peer=peer, export=connection.name, reason=connection.reason)

    def _make_way(self) -> bool:
        """Send whoever has haggled longest home: who gets nowhere must not keep out a guest who returns."""
        for connection in self._connections:
            if not connection.name and connection not in self._leaving:
                self._leaving.add(connection)
                connection.drop("it had not chosen an export yet, and others want to connect")
                return True
        return False

    def _say_full(self, peer: str) -> None:
        silenced = self._full.ask("", int(trio.current_time() * SECOND))
        if silenced is not None:
            limit = self._connections_max
            log.warning("nbd.too_many_connections", peer=peer, limit=limit, silenced=silenced)

    async def drain(self, reason: str) -> None:
        """Drop all connections and wait until they have ended; bounded by their own limit."""
        with trio.move_on_after(2 * DROP_SECONDS_MAX):
            while self._connections:
                for connection in list(self._connections):
                    connection.drop(reason)
                await self._changed.wait()


def _peer_name(sock: socket.socket) -> str:
    try:
        name = sock.getpeername()
    except OSError:
        return "gone"
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "local"


def _tune(sock: socket.socket) -> None:
    if sock.family == socket.AF_UNIX:
        return
    notice_lost_peer(sock)
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)


def _remove_stale(path: str) -> None:
    """Remove a socket file that nobody listens on. Raises OperatorError for anything else there."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OperatorError(f"cannot listen on {path}: the file exists and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(path)
    if code != errno.ECONNREFUSED:
        raise OperatorError(f"cannot listen on {path}: another process listens there")
    os.unlink(path)


@contextlib.asynccontextmanager
async def _unix_listener(path: str) -> AsyncIterator[trio.SocketListener]:
    _remove_stale(path)
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    with sock:
        try:
            await sock.bind(path)
        except OSError as error:
            raise OperatorError(f"cannot listen on {path}: {error.strerror or error}") from error
        try:
            sock.listen(min(128, CONNECTIONS_MAX))
            yield trio.SocketListener(sock)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)

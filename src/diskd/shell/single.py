"""`diskd nbd`: one disk for whoever started us, over the socket that it handed down; nothing listens by name.

standard input is a socket     one connection; its end is ours
socket activation              many connections, until SIGTERM or SIGINT
"""

import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path

import structlog
import trio

from diskd.config import Settings
from diskd.core.ports import Export, ExportCatalog
from diskd.errors import NoSuchExport
from diskd.shell.library import open_library
from diskd.shell.nbd_server import NbdServer
from diskd.shell.raw_file import OpenFile, RawFile, RawFileCatalog

log = structlog.get_logger("single")


class OneImage:
    """One export name of a catalog, also as the default export. ``@EPOCH`` and so on are part of the name."""

    def __init__(self, catalog: ExportCatalog, name: str) -> None:
        self._catalog = catalog
        self._name = name

    def names(self) -> Sequence[str]:
        return [name for name in self._catalog.names() if name == self._name]

    def _own(self, name: str) -> str:
        if name not in ("", self._name):
            raise NoSuchExport(f"only {self._name} is served here")
        return self._name

    async def open(self, name: str, *, peer: str, drop: Callable[[str], None]) -> Export:
        return await self._catalog.open(self._own(name), peer=peer, drop=drop)

    async def info(self, name: str) -> Export:
        return await self._catalog.info(self._own(name))


@contextlib.asynccontextmanager
async def raw_catalog(path: Path) -> AsyncIterator[ExportCatalog]:
    """A raw file, served as it is."""
    file = await trio.to_thread.run_sync(OpenFile, path)
    try:
        yield RawFileCatalog(RawFile(file))
    finally:
        file.close()


@contextlib.asynccontextmanager
async def image_catalog(root: Path, name: str, settings: Settings) -> AsyncIterator[ExportCatalog]:
    """One image of a library, tracked and under its lease; the library is ours as long as this lasts."""
    async with open_library(root, settings.library()) as library:
        catalog = OneImage(library, name)
        await catalog.info("")
        yield catalog


Opened = contextlib.AbstractAsyncContextManager[ExportCatalog]


async def serve_connection(opened: Opened, connection: socket.socket) -> None:
    """Serve one connection to its end; a signal sends it home."""
    with connection, trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with opened as catalog, trio.open_nursery() as nursery:
            server = NbdServer(catalog)
            nursery.start_soon(_drain_at_signal, server, signals)
            await server.serve_socket(connection)
            nursery.cancel_scope.cancel(reason="the connection has ended")


async def _drain_at_signal(server: NbdServer, signals: AsyncIterator[int]) -> None:
    await anext(signals)
    await server.drain("diskd is shutting down")


async def serve_listeners(opened: Opened, listeners: Sequence[socket.socket]) -> None:
    """Serve whoever comes, until a signal."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with opened as catalog, trio.open_nursery() as peers:
            server = NbdServer(catalog)
            async with trio.open_nursery() as accepting:
                for listener in listeners:
                    accepting.start_soon(partial(server.serve_inherited, listener, outliving=peers))
                await anext(signals)
                accepting.cancel_scope.cancel(reason="told to stop")
            await server.drain("diskd is shutting down")
            peers.cancel_scope.cancel(reason="told to stop")

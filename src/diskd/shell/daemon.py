"""The `diskd run` process: opens the library, serves NBD and control until told to stop, closes cleanly.

The end comes in the reverse order of the beginning: control first (what a call was doing is undone by
the call itself), then no new NBD clients, then those that are there are sent home, then the images are
closed. A second signal does not hurry it: an image that is not closed cleanly costs exactness at most.
"""

import signal
import socket
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path

import attrs
import structlog
import trio

from daemonkit.cli import announce_ready
from daemonkit.ports import Address
from daemonkit.rpc import Registry, serve
from daemonkit.service import notify_stopping
from diskd.config import Settings
from diskd.core.metrics import render
from diskd.shell.audit import register_audit
from diskd.shell.backup import register_backup
from diskd.shell.control import Control, Listening
from diskd.shell.copies import register_copies
from diskd.shell.file_limit import raise_file_limit
from diskd.shell.image_settings import ImageSettings
from diskd.shell.library import Library, open_library
from diskd.shell.metrics import serve_metrics
from diskd.shell.nbd_server import NbdServer
from diskd.shell.restored_images import register_restore
from diskd.shell.san import San, register_san
from diskd.shell.startup import check_surroundings
from diskd.shell.statistics import read_all
from diskd.shell.vitals import Vitals

log = structlog.get_logger("daemon")


@attrs.frozen
class Listen:
    """Where to listen; port 0 takes a free one, and the ready line tells which.

    ``inherited``: sockets for NBD that listen already (socket activation).
    """

    control: Address
    nbd: Address | None
    nbd_socket: str | None
    inherited: Sequence[socket.socket] = ()
    metrics: Address | None = None


async def run_daemon(root: Path, settings: Settings, listen: Listen, keys: Sequence[bytes]) -> None:
    """Serve ``root`` until SIGTERM or SIGINT. Raises OperatorError for what cannot be served."""
    raise_file_limit()
    chosen = settings.library().shared_dir
    shared_dir = Path(chosen) if chosen is not None else ImageSettings().shared_dir
    await trio.to_thread.run_sync(check_surroundings, root, shared_dir)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with open_library(root, settings.library()) as library:
            await _serve(library, root, settings, listen, keys, signals)
    log.info("daemon.stopped")


async def _serve(
    library: Library,
    root: Path,
    settings: Settings,
    listen: Listen,
    keys: Sequence[bytes],
    signals: AsyncIterator[int],
) -> None:
    server = NbdServer(library, connections_max=settings.nbd_connections)
    async with trio.open_nursery() as peers:
        async with trio.open_nursery() as listeners:
            nbd: Address | None = None
            if listen.nbd is not None:
                nbd = await listeners.start(partial(server.serve_tcp, listen.nbd, outliving=peers))
            if listen.nbd_socket is not None:
                await listeners.start(partial(server.serve_unix, listen.nbd_socket, outliving=peers))
            for sock in listen.inherited:
                listeners.start_soon(partial(server.serve_inherited, sock, outliving=peers))
            listening = _listening(root, nbd, listen)
            registry = Registry()
            vitals = Vitals()
            listeners.start_soon(vitals.run)
            asked = Control(library, server, listening, vitals)
            asked.register(registry)
            register_copies(registry, library, listening)
            register_backup(registry, library, key=keys[0] if keys else None)
            register_audit(registry, library, key=keys[0] if keys else None)
            san = San(library, root)
            await san.recover()
            register_san(registry, san, key=keys[0] if keys else None)
            register_restore(registry, library, key=keys[0] if keys else None)
            control = await listeners.start(partial(serve, registry, listen.control, keys=keys))
            library.announce(str(control), keys[0] if keys else None)
            metrics: Address | None = None
            if listen.metrics is not None:
                metrics = await listeners.start(
                    serve_metrics,
                    listen.metrics,
                    lambda: render(asked.status(), read_all(library, server)),
                )
            announce_ready(
                control=str(control),
                nbd=listening.nbd,
                nbd_socket=listening.nbd_socket,
                metrics=str(metrics) if metrics else None,
            )
            listeners.start_soon(san.run)
            log.info("daemon.ready", root=str(root), control=str(control), nbd=listening.nbd)
            number = await anext(signals)
            _tell_stopping(f"calls under way end ({signal.Signals(number).name})", server, library)
            listeners.cancel_scope.cancel(reason="told to stop")
        _tell_stopping("clients are sent home", server, library)
        await server.drain("diskd is shutting down")
        _tell_stopping("images are closed", server, library)
        peers.cancel_scope.cancel(reason="told to stop")


def _tell_stopping(step: str, server: NbdServer, library: Library) -> None:
    """Each step has its bound: 120 s to end a checkpoint durably, 4 s for clients, 60 s for the images."""
    clients, images = server.connections, len(library.images())
    log.info("daemon.stopping", step=step, clients=clients, images=images)
    notify_stopping(f"{step}; {clients} clients, {images} images")


def _listening(root: Path, nbd: Address | None, listen: Listen) -> Listening:
    """What the ready line and ``status`` tell; of inherited sockets the first of each kind."""
    address, path = str(nbd) if nbd else None, listen.nbd_socket
    for sock in listen.inherited:
        name = sock.getsockname()
        if sock.family == socket.AF_UNIX:
            path = path or name
        else:
            address = address or str(Address(name[0], name[1]))
    return Listening(root, address, path)

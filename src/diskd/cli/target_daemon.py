"""`diskd target`: the backup target's command line."""

import signal
from pathlib import Path

import click
import trio

from daemonkit.cli import ADDRESS, announce_ready, read_key, run_daemon_async
from daemonkit.log import LEVELS, set_up
from daemonkit.ports import Address
from daemonkit.service import notify_stopping

# The next free neighbour of NBD's port (10809) and diskd's control (10810).
LISTEN_DEFAULT = "127.0.0.1:10811"


@click.command()
@click.option("--root", required=True, type=click.Path(path_type=Path), help="Directory of the repository.")
@click.option("--listen", type=ADDRESS, default=LISTEN_DEFAULT, show_default=True,
              help="Control calls, exports and restores; port 0 takes a free one.")  # fmt: skip
@click.option("--key", "key_files", multiple=True, metavar="FILE",
              help="Cluster key; twice while it is being changed. Without one, loopback only.")  # fmt: skip
@click.option("--log-level", type=click.Choice(sorted(LEVELS)), default="info", show_default=True)
def target(root: Path, listen: Address, key_files: tuple[str, ...], log_level: str) -> None:
    """Receive backups into a repository of plain qcow2 chains, until SIGTERM.

    \b
    ROOT/VM/POINT/manifest.json   what it is, with all digests
                 /vm.toml         the VM's configuration
                 /DISK.qcow2      a full, or a differential with backing file ../BASE/DISK.qcow2

    A point is there only when it is complete, verified and durable. `diskctl target --help` shows what
    can be asked of it.
    """
    from diskd.shell.file_limit import raise_file_limit  # Kept out of --help's way.
    from diskd.shell.target import run_target

    keys = [key for file in key_files or (None,) if (key := read_key(file)) is not None]
    set_up(level=log_level)
    raise_file_limit()

    async def ready(address: Address) -> None:
        announce_ready(listen=str(address), control=str(address), root=str(root))
        await trio.lowlevel.checkpoint()

    async def run() -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:

                async def stop() -> None:
                    await anext(signals)
                    notify_stopping("what is under way is given up")
                    nursery.cancel_scope.cancel(reason="told to stop")

                nursery.start_soon(stop)
                await run_target(root, listen, keys=keys, ready=ready)

    run_daemon_async(run)

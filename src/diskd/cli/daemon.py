"""`diskd`: the daemon's command line."""

import os
from pathlib import Path

import click

from daemonkit.cli import ADDRESS, print_json, read_key, run_async, run_daemon_async, run_main
from daemonkit.errors import OperatorError
from daemonkit.log import LEVELS, set_up
from daemonkit.ports import Address
from diskd.cli.calling import CONTROL_DEFAULT
from diskd.cli.target_daemon import target

# 10809 is NBD's registered port; the control port is its neighbour.
NBD_DEFAULT = "127.0.0.1:10809"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def group() -> None:
    """Serves virtual disks over NBD, tracks what changes in them, and backs that up.

    \b
    diskd run --root /srv/disks            serve the images under /srv/disks
    diskctl image create web 10GiB         make one
    qemu-io nbd://127.0.0.1:10809/web      use it
    diskd target --root /srv/backups       where backups go (another machine)

    One JSON line on stdout says when it serves, and where; the log goes to stderr.
    """


@group.command()
@click.option("--root", required=True, type=click.Path(path_type=Path), help="Directory of the images.")
@click.option("--nbd", type=ADDRESS, help=f"NBD over TCP; port 0 takes a free one. [{NBD_DEFAULT}]")
@click.option("--nbd-socket", metavar="PATH", help="NBD over a Unix socket; alone it replaces TCP.")
@click.option("--control", type=ADDRESS, default=CONTROL_DEFAULT, show_default=True, help="Control calls.")
@click.option("--metrics", type=ADDRESS, help="Prometheus metrics over HTTP, at /metrics, without a key.")
@click.option("--name", help="Of this diskd among several over one root. [the host's name]")
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="Settings, as TOML.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A setting; repeatable.")
@click.option("--show-config", is_flag=True, help="Print the settings in force as JSON, and exit.")
@click.option(
    "--key",
    "key_files",
    multiple=True,
    metavar="FILE",
    help="Cluster key; twice while it is being changed. Without one, control is loopback only.",
)
@click.option("--log-level", type=click.Choice(sorted(LEVELS)), default="info", show_default=True)
def run(
    root: Path,
    nbd: Address | None,
    nbd_socket: str | None,
    control: Address,
    metrics: Address | None,
    name: str | None,
    config: Path | None,
    overrides: tuple[str, ...],
    show_config: bool,
    key_files: tuple[str, ...],
    log_level: str,
) -> None:
    """Serve the images under a directory until SIGTERM, then close them cleanly.

    \b
    Export names:  IMAGE             read-write while the image is under no lease
                   IMAGE@EPOCH       read-write under the lease with exactly that epoch
                   IMAGE:CHECKPOINT  a frozen view, with a dirty bitmap per reference point

    Sockets that systemd passes on (LISTEN_FDS) serve NBD; then TCP only where --nbd says so.

    Several may serve one root, on one host or over shared storage: each image is one's (diskctl image open).
    """
    from diskd.config import load_settings, show_settings  # Kept out of --help's way.

    settings = load_settings(config, overrides if name is None else (*overrides, f"daemon_name={name}"))
    if show_config:
        print_json(show_settings(settings))
        return
    if not root.is_dir():
        raise OperatorError(f"{root}: no such directory; make it first (an unmounted disk looks the same)")
    if settings.shared_dir is not None and not Path(settings.shared_dir).is_dir():
        raise OperatorError(f"shared_dir {settings.shared_dir}: no such directory; name one on a tmpfs")
    from diskd.shell.activation import inherited_listeners
    from diskd.shell.daemon import Listen, run_daemon

    keys = [key for file in key_files or (None,) if (key := read_key(file)) is not None]
    set_up(level=log_level)
    inherited = inherited_listeners(os.environ)
    if nbd is None and nbd_socket is None and not inherited:
        nbd = Address.parse(NBD_DEFAULT)
    listen = Listen(control, nbd, nbd_socket, inherited, metrics)
    run_daemon_async(lambda: run_daemon(root, settings, listen, keys))


@group.command()
@click.option(
    "--raw", type=click.Path(path_type=Path), metavar="FILE", help="Serve this raw file as it is, untracked."
)
@click.option(
    "--root", type=click.Path(path_type=Path), metavar="DIR", help="Directory of the images; with --image."
)
@click.option(
    "--image", metavar="NAME", help="Serve this export of --root: IMAGE, IMAGE@EPOCH, IMAGE:CHECKPOINT."
)
@click.option("--log-level", type=click.Choice(sorted(LEVELS)), default="warning", show_default=True)
def nbd(raw: Path | None, root: Path | None, image: str | None, log_level: str) -> None:
    """Serve one disk over NBD to the program that starts this one.

    \b
    Standard input a socket     one connection, as from inetd; ends with it
    Socket activation           many connections, until SIGTERM
                                (LISTEN_PID, LISTEN_FDS: systemd, libnbd's tools)

    \b
    nbdinfo -- [ diskd nbd --raw disk.img ]
    nbdcopy -- [ diskd nbd --root /srv/disks --image web ] copy.img

    The disk is the default export (the empty name), an image also goes by its own. No `diskd run` may be
    serving the same directory.
    """
    if (raw is None) == (root is None) or (root is None) != (image is None):
        raise OperatorError("name a disk: either --raw FILE, or --root DIR with --image NAME")
    from diskd.config import load_settings  # Kept out of --help's way.
    from diskd.shell import activation, single

    listeners = activation.inherited_listeners(os.environ)
    connection = None if listeners else activation.inherited_connection()
    set_up(level=log_level)
    if raw is not None:
        opened = single.raw_catalog(raw)
    else:
        assert root is not None
        assert image is not None
        if not root.is_dir():
            raise OperatorError(f"{root}: no such directory")
        opened = single.image_catalog(root, image, load_settings(None, ()))
    if connection is None:
        run_async(lambda: single.serve_listeners(opened, listeners))
    else:
        run_async(lambda: single.serve_connection(opened, connection))


group.add_command(target)


def main() -> None:
    run_main(group)

"""``clusterd``: one node, the witness, and the simulator."""

from pathlib import Path

import click

from daemonkit.cli import ADDRESS, announce_ready, run_async, run_main
from daemonkit.errors import OperatorError
from daemonkit.log import LEVELS, set_up
from daemonkit.ports import Address

FILE = click.Path(path_type=Path, dir_okay=False)
DIRECTORY = click.Path(path_type=Path, file_okay=False)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """The cluster daemon of Holdfast.

    One `clusterd run` per host keeps its VMs running through network trouble; `clusterd witness` is the
    cluster's small database where no etcd is at hand. A daemon prints one JSON line on stdout once it
    serves, logs JSON lines to stderr, and ends cleanly on SIGTERM; VMs outlive it.
    """


@cli.command()
@click.option(
    "--config", "path", type=FILE, required=True, metavar="NODE.toml", help="This node's configuration."
)
@click.option("--log-level", type=click.Choice(sorted(LEVELS)), default="info", show_default=True)
def run(path: Path, log_level: str) -> None:
    """Run this host's node until SIGTERM.

    Stopping or killing it leaves its VMs alone: the next start finds and adopts them.
    """
    from clusterd.config import read_node_config
    from clusterd.shell.daemon import run_node

    config = read_node_config(path)
    set_up(level=log_level)
    run_async(lambda: run_node(config, announce_ready))


@cli.command()
@click.option(
    "--data", type=DIRECTORY, required=True, metavar="DIR", help="Where the database lives; made if absent."
)
@click.option("--listen", type=ADDRESS, required=True, metavar="HOST:PORT", help="Port 0 takes a free one.")
@click.option("--log-level", type=click.Choice(sorted(LEVELS)), default="info", show_default=True)
def witness(data: Path, listen: Address, log_level: str) -> None:
    """Serve the cluster's store: a subset of etcd v3's JSON gateway on one SQLite file.

    Put it where it fails with neither node of a two-node cluster. It has no access control: let only the
    nodes reach it.
    """
    from clusterd.shell.witness import run_witness

    set_up(level=log_level)
    run_async(lambda: run_witness(data, listen, announce_ready))


@cli.command()
@click.option("--outages", type=FILE, required=True, metavar="FILE.csv", help="When which host was out.")
def whatif(outages: Path) -> None:
    """Replay outages of the past under other settings: not built."""
    raise OperatorError(f"whatif is not built: {outages} was not read; `clusterd simulate` runs a scenario")


def main() -> None:
    """The entry point of the console script."""
    run_main(cli)

"""``clusterd``: one node, the witness, and the simulator."""

import time
from pathlib import Path

import click

from daemonkit.cli import ADDRESS, announce_ready, run_daemon_async, run_main
from daemonkit.errors import OperatorError, UsageError
from daemonkit.log import LEVELS, set_up
from daemonkit.ports import Address
from daemonkit.units import SECOND

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
    run_daemon_async(lambda: run_node(config, announce_ready))


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
    run_daemon_async(lambda: run_witness(data, listen, announce_ready))


@cli.command()
@click.argument("scenario", type=click.Path(path_type=Path), metavar="scenarios/NAME")
@click.option("--seed", type=int, default=None, help="Another seed than the scenario's own.")
@click.option("--rewrite", is_flag=True, help="Replace the scenario's expect.trace with what came out.")
def simulate(scenario: Path, seed: int | None, rewrite: bool) -> None:
    """Run a scenario in the simulator, and print its trace.

    The decisions are those of `clusterd run`, in virtual time: equal scenario and seed give equal lines.
    Exit code 1 where an expectation of the scenario did not come true.
    """
    from clusterd.sim import run as simulator

    if rewrite and seed is not None:
        raise UsageError("--rewrite takes the scenario's own seed")
    begun = time.perf_counter()
    result = simulator.rewrite(scenario) if rewrite else simulator.simulate(scenario, seed)
    took = time.perf_counter() - begun
    for line in result.trace:
        click.echo(line)
    if result.failures:
        raise OperatorError(f"{result.name} with seed {result.seed} failed: {'; '.join(result.failures)}")
    seconds = result.virtual_ns / SECOND
    speed = f"{seconds:.1f} s of virtual time in {took:.2f} s ({seconds / took:.0f} times real time)"
    click.echo(f"{result.name}: passed with seed {result.seed}, {speed}", err=True)


@cli.command()
@click.option("--outages", type=FILE, required=True, metavar="FILE.csv", help="When which host was out.")
def whatif(outages: Path) -> None:
    """Replay outages of the past under other settings: not built."""
    raise OperatorError(f"whatif is not built: {outages} was not read; `clusterd simulate` runs a scenario")


def main() -> None:
    """The entry point of the console script."""
    run_main(cli)

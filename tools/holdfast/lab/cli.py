"""``lab``: whole clusters on one machine, made to be broken."""

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from daemonkit.cli import DURATION, SIZE, print_json, run_async, run_main
from daemonkit.errors import OperatorError, UsageError
from daemonkit.schema import unstructure
from daemonkit.units import format_duration
from holdfast.lab.links import LinkReport
from holdfast.lab.state import default_directory, last_directory

R = TypeVar("R")
SHARE = click.FloatRange(0.0, 1.0)

directory_option = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="The lab's directory (default: the lab last brought up by this user).",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Whole clusters on one machine, made to be broken.

    `lab up` starts nodes, their store, diskd and a backup target as separate processes, with every link
    between them through a proxy; the other verbs cut, slow, heal, kill and start again what they name.

    \b
    Ends of a link: n1, n2 ..., store, diskd, target.
    PROCESS: n1 (the whole host: power off; a later start is a new boot), n1.clusterd,
             n1.VM (a VM's process on n1), diskd, store, target; n1.diskd with --diskd-per-node.

    \b
    Try:  lab up && eval "$(lab env)" && lab guest add web --on n1
          lab isolate n1 && clusterctl status
          lab heal && lab guest check web && lab down
    """


def _lab(directory: Path | None) -> Any:
    from holdfast.lab.cluster import Lab

    return Lab.load(directory if directory is not None else last_directory())


def _locked(directory: Path | None, verb: Callable[[Any], Awaitable[R]]) -> R:
    """Run a verb that changes processes, alone."""
    lab = _lab(directory)
    with lab.locked():
        lab.require_up()
        return run_async(lambda: verb(lab))


def _links(directory: Path | None, verb: Callable[[Any], Awaitable[LinkReport]]) -> None:
    lab = _lab(directory)
    report = run_async(lambda: verb(lab))
    print(describe_links(report))


def describe_links(report: LinkReport) -> str:
    """One line for each group of links with the same fault."""
    groups: dict[str, list[str]] = {}
    for entry in report.faults:
        fault = entry.fault
        words = ["cut"] if fault.is_cut else []
        words += [f"cut on network {name}" for name in fault.networks]
        words += [f"delay {format_duration(fault.delay_ns)}"] if fault.delay_ns else []
        words += [f"loss {fault.loss:g}"] if fault.loss else []
        groups.setdefault(", ".join(words), []).append(str(entry.link))
    lines = [f"{what}: {' '.join(links)}" for what, links in groups.items()]
    lines += [f"without power: {' '.join(report.off)}"] if report.off else []
    return "\n".join(lines) or "every link is whole"


def _parse_properties(settings: tuple[str, ...]) -> dict[str, str]:
    properties = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name or not value:
            raise UsageError(
                f"--set {setting}: write PROPERTY=VALUE, for example --set resiliency_period=10s"
            )
        properties[name] = value
    return properties


@cli.command()
@click.option("--nodes", default=3, show_default=True, metavar="N", help="How many nodes.")
@click.option("--networks", default=1, show_default=True, metavar="K", help="How many heartbeat networks.")
@click.option(
    "--store",
    type=click.Choice(["embedded", "etcd"]),
    default="embedded",
    show_default=True,
    help="The cluster's database; embedded is `clusterd witness`.",
)
@click.option("--set", "settings", multiple=True, metavar="PROPERTY=VALUE", help="A cluster property.")
@click.option("--seed", default=0, metavar="N", help="Of the losses that `lab loss` makes.")
@click.option("--diskd-per-node", is_flag=True, help="A diskd on every node, all over one storage.")
@directory_option
def up(
    nodes: int,
    networks: int,
    store: str,
    settings: tuple[str, ...],
    seed: int,
    diskd_per_node: bool,
    directory: Path | None,
) -> None:
    """Bring up a cluster; returns when every node is `up`.

    DIR (default ~/.local/state/holdfast/lab) must be empty, or hold a lab that is down: that one's files
    are removed then. DIR/lab.json tells the addresses, which bypass the link proxies; logs are in DIR/log.
    The lab beats faster than the defaults: heartbeat_interval 200ms, heartbeat_threshold 5, store_session
    max(2 s, twice the isolation time); --set overrides.
    """
    from holdfast.lab.cluster import UpOptions, bring_up

    if store == "etcd":
        raise OperatorError("--store etcd is not built: use the embedded store (clusterd witness)")
    where = directory if directory is not None else default_directory()
    options = UpOptions(nodes, networks, _parse_properties(settings), seed, diskd_per_node)
    lab = run_async(lambda: bring_up(where, options))
    print(f'{nodes} nodes are up: {lab.directory}/lab.json; `eval "$(lab env)"` sets the addresses')


@cli.command()
@directory_option
def down(directory: Path | None) -> None:
    """End every process of the lab, its VMs included. A lab that is down stays down."""
    lab = _lab(directory)
    with lab.locked():
        run_async(lab.down)
    print(f"the lab in {lab.directory} is down")


@cli.command()
@json_option
@directory_option
def status(as_json: bool, directory: Path | None) -> None:
    """Show the lab's processes, its links with a fault, and what the cluster says of nodes and VMs."""
    lab = _lab(directory)
    document = run_async(lambda: _status_document(lab))
    if as_json:
        print_json(document)
        return
    print(f"lab in {lab.directory}: {'up' if document['up'] else 'down'}")
    for name, pid in document["processes"].items():
        print(f"  {name:8} {f'pid {pid}' if pid else 'does not run'}")
    if document["links"] is not None:
        print(document["links_text"])
    cluster = document["cluster"]
    for kind in ("nodes", "vms"):
        for name, entry in (cluster or {}).get(kind, {}).items():
            owner = f" on {entry['owner']}" if entry.get("owner") else ""
            print(f"  {kind[:-1]} {name}: {entry['state']}{owner} {entry.get('reason') or ''}".rstrip())


async def _status_document(lab: Any) -> dict[str, Any]:
    from holdfast.lab.views import best

    is_up = lab.is_up
    report = await lab.link_report() if is_up else None
    return {
        "dir": str(lab.directory),
        "up": is_up,
        "processes": {
            name: lab.state.pid(name) for name in [*lab.nodes, "store", "diskd", "target", "proxy"]
        },
        "addresses": lab.document() if is_up else None,
        "links": unstructure(report) if report else None,
        "links_text": describe_links(report) if report else None,
        "cluster": best(await lab.answers()) if is_up else None,
    }


@cli.command()
@click.argument("node")
@click.option("--storage", is_flag=True, help="Also cut its links to diskd and target.")
@directory_option
def isolate(node: str, storage: bool, directory: Path | None) -> None:
    """Cut all links of NODE, but those to its storage."""
    _links(directory, lambda lab: lab.isolate(node, storage=storage))


@cli.command()
@click.argument("a")
@click.argument("b")
@click.option("--one-way", is_flag=True, help="Only what A sends to B.")
@click.option("--network", metavar="X", help="Only heartbeats on this network.")
@directory_option
def cut(a: str, b: str, one_way: bool, network: str | None, directory: Path | None) -> None:
    """Cut the link between A and B.

    A cut is silence: datagrams vanish, streams stall without FIN or RST, new connections are accepted and
    then silent.
    """
    _links(directory, lambda lab: lab.cut(a, b, one_way=one_way, network=network))


@cli.command()
@click.argument("a")
@click.argument("b")
@click.argument("time_ns", metavar="TIME", type=DURATION)
@directory_option
def delay(a: str, b: str, time_ns: int, directory: Path | None) -> None:
    """Delay what A and B send each other by TIME, each way; 0s undoes it."""
    from holdfast.lab.links import LinkChange, both_ways

    _links(directory, lambda lab: lab.change_links(LinkChange(both_ways(a, b), delay_ns=time_ns)))


@cli.command()
@click.argument("a")
@click.argument("b")
@click.argument("share", type=SHARE)
@directory_option
def loss(a: str, b: str, share: float, directory: Path | None) -> None:
    """Lose this SHARE (0 to 1) of what A and B send each other; 0 undoes it.

    Datagrams vanish; a stream is late by a retransmission time instead, as TCP makes it.
    """
    from holdfast.lab.links import LinkChange, both_ways

    _links(directory, lambda lab: lab.change_links(LinkChange(both_ways(a, b), loss=share)))


@cli.command()
@click.argument("a")
@click.argument("b")
@directory_option
def reset(a: str, b: str, directory: Path | None) -> None:
    """Reset every stream between A and B (RST on both sides); the links stay as they are."""
    _links(directory, lambda lab: lab.reset(a, b))


@cli.command()
@click.argument("a", required=False)
@click.argument("b", required=False)
@directory_option
def heal(a: str | None, b: str | None, directory: Path | None) -> None:
    """Undo every cut, delay and loss: everywhere, of one end A, or between A and B.

    A host without power stays silent until it is started.
    """
    _links(directory, lambda lab: lab.heal(a, b))


def _process_command(name: str, help_text: str) -> None:
    @cli.command(name=name, help=help_text)
    @click.argument("process")
    @directory_option
    def command(process: str, directory: Path | None) -> None:
        _locked(directory, lambda lab: getattr(lab, name)(process))


_process_command("kill", "kill -9 PROCESS. A whole host (n1) falls silent first; its VMs die with it.")
_process_command("start", "Start PROCESS again, at its old addresses. A whole host boots with a new boot id.")
_process_command("pause", "Stop PROCESS where it stands (SIGSTOP); a whole host with its VMs.")
_process_command("resume", "Let a paused PROCESS go on (SIGCONT).")


@cli.command()
@click.argument("scenario", type=click.Path(path_type=Path, exists=True), metavar="scenarios/NAME")
@click.option("--keep", is_flag=True, help="Leave the lab up afterwards.")
@directory_option
def run(scenario: Path, keep: bool, directory: Path | None) -> None:
    """Run a scenario on real processes: a lab of its own, its steps, deadlines and invariants.

    Exits 1 at the first expectation that does not come true in time, and if at the end any guest has lost
    an acknowledged record or was written by two owners at once.
    """
    from holdfast.lab.scenarios import run_scenario

    run_async(lambda: run_scenario(scenario, directory, keep=keep, say=_say))


def _say(text: str) -> None:
    print(text, flush=True)


@cli.command()
@click.option("--seed", type=int, metavar="N")
@click.option("--minutes", type=float, metavar="M")
@directory_option
def soak(seed: int | None, minutes: float | None, directory: Path | None) -> None:
    """Random faults for a time. Not built: refused."""
    raise OperatorError("soak is not built: use `lab run scenarios/NAME`, or `make hunt` for the simulator")


@cli.command()
@directory_option
def env(directory: Path | None) -> None:
    """Print HOLDFAST_NODE, HOLDFAST_DISKD and HOLDFAST_TARGET for `eval "$(lab env)"`.

    They stand for --node, --control and --target of clusterctl and diskctl. The target's address leads
    through the link from diskd, so that `lab cut diskd target` cuts a backup.
    """
    lab = _lab(directory)
    lab.require_up()
    for name, value in lab.environment().items():
        print(f"export {name}={value}")


@cli.group()
def guest() -> None:
    """VMs that keep a journal on their disk, and the verdict on it."""


@guest.command()
@click.argument("name")
@click.option("--on", metavar="NODE", help="Its preferred node.")
@click.option("--size", "size_bytes", type=SIZE, default="64MiB", show_default=True, help="Of its disk.")
@click.option("--rate", default=50.0, show_default=True, metavar="N", help="Records per second.")
@click.option(
    "--size-load",
    default=0.0,
    show_default=True,
    metavar="N",
    help="Extra random blocks of 4 KiB per second.",
)
@directory_option
def add(
    name: str, on: str | None, size_bytes: int, rate: float, size_load: float, directory: Path | None
) -> None:
    """Create an image and a VM called NAME that runs the journal guest; returns when it writes."""
    from holdfast.lab.guests import GuestOptions, add_guest

    options = GuestOptions(on, size_bytes, rate, size_load)
    lab = _lab(directory)
    vm = run_async(lambda: add_guest(lab, name, options))
    print(f"guest {name} is online on {vm['owner']}, epoch {vm['epoch']}, pid {vm['pid']}")


@guest.command()
@click.argument("name")
@json_option
@directory_option
def check(name: str, as_json: bool, directory: Path | None) -> None:
    """Compare what the guest has acknowledged with its disk, while it runs on.

    Exits 1 if an acknowledged record is lost, or if two owners wrote at once.
    """
    from holdfast.checker.__main__ import describe
    from holdfast.lab.guests import check_guest

    lab = _lab(directory)
    verdict = run_async(lambda: check_guest(lab, name))
    if as_json:
        print_json(verdict.as_json())
    else:
        print(describe(verdict))
    if not verdict.is_good:
        print(f"lab: guest {name}: {verdict.lost} lost, {verdict.overlaps} overlaps", file=sys.stderr)
        raise click.exceptions.Exit(1)


def main() -> None:
    """The console script."""
    run_main(cli)


if __name__ == "__main__":
    main()

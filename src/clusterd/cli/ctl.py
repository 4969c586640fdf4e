"""``clusterctl``: what an operator asks of the cluster, through any of its nodes."""

import json
from typing import Any

import click
import trio

from clusterd.cli.ctl_client import Cluster, cluster_of
from clusterd.cli.ctl_node import node
from clusterd.cli.ctl_store import store
from clusterd.cli.ctl_vm import JSON, vm
from clusterd.core import calls
from clusterd.core.commands import ReleaseHold, SetProperty
from clusterd.core.types import check_name
from clusterd.errors import Refused
from daemonkit.cli import print_json, run_async, run_main
from daemonkit.errors import OperatorError, UsageError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--node",
    multiple=True,
    metavar="HOST:PORT",
    help="A node's control address; repeatable, tried in turn. Default: HOLDFAST_NODE.",
)
@click.option("--key", metavar="FILE", help="The cluster key. Default: HOLDFAST_KEY_FILE.")
def cli(node: tuple[str, ...], key: str | None) -> None:
    """Look at a Holdfast cluster and change it, through any node.

    Reading never waits for the store: what you see is what the node that answers knows. Exit codes:
    0 done, 1 refused or failed (one line says why and what to do), 2 wrong usage.
    """


cli.add_command(vm)
cli.add_command(node)
cli.add_command(store)


@cli.command()
@JSON
@click.option("--watch", is_flag=True, help="Show it again every second, until interrupted.")
@click.pass_context
def status(context: click.Context, as_json: bool, watch: bool) -> None:
    """Show nodes, VMs, what is held back and who reaches whom.

    Of several nodes given, all are asked, and the view of one that is not isolated is shown.

    \b
    Example: clusterctl --node 10.0.0.1:7100 status
    """
    cluster = cluster_of(context)
    if watch:
        run_async(lambda: _watch(cluster, as_json=as_json))
        return
    document = run_async(cluster.status)
    if as_json:
        print_json(document)
        return
    from clusterd.cli.ctl_view import console, status_view

    console().print(status_view(document))


async def _watch(cluster: Cluster, *, as_json: bool) -> None:
    from rich.live import Live

    from clusterd.cli.ctl_view import console, status_view

    if as_json:
        while True:
            click.echo(json.dumps(await cluster.status()))
            await trio.sleep(1)
    with Live(console=console(), auto_refresh=False) as live:
        while True:
            live.update(status_view(await cluster.status()), refresh=True)
            await trio.sleep(1)


@cli.command()
@click.option("--follow", is_flag=True, help="Go on with new ones, until interrupted.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document; with --follow one line each.")
@click.pass_context
def events(context: click.Context, follow: bool, as_json: bool) -> None:
    """Show what this node noted: isolations, failovers, quarantines, each with its reason."""
    cluster = cluster_of(context)
    if follow:
        run_async(lambda: _follow(cluster, as_json=as_json))
        return
    found: list[dict[str, Any]] = []
    reply = cluster.read(calls.EVENTS, calls.EventsSince())
    while reply.events:
        found += reply.events
        reply = cluster.read(calls.EVENTS, calls.EventsSince(reply.next))
    if as_json:
        print_json(found)
    else:
        _print_events(found)


async def _follow(cluster: Cluster, *, as_json: bool) -> None:
    # One node only: each numbers its own events.
    one = Cluster(cluster.addresses[:1], cluster.key)
    after = 0
    while True:
        reply = await one.ask(calls.EVENTS, calls.EventsSince(after, wait=True), repeatable=True)
        after = reply.next
        if as_json:
            for event in reply.events:
                click.echo(json.dumps(event))
        else:
            _print_events(reply.events)


def _print_events(found: list[dict[str, Any]]) -> None:
    from clusterd.cli.ctl_view import console, event_line

    out = console()
    for event in found:
        out.print(event_line(event), soft_wrap=True)


@cli.group()
def explain() -> None:
    """Ask the cluster what it would do, and why."""


@explain.command("node")
@click.argument("name", metavar="NODE")
@JSON
@click.pass_context
def explain_node(context: click.Context, name: str, as_json: bool) -> None:
    """If NODE vanished now: what would happen to each of its VMs, when, and why."""
    rows = cluster_of(context).read(calls.EXPLAIN_NODE, calls.NodeName(check_name(name, "node"))).rows
    if as_json:
        print_json(rows)
        return
    if not rows:
        click.echo(f"no VM is on {name}: nothing would happen")
    for row in rows:
        after = "" if row["after_s"] is None else f" after {row['after_s']:g} s"
        where = f" on {row['target']}" if row["target"] else ""
        click.echo(f"{row['vm']}: {row['outcome']}{where}{after}: {row['why']}")
        for reason in row["reasons"]:
            click.echo(f"    {reason}")


@cli.group()
def hold() -> None:
    """What the cluster would do, but must not (yet)."""


@hold.command("list")
@JSON
@click.pass_context
def hold_list(context: click.Context, as_json: bool) -> None:
    """List what is held back, why, and what would end it."""
    held = cluster_of(context).read(calls.STATUS, calls.Nothing()).document["held"]
    if as_json:
        print_json(held)
        return
    from clusterd.cli.ctl_view import console, held_table

    console().print(held_table(held) if held else "nothing is held back")


@hold.command("release")
@click.argument("hold_id", metavar="ID")
@click.pass_context
def hold_release(context: click.Context, hold_id: str) -> None:
    """Let go what the mass-failure brake holds; ID as in `clusterctl hold list`.

    `brake` lets go all of it, `brake-NODE` one node, `failover-VM` one VM: they are failed over as their
    windows end, each fenced first. Whatever else is held ends by what the list names, and by no word of
    yours: above all a VM without disks, which nothing can fence.

    \b
    Example: clusterctl hold release brake-n3
    """
    click.echo(cluster_of(context).command(calls.HOLD_RELEASE, ReleaseHold(hold_id)).text)


@cli.command("get")
@click.argument("name", metavar="[PROPERTY]", required=False)
@JSON
@click.pass_context
def get_property(context: click.Context, name: str | None, as_json: bool) -> None:
    """Show the cluster's properties, or one of them."""
    properties = cluster_of(context).read(calls.STATUS, calls.Nothing()).document["properties"]
    if name is not None:
        if name not in properties:
            raise Refused(f"no property {name!r}: they are {', '.join(properties)}")
        properties = {name: properties[name]}
    if as_json:
        print_json(properties)
        return
    from clusterd.cli.ctl_view import property_text

    for known, value in properties.items():
        click.echo(property_text(known, value) if name else f"{known:<22}{property_text(known, value)}")


@cli.command("set")
@click.argument("name", metavar="PROPERTY")
@click.argument("value")
@click.pass_context
def set_property(context: click.Context, name: str, value: str) -> None:
    """Change a property, for the whole cluster, now.

    \b
    Example: clusterctl set resiliency_period 2m
    """
    click.echo(cluster_of(context).command(calls.PROPERTY_SET, SetProperty(name, value)).text)


@cli.command()
@click.argument("switch", type=click.Choice(["on", "off"]))
@click.option("--for", "duration", metavar="TIME")
def maintenance(switch: str, duration: str | None) -> None:
    """Announce work on the network: not built."""
    if switch == "on" and duration is None:
        raise UsageError("maintenance on needs --for TIME")
    raise OperatorError("maintenance is not built: raise resiliency_period with `clusterctl set` meanwhile")


def main() -> None:
    """The entry point of the console script."""
    run_main(cli)

"""``clusterctl node``: the hosts of the cluster."""

from pathlib import Path

import click

from clusterd.cli.ctl_client import cluster_of
from clusterd.cli.ctl_vm import FILE, JSON
from clusterd.core import calls
from clusterd.core.commands import (
    ClearQuarantine,
    ConfirmDead,
    LeaveNode,
    PauseNode,
    RemoveNode,
    ResumeNode,
)
from clusterd.core.types import check_name
from clusterd.errors import Refused
from daemonkit.cli import print_json
from daemonkit.errors import OperatorError


def _node_name(context: click.Context, parameter: click.Parameter, value: str) -> str:
    return check_name(value, "node")


NODE = click.argument("name", metavar="NODE", callback=_node_name)


@click.group()
def node() -> None:
    """Look at nodes, and take them out of service and back."""


@node.command("list")
@JSON
@click.pass_context
def list_(context: click.Context, as_json: bool) -> None:
    """List the nodes."""
    document = cluster_of(context).read(calls.STATUS, calls.Nothing()).document
    if as_json:
        print_json([{"name": name, **row} for name, row in sorted(document["nodes"].items())])
        return
    from clusterd.cli.ctl_view import console, nodes_table

    console().print(nodes_table(document))


@node.command()
@NODE
@JSON
@click.pass_context
def show(context: click.Context, name: str, as_json: bool) -> None:
    """Show a node and its VMs."""
    document = cluster_of(context).read(calls.STATUS, calls.Nothing()).document
    if name not in document["nodes"]:
        raise Refused(f"no node {name!r}: the nodes are {', '.join(sorted(document['nodes'])) or 'none'}")
    vms = {vm: row for vm, row in document["vms"].items() if row.get("owner") == name}
    if as_json:
        print_json({"name": name, **document["nodes"][name], "vms": vms})
        return
    from clusterd.cli.ctl_view import console, nodes_table, vms_table

    out = console()
    out.print(nodes_table({**document, "nodes": {name: document["nodes"][name]}}))
    if vms:
        out.print()
        out.print(vms_table({"vms": vms}))


@node.command()
@NODE
@click.pass_context
def pause(context: click.Context, name: str) -> None:
    """Place nothing new on a node; its VMs stay."""
    click.echo(cluster_of(context).command(calls.NODE_PAUSE, PauseNode(name)).text)


@node.command()
@NODE
@click.pass_context
def drain(context: click.Context, name: str) -> None:
    """Pause a node, and move its VMs to others."""
    click.echo(cluster_of(context).command(calls.NODE_PAUSE, PauseNode(name, drain=True)).text)


@node.command()
@NODE
@click.pass_context
def resume(context: click.Context, name: str) -> None:
    """Take a paused node back into service."""
    click.echo(cluster_of(context).command(calls.NODE_RESUME, ResumeNode(name)).text)


@node.command()
@NODE
@click.pass_context
def leave(context: click.Context, name: str) -> None:
    """Take a node out for good: its VMs are moved or stopped, then its clusterd says goodbye and ends."""
    click.echo(cluster_of(context).command(calls.NODE_LEAVE, LeaveNode(name)).text)


@node.command()
@NODE
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.pass_context
def remove(context: click.Context, name: str, dry_run: bool) -> None:
    """Forget a node that is down and owns no VM."""
    cluster = cluster_of(context)
    if dry_run:
        document = cluster.read(calls.STATUS, calls.Nothing()).document
        if name not in document["nodes"]:
            raise Refused(f"no node {name!r}: see `clusterctl node list`")
        owned = sorted(vm for vm, row in document["vms"].items() if row.get("owner") == name)
        if document["nodes"][name]["state"] != "down" or owned:
            raise Refused(f"node {name} is not down, or still owns VMs: `clusterctl node leave {name}` first")
        click.echo(f"would forget node {name}")
        return
    click.echo(cluster.command(calls.NODE_REMOVE, RemoveNode(name)).text)


@node.command("clear-quarantine")
@NODE
@click.pass_context
def clear_quarantine(context: click.Context, name: str) -> None:
    """Let a quarantined node back in now, and forget its ungraceful exits."""
    click.echo(cluster_of(context).command(calls.NODE_CLEAR_QUARANTINE, ClearQuarantine(name)).text)


@node.command("confirm-dead")
@NODE
@click.pass_context
def confirm_dead(context: click.Context, name: str) -> None:
    """Vouch that the node's power is off and nothing on it runs any more.

    Its VMs are then failed over at once. Never say this of a host that may still run: VMs without disks
    are not fenced by storage.
    """
    click.echo(cluster_of(context).command(calls.NODE_CONFIRM_DEAD, ConfirmDead(name)).text)


@node.command()
@click.argument("path", type=FILE, metavar="FILE")
def add(path: Path) -> None:
    """Add a node: not built, a node adds itself when its clusterd starts."""
    raise OperatorError(
        f"node add is not built: start `clusterd run --config {path}` on the host, and name it under"
        " [peers] of the others"
    )

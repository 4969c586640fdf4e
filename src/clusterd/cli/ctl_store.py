"""``clusterctl store``: the cluster's database."""

from typing import Any

import click

from clusterd.cli.ctl_client import cluster_of
from clusterd.cli.ctl_vm import JSON
from clusterd.core import calls
from clusterd.core.recovery import Request
from clusterd.core.types import check_name
from clusterd.core.vm_fate import WORDS
from daemonkit.cli import print_json
from daemonkit.progress import Progress


@click.group()
def store() -> None:
    """The cluster's database."""


def _names(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted({check_name(name, str(parameter.name)) for name in value}))


@store.command()
@click.option(
    "--without",
    multiple=True,
    metavar="NODE",
    callback=_names,
    help="Do not wait for this node; what may run there stays assigned to it. Repeatable.",
)
@click.option(
    "--without-diskd",
    multiple=True,
    metavar="DISKD",
    callback=_names,
    help="Do not wait for this diskd. Repeatable.",
)
@click.option("--replace", metavar="ID", help="Overwrite the store of the other cluster with this id.")
@click.option("--dry-run", is_flag=True, help="Show the plan, and do nothing.")
@JSON
@click.pass_context
def recover(
    context: click.Context,
    without: tuple[str, ...],
    without_diskd: tuple[str, ...],
    replace: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Rebuild a store that came back empty, older, or as another cluster's.

    VMs run on all the while; none is stopped or started by this. Bring a store up first (an empty one will
    do) and look at the plan with --dry-run: each VM is assigned to the run that lives, as the nodes and diskd
    tell; the rest (members, VM files, properties) is from the newest picture that a node kept. What was asked
    for in the last seconds before the loss may be missing. Refused while the store is good, and while
    a node or diskd does not answer that is not named by --without.

    \b
    Example: clusterctl store recover --dry-run
             clusterctl store recover --without n3
    """
    cluster = cluster_of(context)
    request = Request(without, without_diskd, replace)
    plan = cluster.work(calls.STORE_PLAN, request, Progress(as_json)).document
    if not as_json:
        _show(plan)
    text = None
    if not dry_run:
        order = calls.RecoverStore(request, plan["digest"])
        text = cluster.work(calls.STORE_RECOVER, order, Progress(as_json)).text
    if as_json:
        print_json({**plan, "done": not dry_run})
    elif text is not None:
        click.echo(text)


def _show(plan: dict[str, Any]) -> None:
    click.echo(f"the store is {plan['store']}; cluster {plan['cluster']}, recovery number {plan['recovery']}")
    click.echo(f"members {', '.join(plan['members']) or 'none'}; next epochs above {plan['epoch']}")
    click.echo(f"from {plan['base']}, and from what {', '.join(plan['answered'])} told")
    for vm, fate in sorted(plan["vms"].items()):
        owner = fate["owner"] or "no node"
        click.echo(f"  {vm}: {owner}, {WORDS[fate['fate']]} ({fate['why']}); wanted {fate['desired']}")
    for warning in plan["warnings"]:
        click.echo(f"  note: {warning}")

"""``clusterctl vm``: what runs in the cluster."""

import json
from pathlib import Path
from typing import Any

import click

from clusterd.cli.ctl_client import cluster_of
from clusterd.core import calls
from clusterd.core.commands import FailoverVm, MoveVm, RemoveVm, StartVm, StopVm
from clusterd.core.types import check_name
from clusterd.errors import Refused
from daemonkit.cli import ADDRESS, COMPRESS, COMPRESS_LEVEL, level_of, print_json
from daemonkit.ports import Address
from daemonkit.progress import Progress
from daemonkit.schema import unstructure
from daemonkit.units import format_size

FILE = click.Path(path_type=Path, dir_okay=False)


def _vm_name(context: click.Context, parameter: click.Parameter, value: str) -> str:
    return check_name(value, "VM")


def _node_name(context: click.Context, parameter: click.Parameter, value: str) -> str:
    return check_name(value, "node")


def _optional_vm_name(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    return None if value is None else check_name(value, "VM")


VM = click.argument("name", metavar="VM", callback=_vm_name)
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document.")


@click.group()
def vm() -> None:
    """Add, start, stop, move, back up and restore VMs.

    A verb that changes something is done when it is recorded; `clusterctl status` shows what comes of it.
    """


def _add(context: click.Context, path: Path, *, replace: bool, start: bool) -> None:
    from clusterd.config import read_vm_file  # only this verb reads a file

    config = read_vm_file(path)
    params = calls.VmFile(config.text, replace=replace, start=start)
    click.echo(cluster_of(context).command(calls.VM_ADD, params).text)


@vm.command()
@click.argument("path", type=FILE, metavar="FILE.toml")
@click.option("--no-start", is_flag=True, help="Record it, but leave it offline.")
@click.pass_context
def add(context: click.Context, path: Path, no_start: bool) -> None:
    """Add a VM from its file, and start it."""
    _add(context, path, replace=False, start=not no_start)


@vm.command()
@click.argument("path", type=FILE, metavar="FILE.toml")
@click.pass_context
def apply(context: click.Context, path: Path) -> None:
    """Add a VM, or replace its configuration; a running one takes it up at its next start."""
    _add(context, path, replace=True, start=True)


@vm.command("list")
@JSON
@click.pass_context
def list_(context: click.Context, as_json: bool) -> None:
    """List the VMs."""
    document = cluster_of(context).read(calls.STATUS, calls.Nothing()).document
    if as_json:
        print_json([{"name": name, **row} for name, row in sorted(document["vms"].items())])
        return
    from clusterd.cli.ctl_view import console, vms_table

    console().print(vms_table(document))


@vm.command()
@VM
@JSON
@click.pass_context
def show(context: click.Context, name: str, as_json: bool) -> None:
    """Show a VM: its configuration, and how it is."""
    cluster = cluster_of(context)
    config = cluster.read(calls.VM_SHOW, calls.VmName(name)).document
    status = cluster.read(calls.STATUS, calls.Nothing()).document
    document: dict[str, Any] = {"name": name, **config, "status": status["vms"].get(name)}
    if as_json:
        print_json(document)
        return
    from clusterd.cli.ctl_view import console, vms_table

    console().print(vms_table({"vms": {name: document["status"]}} if document["status"] else {"vms": {}}))
    text = (config.get("config") or {}).get("text") or config.get("text")
    if text:
        click.echo()
        click.echo(text.rstrip())


@vm.command()
@VM
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.pass_context
def remove(context: click.Context, name: str, dry_run: bool) -> None:
    """Forget a VM that is stopped. Its images stay with diskd."""
    cluster = cluster_of(context)
    if dry_run:
        row = cluster.read(calls.STATUS, calls.Nothing()).document["vms"].get(name)
        if row is None:
            raise Refused(f"no VM {name!r}: see `clusterctl vm list`")
        if row["state"] not in ("offline", "failed"):
            raise Refused(f"VM {name} is {row['state']}: stop it first with `clusterctl vm stop {name}`")
        click.echo(f"would remove VM {name}; its images would stay with diskd")
        return
    click.echo(cluster.command(calls.VM_REMOVE, RemoveVm(name)).text)


@vm.command()
@VM
@click.pass_context
def start(context: click.Context, name: str) -> None:
    """Start a VM where it fits best; also one that has failed."""
    click.echo(cluster_of(context).command(calls.VM_START, StartVm(name)).text)


@vm.command()
@VM
@click.pass_context
def stop(context: click.Context, name: str) -> None:
    """Stop a VM: it is asked to end, and ended if it does not."""
    click.echo(cluster_of(context).command(calls.VM_STOP, StopVm(name)).text)


@vm.command()
@VM
@click.argument("node", metavar="NODE", callback=_node_name)
@click.pass_context
def move(context: click.Context, name: str, node: str) -> None:
    """Move a VM to another node: stopped here, started there."""
    click.echo(cluster_of(context).command(calls.VM_MOVE, MoveVm(name, node)).text)


@vm.command()
@VM
@click.pass_context
def failover(context: click.Context, name: str) -> None:
    """Do not wait for the window to end: fail this VM over as soon as it is fenced."""
    click.echo(cluster_of(context).command(calls.VM_FAILOVER, FailoverVm(name)).text)


TARGET = click.option(
    "--target",
    type=ADDRESS,
    required=True,
    envvar="HOLDFAST_TARGET",
    help="Where `diskd target` listens, as diskd reaches it; HOLDFAST_TARGET stands for it.",
)
LINES = click.option("--json", "as_json", is_flag=True, help="Lines of JSON: progress, the result last.")


@vm.command()
@VM
@TARGET
@click.option("--full", is_flag=True, help="Everything, whatever the target has.")
@COMPRESS
@COMPRESS_LEVEL
@LINES
@click.pass_context
def backup(
    context: click.Context,
    name: str,
    target: Address,
    full: bool,
    compress: bool,
    compress_level: int | None,
    as_json: bool,
) -> None:
    """Back a VM up, wherever it runs: all its disks at one instant, and its configuration.

    A full if the target has no point of this VM, else the changes since the newest point that both sides
    hold, also after a move or a failover. A backup that fails loses nothing: the changes stay tracked. It
    runs as long as this command does. With --compress, data goes to the target in zstd frames where that
    makes it shorter.

    \b
    Example: clusterctl vm backup web --target 10.0.0.9:10811
    """
    level = level_of(compress, compress_level)
    params = calls.BackupVm(name, str(target), full, compress_level=level)
    report = cluster_of(context).work(calls.VM_BACKUP, params, Progress(as_json))
    if as_json:
        print(json.dumps(unstructure(report)))
        return
    base = f" since {report.base}" if report.base else ""
    click.echo(f"{name}: {report.kind} {report.point}{base}, {report.consistency}, {report.seconds:.1f} s")
    for disk in report.disks:
        exact = "" if disk.exact else ", not exact"
        changed, sent = format_size(disk.changed_bytes), format_size(disk.sent_bytes)
        click.echo(f"  {disk.image}: {changed} changed, {sent} sent{exact}")


@vm.command()
@VM
@click.argument("point", metavar="POINT")
@TARGET
@click.option("--as", "new_name", metavar="NAME", callback=_optional_vm_name,
              help="Restore it as a new VM of this name, beside the one that is there.")  # fmt: skip
@click.option("--diskd", default="main", show_default=True, metavar="NAME",
              help="Which diskd gets the images, as the asked node names it.")  # fmt: skip
@click.option("--start", is_flag=True, help="Start it as well; else it stays offline.")
@LINES
@click.pass_context
def restore(
    context: click.Context,
    name: str,
    point: str,
    target: Address,
    new_name: str | None,
    diskd: str,
    start: bool,
    as_json: bool,
) -> None:
    """Bring a VM back from a backup: its disks as new images, its configuration into the cluster.

    Under its own name, it must be gone, and its images too. With --as, its images are named NAME (or
    NAME-DISK where it has several disks), and nothing else of its configuration is changed. What fails
    leaves nothing behind.

    \b
    Example: clusterctl vm restore web rp-0123456789abcdef --as web2 --start --target 10.0.0.9:10811
    """
    params = calls.RestoreVm(name, point, str(target), new_name, diskd, start)
    done = cluster_of(context).work(calls.VM_RESTORE, params, Progress(as_json))
    if as_json:
        print(json.dumps(unstructure(done)))
        return
    click.echo(f"{done.vm}: {format_size(done.data_bytes)} restored from {done.point}; {done.text}")
    for disk, image in sorted(done.images.items()):
        click.echo(f"  {disk}: image {image}")

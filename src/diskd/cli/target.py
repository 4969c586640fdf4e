"""`diskctl target`: what is in a backup target's repository, whether it is good, and getting it back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from daemonkit.cli import ADDRESS, call_once, print_json, run_async
from daemonkit.errors import OperatorError, UsageError
from daemonkit.methods import Method
from daemonkit.ports import Address
from daemonkit.progress import Progress
from daemonkit.schema import unstructure
from daemonkit.units import format_size
from diskd.cli.backup import disks_of, read_config
from diskd.cli.calling import SECONDS_UNBOUNDED, Diskd, pass_diskd, print_table
from diskd.core import target_calls as calls
from diskd.core.retention import KEEP_MAX, Keep

P = TypeVar("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

target_option = click.option(
    "--target",
    "address",
    type=ADDRESS,
    required=True,
    envvar="HOLDFAST_TARGET",
    help="Where `diskd target` listens; HOLDFAST_TARGET stands for it.",
)
COUNT = click.IntRange(min=0, max=KEEP_MAX)
json_lines = click.option("--json", "as_json", is_flag=True, help="Lines of JSON: progress, the result last.")


@click.group()
def target() -> None:
    """Points at a backup target: list, verify, synthesize, prune, restore, serve, audit.

    \b
    diskctl target list --target HOST:PORT
    diskctl target restore web rp-... --to /srv/restored --target HOST:PORT
    """


def _call(
    diskd: Diskd, address: Address, method: Method[P, R], params: P, *, progress: Progress | None = None
) -> R:
    try:
        return run_async(
            lambda: call_once(
                address,
                method,
                params,
                key=diskd.key,
                seconds_max=SECONDS_UNBOUNDED if progress else 60.0,
                on_progress=progress,
            )
        )
    finally:
        if progress:
            progress.finish()


@target.command("list")
@click.argument("vm", required=False)
@target_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@pass_diskd
def list_(diskd: Diskd, vm: str | None, address: Address, as_json: bool) -> None:
    """All points, oldest first within each VM."""
    points = _call(diskd, address, calls.LIST, calls.VmName(vm)).points
    if as_json:
        print_json([unstructure(point) for point in points])
        return
    print_table(
        ("VM", "POINT", "KIND", "BASE", "COMMITTED", "SIZE", ""),
        [
            (
                point.vm,
                point.point,
                ("synthetic " if point.synthetic else "") + (point.kind or "-"),
                point.base or "-",
                point.committed_at or "-",
                format_size(sum(disk.file_size for disk in point.disks)),
                f"DAMAGED: {point.damaged}" if point.damaged else "",
            )
            for point in points
        ],
    )


@target.command()
@click.argument("vm", required=False)
@click.argument("point", required=False)
@target_option
@json_lines
@pass_diskd
def verify(diskd: Diskd, vm: str | None, point: str | None, address: Address, as_json: bool) -> None:
    """Read everything again and compare it with the manifests and with the source's digests.

    Of all points, those of a VM, or one POINT and all that it builds on: none is good whose base is not.
    Exit code 1 if anything is not as it was committed; each place is named.
    """
    progress = Progress(as_json)
    report = _call(diskd, address, calls.VERIFY, calls.PointFilter(vm, point), progress=progress)
    bad = [found for found in report.points if found.problems]
    if as_json:
        print(json.dumps(unstructure(report)))
    else:
        for found in report.points:
            state = "DAMAGED" if found.problems else "good"
            click.echo(f"{found.vm} {found.point}: {state}, {format_size(found.bytes_read)} read")
            for problem in found.problems:
                click.echo(f"  {problem}")
    if bad:
        raise OperatorError(
            f"{len(bad)} of {len(report.points)} points are damaged, first: {bad[0].problems[0]};"
            " take a full backup (diskctl backup --full)"
        )


@target.command()
@click.argument("vm")
@click.argument("point")
@target_option
@json_lines
@pass_diskd
def synthesize(diskd: Diskd, vm: str, point: str, address: Address, as_json: bool) -> None:
    """Make a point a full of its own, from its chain, without touching the source.

    The new files are verified before they take the place of the old ones. Where the file system can (btrfs,
    xfs), they share what they have in common with the chain, and take no space for it.
    """
    progress = Progress(as_json)
    report = _call(diskd, address, calls.SYNTHESIZE, calls.PointName(vm, point), progress=progress)
    if as_json:
        print(json.dumps(unstructure(report)))
    elif report.was is None:
        click.echo(f"{vm} {point} is a full already")
    else:
        shared = f", {format_size(report.shared_bytes)} of it shared" if report.shared_bytes else ""
        size = format_size(report.file_bytes)
        click.echo(f"{vm} {point} is a full now ({size}{shared}), no longer on {report.was}")


@target.command()
@click.argument("vm")
@click.argument("point")
@click.option("--to", "directory", required=True, type=click.Path(path_type=Path), metavar="DIR",
              help="Gets vm.toml and one file per disk; made where absent.")  # fmt: skip
@click.option(
    "--format", "disk_format", type=click.Choice(["raw", "qcow2"]), default="raw", show_default=True
)
@target_option
@json_lines
@pass_diskd
def restore(
    diskd: Diskd,
    vm: str,
    point: str,
    directory: Path,
    disk_format: Any,
    address: Address,
    as_json: bool,
) -> None:
    """Copy a point out of the repository into files here, verified while copying, sparse."""
    from diskd.shell.restore import restore_point  # Kept out of --help's way.

    progress = Progress(as_json)
    about = {"step": "restore", "vm": vm, "point": point}
    try:
        restored = run_async(
            lambda: restore_point(
                address,
                calls.PointName(vm, point),
                directory,
                disk_format=disk_format,
                key=diskd.key,
                on_progress=lambda done: progress({**about, "done_bytes": done, "total_bytes": None}),
            )
        )
    finally:
        progress.finish()
    if as_json:
        result = {
            "vm": vm,
            "point": point,
            "config": str(restored.config),
            "disks": [
                {"name": disk.name, "file": str(file), "virtual_size": disk.size_bytes}
                for disk, file in zip(restored.header.disks, restored.files, strict=True)
            ],
            "data_bytes": restored.data_bytes,
        }
        print(json.dumps(result))
        return
    click.echo(f"{vm} {point}: {format_size(restored.data_bytes)} restored")
    for file in (restored.config, *restored.files):
        click.echo(f"  {file}")


@target.command()
@click.argument("vm")
@click.option("--keep-last", type=COUNT, default=0, metavar="N", help="The newest N points.")
@click.option("--keep-daily", type=COUNT, default=0, metavar="N",
              help="The newest point of each of the newest N days that have one.")  # fmt: skip
@click.option("--keep-weekly", type=COUNT, default=0, metavar="N",
              help="Likewise of weeks (they begin on a Monday).")  # fmt: skip
@click.option("--keep-monthly", type=COUNT, default=0, metavar="N", help="Likewise of months.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@target_option
@json_lines
@pass_diskd
def prune(
    diskd: Diskd,
    vm: str,
    keep_last: int,
    keep_daily: int,
    keep_weekly: int,
    keep_monthly: int,
    dry_run: bool,
    address: Address,
    as_json: bool,
) -> None:
    """Remove the points of a VM that no rule keeps, and give their space back.

    A point stays if any of the rules keeps it, and it is said which. Days, weeks and months are those of
    UTC, by the time at which the target committed the point.

    A point that stays but builds on one that goes becomes a full of its own first; that needs its space
    until the others are gone. Then everything that stays is read again, and only if all of it is good is
    anything removed. Damaged points are neither counted nor removed. Refused while the VM is being backed
    up, restored, served or audited.
    """
    keep = Keep(keep_last, keep_daily, keep_weekly, keep_monthly)
    if not any((keep_last, keep_daily, keep_weekly, keep_monthly)):
        raise UsageError("say what stays: --keep-last, --keep-daily, --keep-weekly or --keep-monthly")
    progress = Progress(as_json)
    report = _call(diskd, address, calls.PRUNE, calls.PruneRequest(vm, keep, dry_run), progress=progress)
    if as_json:
        print(json.dumps({**unstructure(report), "dry_run": dry_run}))
        return
    for verdict in report.verdicts:
        word = "stays" if verdict.keep else "goes"
        click.echo(
            f"{vm} {verdict.point} of {verdict.committed_at[:16]} {word}: {', '.join(verdict.reasons)}"
        )
    would = "would be " if dry_run else ""
    for point in report.synthesized:
        click.echo(f"{vm} {point}: {would}made a full")
    for point in report.removed:
        click.echo(f"{vm} {point}: {would}removed")
    for point in report.damaged:
        click.echo(f"{vm} {point}: damaged, left alone (target verify tells more)")
    click.echo(
        f"{vm}: {len(report.kept)} points {'would stay' if dry_run else 'are left'},"
        f" {format_size(report.removed_bytes)} {would}removed"
    )


@target.command()
@click.argument("vm")
@click.argument("point")
@click.option("--nbd", required=True, type=ADDRESS,
              help="Where to listen, on the target's host; port 0 takes a free one.")  # fmt: skip
@target_option
@click.option("--json", "as_json", is_flag=True, help="One line of JSON when it serves.")
@pass_diskd
def serve(diskd: Diskd, vm: str, point: str, nbd: Address, address: Address, as_json: bool) -> None:
    """Serve a point over NBD, read-only and at once, until this command is ended.

    Each disk is an export of its name, verified as it is read. Whoever reaches the address can read it.
    """

    def show(progress: dict[str, Any]) -> None:
        if as_json:
            print(json.dumps(progress), flush=True)
        else:
            for uri in progress["exports"].values():
                click.echo(uri)

    run_async(
        lambda: call_once(
            address,
            calls.SERVE,
            calls.ServeRequest(vm, point, str(nbd)),
            key=diskd.key,
            seconds_max=SECONDS_UNBOUNDED,
            on_progress=show,
        )
    )


@target.command()
@click.argument("vm")
@target_option
@click.option("--image", "images", multiple=True, metavar="NAME",
              help="One of its images (several times); default: those of the newest point.")  # fmt: skip
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE",
              help="The VM's file: its [[disks]] say which image each disk is.")  # fmt: skip
@click.option("--point", metavar="POINT", help="Compare with this point; default: the newest on both sides.")
@json_lines
@pass_diskd
def audit(
    diskd: Diskd,
    vm: str,
    address: Address,
    images: tuple[str, ...],
    config: Path | None,
    point: str | None,
    as_json: bool,
) -> None:
    """Compare the live VM with what the target would restore.

    Freezes the VM's disks for as long as it takes (the VM runs on), and compares, byte for byte, everything
    that is not known to have changed since the newest point that both sides hold. So it proves that change
    tracking missed nothing, and that the target would give back what was there. Exit code 1 if anything
    differs, with the places. Asks diskd (--control), which speaks to the target.
    """
    disks = disks_of(config, read_config(config) if config else "", images) if config or images else []
    progress = Progress(as_json)
    request = calls.AuditRequest(vm, disks, str(address), point)
    try:
        report = diskd.call(calls.AUDIT_RUN, request, seconds_max=SECONDS_UNBOUNDED, on_progress=progress)
    finally:
        progress.finish()
    if as_json:
        print(json.dumps(unstructure(report)))
    else:
        _print_audit(report)
    bad = [disk for disk in report.disks if disk.differing_bytes]
    if bad:
        raise OperatorError(
            f"{vm}: {sum(disk.differing_bytes for disk in bad)} bytes differ from {report.point} although"
            f" nothing was seen to change them, first in disk {bad[0].name} at {bad[0].places[0][0]};"
            " take a full backup (diskctl backup --full), and report this"
        )


def _print_audit(report: calls.AuditReport) -> None:
    for disk in report.disks:
        exact = "" if disk.exact else ", known inexactly"
        click.echo(
            f"{report.vm} {disk.name}: {format_size(disk.compared_bytes)} compared with {report.point},"
            f" {format_size(disk.changed_bytes)} changed since{exact},"
            f" {format_size(disk.differing_bytes)} differ"
        )
        for offset, length in disk.places:
            click.echo(f"  {offset} to {offset + length}")

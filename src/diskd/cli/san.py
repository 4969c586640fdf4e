"""`diskctl san`: snapshots of the volume that holds a VM's images, for third parties that read them."""

from pathlib import Path

import click

from daemonkit.cli import print_json
from daemonkit.schema import unstructure
from diskd.cli.backup import disks_of, read_config
from diskd.cli.calling import SECONDS_UNBOUNDED, Diskd, json_option, outcome_of, pass_diskd, print_table
from diskd.core import san_calls as calls


@click.group()
def san() -> None:
    """Snapshots of the volume that holds the images (SAN mode), by the providers of diskd's ROOT/san.toml.

    \b
    diskctl backup --san PROVIDER ...    freezes, takes a snapshot, and backs up from that
    diskctl san begin PROVIDER ...       only freezes and takes it: whoever may read it does the rest
    diskctl san end POINT --keep-point   it has been read: the point is valid, the snapshot goes
    """


@san.command()
@click.argument("provider")
@click.option("--vm", required=True, help="Name of the VM.")
@click.option("--image", "images", multiple=True, metavar="NAME", help="One of its images (several times).")
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE",
              help="The VM's file: kept in the document; its [[disks]] give the disks' names.")  # fmt: skip
@click.option("--since", metavar="POINT", help="Tell the changes since this point; default: the newest.")
@json_option
@pass_diskd
def begin(
    diskd: Diskd,
    provider: str,
    vm: str,
    images: tuple[str, ...],
    config: Path | None,
    since: str | None,
    as_json: bool,
) -> None:
    """Freeze a VM's disks, take a snapshot of their volume, and let go of the checkpoint at once.

    What is where in the snapshot, and what changed, is told by a JSON document on diskd's host
    (docs/formats/san.md).
    """
    text = read_config(config) if config else ""
    request = calls.SanBegin(provider, vm, disks_of(config, text, images), text, since)
    made = diskd.call(calls.SAN_BEGIN, request, seconds_max=SECONDS_UNBOUNDED)
    if as_json:
        print_json(unstructure(made))
        return
    click.echo(f"{made.vm}: {made.point} is in the snapshot {made.snapshot}, at {made.path}")
    click.echo(f"  what is where: {made.mapping}")


@san.command()
@click.argument("point")
@click.option("--keep-point", is_flag=True, help="All of it was read: its point is valid.")
@click.option("--discard", is_flag=True, help="As if it had not been tried. (default)")
@pass_diskd
def end(diskd: Diskd, point: str, keep_point: bool, discard: bool) -> None:
    """Say what became of a snapshot, and have it deleted."""
    outcome = outcome_of(keep_point=keep_point, discard=discard)
    diskd.call(calls.SAN_END, calls.SanEnd(point, outcome), seconds_max=SECONDS_UNBOUNDED)
    click.echo(f"{point}: {'kept' if outcome == 'keep' else 'discarded'}, its snapshot is deleted")


@san.command("list")
@json_option
@pass_diskd
def list_(diskd: Diskd, as_json: bool) -> None:
    """All snapshots that this diskd has a record of."""
    found = diskd.call(calls.SAN_LIST, calls.SanNothing()).snapshots
    if as_json:
        print_json([unstructure(snapshot) for snapshot in found])
        return
    print_table(
        ("VM", "POINT", "PROVIDER", "STATE", "FOR", "PATH"),
        [(s.vm, s.point, s.provider, s.state, s.held_by, s.path or "-") for s in found],
    )

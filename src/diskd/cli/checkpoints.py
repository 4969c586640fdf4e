"""`diskctl checkpoint`: a frozen view of a VM's disks, by hand, for pull-mode backups over NBD."""

from pathlib import Path

import click

from daemonkit.cli import print_json
from daemonkit.diskd_api import BackupDisk
from diskd.cli.backup import read_config
from diskd.cli.calling import Diskd, json_option, outcome_of, pass_diskd, print_table
from diskd.core import calls


@click.group()
def checkpoint() -> None:
    """A frozen view of a VM's disks, read over NBD as IMAGE:CHECKPOINT while the VM writes on."""


@checkpoint.command()
@click.option("--vm", required=True, help="Name of the VM.")
@click.option("--image", "images", required=True, multiple=True, metavar="NAME...", help="Its images.")
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="The VM's file.")
@click.option("--allow-crash-consistent", is_flag=True,
              help="Where a freeze or thaw hook fails, go on without.")  # fmt: skip
@click.argument("more", nargs=-1)
@json_option
@pass_diskd
def begin(
    diskd: Diskd,
    vm: str,
    images: tuple[str, ...],
    config: Path | None,
    allow_crash_consistent: bool,
    more: tuple[str, ...],
    as_json: bool,
) -> None:
    """Freeze all disks of a VM at one instant. Its point becomes valid with `end --keep-point`.

    The [hooks] of --config, freeze and thaw, run on diskd's host around the cut: programs in its hooks_dir.
    """
    disks = [BackupDisk(name, name) for name in (*images, *more)]
    text = read_config(config) if config else ""
    info = diskd.call(calls.CHECKPOINT_BEGIN, calls.BeginCheckpoint(vm, disks, text, allow_crash_consistent))
    if as_json:
        print_json(
            {
                "checkpoint": info.checkpoint,
                "vm": info.vm,
                "point": info.point,
                "exports": dict(info.exports),
            }
        )
        return
    click.echo(f"checkpoint {info.checkpoint} of {info.vm}, point {info.point}")
    for image, export in info.exports.items():
        click.echo(f"  {image}: {export}")


@checkpoint.command()
@click.argument("checkpoint_id", metavar="ID")
@click.option("--keep-point", is_flag=True, help="The backup is safe: its point is valid.")
@click.option("--discard", is_flag=True, help="As if it had not been tried. (default)")
@pass_diskd
def end(diskd: Diskd, checkpoint_id: str, keep_point: bool, discard: bool) -> None:
    """End a checkpoint. Answers once that is durable; its AVHD is merged behind.

    A pending one, whose target's acknowledgement was lost, is settled by the next backup to that target;
    where the target is gone for good, this settles it by hand.
    """
    outcome = outcome_of(keep_point=keep_point, discard=discard)
    diskd.call(calls.CHECKPOINT_END, calls.EndCheckpoint(checkpoint_id, outcome))
    click.echo(
        f"checkpoint {checkpoint_id} ended, {'its point is valid' if outcome == 'keep' else 'discarded'}"
    )


@checkpoint.command("list")
@json_option
@pass_diskd
def list_(diskd: Diskd, as_json: bool) -> None:
    """All checkpoints that stand, or whose point is still to be settled with the target."""
    found = diskd.call(calls.CHECKPOINT_LIST, calls.Nothing()).checkpoints
    if as_json:
        print_json(
            [
                {
                    "checkpoint": info.checkpoint,
                    "vm": info.vm,
                    "point": info.point,
                    "state": info.state,
                    "held_by": info.held_by,
                    "outcome": info.outcome,
                    "exports": dict(info.exports),
                }
                for info in found
            ]
        )
        return
    print_table(
        ("CHECKPOINT", "VM", "POINT", "STATE", "HELD BY"),
        [(info.checkpoint, info.vm, info.point, info.state, info.held_by) for info in found],
    )

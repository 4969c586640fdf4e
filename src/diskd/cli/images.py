"""`diskctl image`: make, look at, hand over and remove images."""

from datetime import UTC, datetime
from typing import Any

import click

from daemonkit.cli import SIZE, LazyGroup, print_json
from daemonkit.diskd_api import IMAGE_DELETE, DeleteImage, ImageName
from daemonkit.units import format_size
from diskd.cli.calling import SECONDS_UNBOUNDED, Diskd, json_option, pass_diskd, print_table
from diskd.core import calls
from diskd.core.inventory import ImageInfo, OwnerInfo, SpaceInfo

VERBS = {
    "import": "diskd.cli.image_copies:import_",
    "export": "diskd.cli.image_copies:export",
    "show": "diskd.cli.statistics:show",
}


@click.group(cls=LazyGroup, verbs=VERBS)
def image() -> None:
    """Make, look at, hand over and remove images."""


def document(info: ImageInfo) -> dict[str, Any]:
    """An image in JSON: sizes in bytes, absent values null."""
    return {
        "name": info.name,
        "uuid": info.uuid,
        "size": info.size_bytes,
        "block_size": info.block_bytes,
        "region_size": info.region_bytes,
        "allocated": info.allocated_bytes,
        "state": info.state,
        "reason": info.reason,
        "epoch": info.epoch,
        "holder": info.holder,
        "connections": info.connections,
        "checkpoint": info.checkpoint,
        "merge_remaining": info.merge_remaining_bytes,
        "points": info.points,
        "owner": None if info.owner is None else _owner(info.owner),
        "space": None if info.space is None else _space(info.space),
    }


def _space(space: SpaceInfo) -> dict[str, Any]:
    return {
        "free": space.free_bytes,
        "low_disk_limit": space.low_disk_limit_bytes,
        "avhd": space.avhd_bytes,
        "avhd_limit": space.avhd_limit_bytes,
    }


def size_of(info: ImageInfo) -> str:
    """For people; a damaged image's may be unknown."""
    return "-" if info.size_bytes is None else format_size(info.size_bytes)


def _owner(owner: OwnerInfo) -> dict[str, Any]:
    since = datetime.fromtimestamp(owner.since_ns // 10**9, UTC).isoformat()
    return {
        "daemon": owner.daemon,
        "host": owner.host,
        "state": owner.state,
        "since": since,
        "control": owner.control,
    }


@image.command()
@click.argument("name")
@click.argument("size", type=SIZE)
@json_option
@pass_diskd
def create(diskd: Diskd, name: str, size: int, as_json: bool) -> None:
    """Make an empty image NAME of SIZE (10GiB, 512MiB ...). It takes no space until written."""
    info = diskd.call(calls.IMAGE_CREATE, calls.CreateImage(name, size))
    if as_json:
        print_json(document(info))
    else:
        click.echo(f"image {info.name} of {size_of(info)} created")


@image.command("list")
@json_option
@pass_diskd
def list_(diskd: Diskd, as_json: bool) -> None:
    """All images: size, state, lease, clients, points. REASON says why one is not served, or fails."""
    images = diskd.call(calls.IMAGE_LIST, calls.Nothing()).images
    if as_json:
        print_json([document(info) for info in images])
        return
    print_table(
        ("NAME", "SIZE", "STATE", "EPOCH", "HOLDER", "CLIENTS", "POINTS", "REASON"),
        [
            (
                info.name,
                size_of(info),
                info.state,
                str(info.epoch),
                info.holder or "-",
                str(info.connections),
                "-" if info.points is None else str(info.points),
                info.reason or "",
            )
            for info in images
        ],
    )


@image.command()
@click.argument("name")
@click.argument("size", type=SIZE)
@json_option
@pass_diskd
def resize(diskd: Diskd, name: str, size: int, as_json: bool) -> None:
    """Grow image NAME to SIZE, in use or not; its reference points stay valid.

    Clients that are connected keep the old size until they connect anew. Nothing happens where it has that
    size already; a smaller one is refused, and so is any during a checkpoint or the merge after it.
    """
    info = diskd.call(calls.IMAGE_RESIZE, calls.ResizeImage(name, size), seconds_max=SECONDS_UNBOUNDED)
    if as_json:
        print_json(document(info))
    else:
        click.echo(f"image {info.name} has {size_of(info)}")


@image.command()
@click.argument("name")
@click.option("--dry-run", is_flag=True, help="Only tell which files would go, and whether it is refused.")
@pass_diskd
def delete(diskd: Diskd, name: str, dry_run: bool) -> None:
    """Remove an image with its data and its reference points. Refused while it is in use."""
    for path in diskd.call(IMAGE_DELETE, DeleteImage(name, dry_run)).paths:
        click.echo(f"{'would remove' if dry_run else 'removed'} {path}")


@image.command()
@click.argument("name")
@pass_diskd
def release(diskd: Diskd, name: str) -> None:
    """Close an image cleanly, so that another diskd can open it with its tracking intact."""
    diskd.call(calls.IMAGE_RELEASE, ImageName(name))
    click.echo(f"image {name} released")


@image.command("open")
@click.argument("name")
@click.option(
    "--fenced",
    metavar="HOST",
    help="HOST, whose diskd has not released NAME, is certainly down or cut off from the storage.",
)
@click.option(
    "--lost-lease",
    is_flag=True,
    help="No run can reach NAME, whose lease file is missing, damaged or an older copy: begin a new one.",
)
@pass_diskd
def open_(diskd: Diskd, name: str, fenced: str | None, lost_lease: bool) -> None:
    """Serve an image that another diskd, or this one, released, or that a dead one on this host had.

    What a diskd on another host has not released is refused until --fenced names that host: while it can
    write to the storage, two would serve one image, and corrupt it. A `kill` is no fence; a host that was
    powered off is. Then, if the host did not release it, changes since a point are over-reported, and say so.
    """
    info = diskd.call(
        calls.IMAGE_OPEN, calls.OpenImage(name, fenced, lost_lease), seconds_max=SECONDS_UNBOUNDED
    )
    click.echo(f"image {info.name} open")

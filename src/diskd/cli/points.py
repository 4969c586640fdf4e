"""`diskctl point` and `diskctl changes`: reference points, and what changed since one."""

import attrs
import click

from daemonkit.cli import print_json
from daemonkit.diskd_api import ImageName
from daemonkit.units import format_size
from diskd.cli.calling import Diskd, json_option, pass_diskd, print_table
from diskd.core import calls
from diskd.errors import Refused


@click.group()
def point() -> None:
    """Reference points: where the next differential backup can start."""


@point.command("list")
@click.argument("image")
@json_option
@pass_diskd
def list_(diskd: Diskd, image: str, as_json: bool) -> None:
    """The reference points of IMAGE, oldest first."""
    points = diskd.call(calls.POINT_LIST, ImageName(image)).points
    if as_json:
        print_json([attrs.asdict(info) for info in points])
        return
    print_table(
        ("POINT", "VALID", "RCT ID", "REASON"),
        [(info.point, "yes" if info.valid else "no", info.rct_id, info.reason or "") for info in points],
    )


@point.command()
@click.argument("image")
@click.argument("point_id", metavar="POINT")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@pass_diskd
def delete(diskd: Diskd, image: str, point_id: str, dry_run: bool) -> None:
    """Forget POINT of IMAGE: no differential can start there any more, those since other points still can."""
    if dry_run:
        others = [info.point for info in diskd.call(calls.POINT_LIST, ImageName(image)).points]
        if point_id not in others:
            raise Refused(f"image {image} has no point {point_id}: see `diskctl point list {image}`")
        click.echo(f"would delete point {point_id} of {image}; {len(others) - 1} others would stay")
        return
    diskd.call(calls.POINT_DELETE, calls.PointName(image, point_id))
    click.echo(f"point {point_id} of {image} deleted")


@click.command()
@click.argument("image")
@click.option("--since", required=True, metavar="POINT", help="A valid reference point (`point list`).")
@json_option
@pass_diskd
def changes(diskd: Diskd, image: str, since: str, as_json: bool) -> None:
    """What changed in IMAGE since a reference point: never less than the truth."""
    found = diskd.call(calls.CHANGES, calls.PointName(image, since))
    if as_json:
        print_json(attrs.asdict(found))
        return
    total = sum(length for _, length in found.extents)
    exact = "exact" if found.exact else f"at most {format_size(found.over_report_bytes)} too many"
    click.echo(f"{format_size(total)} in {len(found.extents)} extents, {exact}")
    for offset, length in found.extents:
        click.echo(f"{offset:>16} {length:>12}")

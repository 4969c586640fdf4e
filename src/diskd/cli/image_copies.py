"""`diskctl image import`: whole disks into diskd."""

import json
import sys
from pathlib import Path

import click

from daemonkit.cli import run_async
from daemonkit.progress import Progress
from daemonkit.units import format_size
from diskd.cli.calling import SECONDS_UNBOUNDED, Diskd, pass_diskd
from diskd.cli.images import document
from diskd.core import calls

lines_option = click.option(
    "--json", "as_json", is_flag=True, help="Lines of JSON: progress, and the result last."
)


@click.command("import")
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@lines_option
@pass_diskd
def import_(diskd: Diskd, name: str, file: Path, as_json: bool) -> None:
    """Make an image NAME with the content of FILE, or of a pipe.

    \b
    diskctl image import web /srv/in/web.qcow2     a file on diskd's host
    zcat web.raw.gz | diskctl image import web -   a raw disk, from wherever this command runs

    A file may be raw, qcow2, VHDX, VMDK or VDI (all but raw through qemu-img); its first bytes tell, not its
    name. One that refers to other files (a backing file, an external data file, extents) is refused: flatten
    it first. Blocks of zeroes take no space. When the import fails or is interrupted, nothing of it is left.
    """
    progress = Progress(as_json)
    try:
        if str(file) == "-":
            from diskd.shell.send_image import send_image  # Kept out of --help's way.

            info = run_async(
                lambda: send_image(
                    diskd.address, name, sys.stdin.fileno(), key=diskd.key, on_progress=progress
                )
            )
        else:
            params = calls.ImportImage(name, str(file.absolute()))
            info = diskd.call(calls.IMAGE_IMPORT, params, seconds_max=SECONDS_UNBOUNDED, on_progress=progress)
    finally:
        progress.finish()
    if as_json:
        print(json.dumps(document(info)))
    else:
        click.echo(f"image {info.name} of {format_size(info.size_bytes)} imported")

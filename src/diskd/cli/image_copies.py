"""`diskctl image import` and `diskctl image export`: whole disks into diskd, and out of it."""

import json
import sys
from pathlib import Path

import click

from daemonkit.cli import run_async
from daemonkit.errors import OperatorError
from daemonkit.progress import Progress
from daemonkit.units import format_size
from diskd.cli.calling import SECONDS_UNBOUNDED, Diskd, pass_diskd
from diskd.cli.images import document, size_of
from diskd.core import calls

SUFFIXES = ("raw", "qcow2", "vmdk", "vhdx", "vdi")

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
        click.echo(f"image {info.name} of {size_of(info)} imported")


@click.command("export")
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@click.option(
    "--format", "kind", type=click.Choice(SUFFIXES), help="Default: what FILE's name ends with, else raw."
)
@click.option("--force", is_flag=True, help="Replace FILE where it exists.")
@lines_option
@pass_diskd
def export(diskd: Diskd, name: str, file: Path, kind: str | None, force: bool, as_json: bool) -> None:
    """Write image NAME, as it is at this instant, as a disk FILE, here or into a pipe. Its guest runs on.

    \b
    diskctl image export web web.qcow2       a file on this machine
    diskctl image export web - | zstd > ...  the raw disk into a pipe

    The image is frozen for that long: what its guest writes meanwhile goes beside it, and is merged back
    afterwards. FILE appears when it is complete. No reference point is left (for backups see `diskctl
    backup` and `diskctl export`). vmdk, vhdx and vdi are made by qemu-img, which reads over NBD.
    """
    from diskd.shell import image_export  # Kept out of --help's way.

    progress = Progress(as_json)
    try:
        if str(file) == "-":
            if (kind or "raw") != "raw":
                raise OperatorError(f"{kind} cannot be written into a pipe: name a file")
            if as_json or sys.stdout.isatty():
                raise OperatorError(
                    "the disk itself goes to standard output: send that into a pipe or a file"
                )
            size = run_async(
                lambda: image_export.export_to_pipe(
                    diskd.address, name, sys.stdout.fileno(), key=diskd.key, on_progress=progress
                )
            )
        else:
            chosen = kind or next((suffix for suffix in SUFFIXES if file.suffix == f".{suffix}"), "raw")
            size = run_async(
                lambda: image_export.export_to_file(
                    diskd.address,
                    name,
                    file,
                    chosen,  # type: ignore[arg-type] # click checked it
                    force=force,
                    key=diskd.key,
                    on_progress=progress,
                )
            )
            kind = chosen
    finally:
        progress.finish()
    if as_json:
        print(json.dumps({"image": name, "file": str(file), "format": kind, "file_size": size}))
    else:
        click.echo(f"{name}: {format_size(size)} of {kind or 'raw'} in {file}", err=str(file) == "-")

"""`diskctl export` and `diskctl apply`: an image's content, or its changes, as a file or through a pipe."""

import sys
from pathlib import Path

import click

from daemonkit.cli import COMPRESS, COMPRESS_LEVEL, level_of, run_async
from daemonkit.errors import OperatorError, UsageError
from daemonkit.progress import Progress
from daemonkit.units import format_size
from diskd.cli.calling import Diskd, pass_diskd
from diskd.core import target_calls as calls


@click.command()
@click.argument("image")
@click.option("--full", is_flag=True, help="Everything.")
@click.option("--since", metavar="POINT", help="The changes since this reference point.")
@click.option("-o", "output", required=True, metavar="FILE", help="Where to; - is standard output.")
@COMPRESS
@COMPRESS_LEVEL
@pass_diskd
def export(
    diskd: Diskd,
    image: str,
    full: bool,
    since: str | None,
    output: str,
    compress: bool,
    compress_level: int | None,
) -> None:
    """Write an image as it is at this instant into a file, and keep a reference point of it.

    \b
    diskctl export web --full -o web.full          prints the point on stderr
    diskctl export web --since rp-... -o web.1     later: only what changed
    diskctl apply web.full copy.raw; diskctl apply web.1 copy.raw

    With --compress the file's data is in zstd frames where that makes it shorter; apply takes it as it is.
    """
    from diskd.shell.export_file import export_image  # Kept out of --help's way.

    if full == (since is not None):
        raise UsageError("say either --full or --since POINT")
    level = level_of(compress, compress_level)
    path = None if output == "-" else Path(output)
    if path is None and sys.stdout.isatty():
        raise OperatorError("an export is binary: send standard output into a file or a pipe")
    progress = Progress(as_json=False)
    try:
        header, trailer = run_async(
            lambda: export_image(
                diskd.address,
                calls.ExportRequest(image, since, compress_level=level),
                path,
                pipe=sys.stdout.fileno(),
                key=diskd.key,
                on_progress=lambda done: progress({"step": "exported", "size": format_size(done)}),
            )
        )
    finally:
        progress.finish()
    base = f" since {header.base}" if header.base else ""
    click.echo(f"{image}: {header.kind} {header.point}{base}, {format_size(trailer.data_bytes)}", err=True)


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("raw", metavar="RAWFILE", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--trust-base", is_flag=True, help="RAWFILE is as of the export's base, whatever its mark says."
)
def apply(file: Path, raw: Path, trust_base: bool) -> None:
    """Apply an export to a raw file: a full makes it, a differential changes it.

    The export is verified from end to end first. RAWFILE must be the disk as of the differential's base:
    apply marks its files with their point (the extended attribute user.holdfast.point), and refuses what does
    not fit, or what has no mark, unless told to trust. If it is killed, apply the same export again.
    """
    from diskd.shell.restore import apply_file  # Kept out of --help's way.

    if str(file) == "-":
        raise OperatorError("apply reads the export twice (first to verify it), so it must be a file")
    header = apply_file(file, raw, trust_base=trust_base)
    click.echo(f"{raw}: {header.vm} as of {header.point}")

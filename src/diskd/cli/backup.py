"""`diskctl backup`: freeze a VM's disks, send what changed to the target, keep the reference point."""

import json
import tomllib
from pathlib import Path
from typing import Any

import click

from daemonkit.cli import ADDRESS, COMPRESS, COMPRESS_LEVEL, DURATION, level_of
from daemonkit.diskd_api import BACKUP_RUN, BackupDisk, BackupMode, BackupReport, BackupRequest
from daemonkit.durable import read_small_file
from daemonkit.errors import OperatorError, UsageError
from daemonkit.ports import Address
from daemonkit.progress import Progress
from daemonkit.schema import unstructure
from daemonkit.units import format_size
from diskd.cli.calling import SECONDS_UNBOUNDED, Diskd, pass_diskd
from diskd.core.san_calls import SAN_BACKUP, SanBackup


@click.command()
@click.option("--vm", required=True, help="Name of the VM, under which the target keeps it.")
@click.option(
    "--image", "images", multiple=True, metavar="NAME...", help="Its images; default: all of --config."
)
@click.argument("more", nargs=-1, metavar="")
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE",
              help="The VM's file: kept with the backup; its [[disks]] give the disks' names.")  # fmt: skip
@click.option("--target", type=ADDRESS, required=True, envvar="HOLDFAST_TARGET",
              help="Where `diskd target` listens; HOLDFAST_TARGET stands for it.")  # fmt: skip
@click.option("--san", "provider", metavar="PROVIDER",
              help="Read from a snapshot of the volume, by this provider of diskd's san.toml.")  # fmt: skip
@click.option("--full", is_flag=True, help="Everything, whatever the target has.")
@click.option("--since", metavar="POINT", help="The changes since this reference point.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted backup of the VM.")
@click.option("--retry-for", type=DURATION, default="2m", show_default=True, metavar="TIME",
              help="How long to try again, from where it stood, a target that was lost.")  # fmt: skip
@COMPRESS
@COMPRESS_LEVEL
@click.option("--allow-crash-consistent", is_flag=True,
              help="Where a freeze or thaw hook fails, go on without.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Lines of JSON: progress, and the result last.")
@pass_diskd
def backup(
    diskd: Diskd,
    vm: str,
    images: tuple[str, ...],
    more: tuple[str, ...],
    config: Path | None,
    target: Address,
    provider: str | None,
    full: bool,
    since: str | None,
    resume: bool,
    retry_for: int,
    compress: bool,
    compress_level: int | None,
    allow_crash_consistent: bool,
    as_json: bool,
) -> None:
    """Back up all disks of a VM as they are at one instant.

    A full if the target has no point of this VM, else the changes since the newest point that both
    sides hold; refused if there is none (then: --full). A failed backup loses nothing: the changes stay
    tracked, and the VM does not notice.

    The [hooks] of --config, freeze and thaw, run on diskd's host around the cut: programs in its hooks_dir.
    Where one fails, so does the backup, unless --allow-crash-consistent.

    With --san, diskd takes a snapshot of the volume that holds the images and lets go of the checkpoint at
    once; the backup is read from the snapshot, which is deleted when it is done.

    A target that is lost on the way is tried again for --retry-for. After that, or if this command or diskd
    was killed, --resume goes on from what the target has, within diskd's checkpoint_resume_timeout; a plain
    backup of the VM begins anew.

    With --compress, data goes to the target in zstd frames where that makes it shorter: worth it where the
    link is slower than a core compresses, or costs money. What the target keeps is the same, and so is what
    --resume goes on with: either part may be compressed.
    """
    wanted: list[tuple[BackupMode, bool]] = [
        ("full", full),
        ("since", since is not None),
        ("resume", resume),
    ]
    modes = [mode for mode, chosen in wanted if chosen]
    if len(modes) > 1:
        raise UsageError("--full, --since and --resume exclude each other")
    text = read_config(config) if config else ""
    named = (*images, *more)
    # An interrupted backup knows its disks: they need not be told again.
    disks = disks_of(config, text, named) if named or config or not resume else []
    request = BackupRequest(
        vm=vm,
        disks=disks,
        config=text,
        target=str(target),
        mode=modes[0] if modes else "auto",
        since=since,
        retry_for_ns=retry_for,
        allow_crash_consistent=allow_crash_consistent,
        compress_level=level_of(compress, compress_level),
    )
    progress = Progress(as_json)
    try:
        report = _ask(diskd, request, provider, progress)
    finally:
        progress.finish()
    if as_json:
        print(json.dumps(unstructure(report)))
    else:
        _print(report)


def _ask(diskd: Diskd, request: BackupRequest, provider: str | None, progress: Progress) -> BackupReport:
    if provider is None:
        return diskd.call(BACKUP_RUN, request, seconds_max=SECONDS_UNBOUNDED, on_progress=progress)
    wanted = SanBackup(provider, request)
    return diskd.call(SAN_BACKUP, wanted, seconds_max=SECONDS_UNBOUNDED, on_progress=progress)


def read_config(path: Path) -> str:
    """The VM's file, verbatim. Raises OperatorError where it is not text, OSError."""
    try:
        return read_small_file(path).decode()
    except UnicodeDecodeError as error:
        raise OperatorError(f"{path}: not a text file in UTF-8") from error


def disks_of(config: Path | None, text: str, images: tuple[str, ...]) -> list[BackupDisk]:
    """Names from the VM's file where there is one; else a disk is named after its image."""
    if config is None:
        if not images:
            raise UsageError("name the images (--image NAME...) or the VM's file (--config FILE)")
        return [BackupDisk(image, image) for image in images]
    try:
        tables = tomllib.loads(text).get("disks", [])
    except tomllib.TOMLDecodeError as error:
        raise OperatorError(f"{config}: {error}") from error
    named = [_disk_of(config, table) for table in tables] if isinstance(tables, list) else []
    if not images:
        if not named:
            raise OperatorError(f"{config}: it has no [[disks]]; name the images with --image")
        return named
    by_image = {disk.image: disk for disk in named}
    for image in images:
        if image not in by_image:
            raise OperatorError(f"{config}: none of its [[disks]] has the image {image}")
    return [by_image[image] for image in images]


def _disk_of(config: Path, table: Any) -> BackupDisk:
    image = table.get("image") if isinstance(table, dict) else None
    name = table.get("name", image) if isinstance(table, dict) else None
    if not isinstance(image, str) or not isinstance(name, str):
        raise OperatorError(f"{config}: each of [[disks]] has a name and an image")
    return BackupDisk(name, image)


def _print(report: BackupReport) -> None:
    base = f" since {report.base}" if report.base else ""
    click.echo(
        f"{report.vm}: {report.kind} {report.point}{base}, {report.consistency}, {report.seconds:.1f} s"
    )
    for disk in report.disks:
        exact = "" if disk.exact else ", not exact"
        click.echo(
            f"  {disk.image}: {format_size(disk.changed_bytes)} changed,"
            f" {format_size(disk.sent_bytes)} sent{exact}"
        )

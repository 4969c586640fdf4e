"""Directories of images: made and deleted under names of their own, so that half an image is never seen."""

import contextlib
import shutil
from pathlib import Path
from typing import TypeVar

from daemonkit import durable
from daemonkit.errors import HoldfastError
from diskd.core import lease
from diskd.core.geometry import IMAGE_TOML, RAW, Identity, decode_identity
from diskd.core.inventory import ImageInfo
from diskd.core.lease import LeaseState
from diskd.core.steps import Script
from diskd.shell.files import Files

T = TypeVar("T")


async def run_once(directory: Path, script: Script[T]) -> T:
    """One script on a directory that nobody has open."""
    files = Files(directory)
    try:
        return await files.run(script)
    finally:
        files.close()


def describe(directory: Path, damage: str | None) -> ImageInfo:
    """An image that is not open: released, or damaged. Whatever of it can still be read is shown."""
    identity: Identity | None = None
    state = LeaseState()
    files = Files(directory)
    with contextlib.suppress(OSError, HoldfastError):
        identity = decode_identity(durable.read_small_file(directory / IMAGE_TOML))
        state = files.run_blocking(lease.load())
    files.close()
    geometry = identity.geometry if identity is not None else None
    return ImageInfo(
        name=directory.name,
        uuid=str(identity.uuid) if identity is not None else "",
        size_bytes=geometry.size_bytes if geometry is not None else 0,
        block_bytes=geometry.block_bytes if geometry is not None else 0,
        region_bytes=geometry.region_bytes if geometry is not None else 0,
        allocated_bytes=allocated_bytes(directory),
        state="released" if damage is None else "damaged",
        reason=damage,
        epoch=state.epoch,
        holder=None if state.released else state.holder,
        connections=0,
        checkpoint=None,
        merge_remaining_bytes=None,
        points=0,
    )


def allocated_bytes(directory: Path) -> int:
    """What the image and its AVHD take on the disk; side files are small."""
    total = 0
    for name in (RAW, "checkpoint/disk.avhd"):
        with contextlib.suppress(OSError):
            total += (directory / name).stat().st_blocks * 512
    return total


def rename(old: Path, new: Path) -> None:
    """Durably."""
    old.rename(new)
    durable.sync_directory(new.parent)


def delete(path: Path) -> None:
    """The name goes first, durably."""
    gone = path.with_name(f".gone-{path.name}")
    rename(path, gone)
    shutil.rmtree(gone)


def sweep(directory: Path) -> None:
    """What a crash left of creations and deletions."""
    for path in directory.iterdir():
        if path.name.startswith((".new-", ".gone-")):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()

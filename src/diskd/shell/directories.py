"""Directories of images: made and deleted under names of their own, so that half an image is never seen."""

import contextlib
import shutil
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

import structlog

from daemonkit import durable
from daemonkit.errors import HoldfastError
from diskd.core import lease
from diskd.core.geometry import IMAGE_TOML, RAW, Identity, decode_identity
from diskd.core.inventory import NAME_PATTERN, ImageInfo, OwnerInfo
from diskd.core.lease import LeaseState
from diskd.core.steps import Script
from diskd.errors import Refused
from diskd.shell import live_map
from diskd.shell.files import Files
from diskd.shell.shared_memory import SharedDirectory

T = TypeVar("T")
ClosedState: TypeAlias = Literal["released", "elsewhere", "damaged"]
log = structlog.get_logger()


async def run_once(directory: Path, script: Script[T]) -> T:
    """One script on a directory that nobody has open."""
    files = Files(directory)
    try:
        return await files.run(script)
    finally:
        files.close()


def describe(directory: Path, state: ClosedState, reason: str, owner: OwnerInfo | None) -> ImageInfo:
    """An image that is not open. Whatever of it can be read is shown."""
    identity: Identity | None = None
    held = LeaseState()
    files = Files(directory)
    with contextlib.suppress(OSError, HoldfastError):
        identity = decode_identity(durable.read_small_file(directory / IMAGE_TOML))
        held = files.run_blocking(lease.load())
    files.close()
    geometry = identity.geometry if identity is not None else None
    return ImageInfo(
        name=directory.name,
        uuid=str(identity.uuid) if identity is not None else None,
        size_bytes=geometry.size_bytes if geometry is not None else None,
        block_bytes=geometry.block_bytes if geometry is not None else None,
        region_bytes=geometry.region_bytes if geometry is not None else None,
        allocated_bytes=allocated_bytes(directory),
        state=state,
        reason=reason,
        epoch=held.epoch,
        holder=None if held.released else held.holder,
        connections=0,
        checkpoint=None,
        merge_remaining_bytes=None,
        points=None,
        owner=owner,
    )


def lease_of(directory: Path) -> LeaseState:
    """Of an image that is open elsewhere. Raises Refused."""
    files = Files(directory)
    try:
        return files.run_blocking(lease.load())
    except OSError as error:
        raise Refused(f"image {directory.name}: its lease cannot be read: {error}") from error
    finally:
        files.close()


def uuid_of(directory: Path) -> str | None:
    """Of the image there, if there is one that can be read."""
    try:
        return str(decode_identity(durable.read_small_file(directory / IMAGE_TOML)).uuid)
    except (OSError, HoldfastError):
        return None


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


def unborn(directory: Path, name: str, daemon: str) -> Path:
    """Where a daemon makes an image. Its own name is in it, so that no other sweeps it away."""
    return directory / f".new-{name}@{daemon}"


def delete(path: Path, shared_dir: Path, daemon: str) -> None:
    """The name goes first, durably."""
    gone = path.with_name(f".gone-{path.name}@{daemon}")
    rename(path, gone)
    forget_shared(gone, shared_dir)
    shutil.rmtree(gone)


def discard(path: Path, shared_dir: Path) -> None:
    """Remove an image's directory, or a file, or whatever is left of it."""
    forget_shared(path, shared_dir)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def listing(directory: Path) -> list[Path]:
    """The directories of all images, sorted."""
    named = (path for path in directory.iterdir() if NAME_PATTERN.fullmatch(path.name) is not None)
    return sorted(path for path in named if path.is_dir())


def sweep(directory: Path, shared_dir: Path, daemon: str) -> list[Path]:
    """Remove what a crash of this daemon left of creations and deletions (another's may be at work on its
    own); the directories of all images, sorted."""
    found = listing(directory)
    for path in sorted(directory.iterdir()):
        if path.name.startswith((".new-", ".gone-")):
            _, at, whose = path.name.partition("@")
            if not at or whose == daemon:
                discard(path, shared_dir)
        elif path not in found:
            log.warning("image.stranger", path=str(path))
    return found


def forget_shared(directory: Path, shared_dir: Path) -> None:
    """Remove what an image that is no longer wanted left in shared memory."""
    with contextlib.suppress(OSError, HoldfastError):
        identity = decode_identity(durable.read_small_file(directory / IMAGE_TOML))
        SharedDirectory(shared_dir, identity.uuid).remove_all()
        live_map.forget_others(shared_dir, identity.uuid, None)

"""The directories under ROOT/checkpoints: one per checkpoint, with its record and its flag (core.checkpoint).

A record that cannot be read back must not keep the daemon from serving: it is set aside, said loudly, and
its AVHDs are merged as those of a checkpoint that never was. No byte of a guest hangs on it; the point that
it was to settle stays pending in the images' catalogues, and is refused as a base.
"""

import contextlib
from pathlib import Path
from typing import TypeAlias

import structlog
import trio

from daemonkit.durable import sync_directory
from daemonkit.errors import HoldfastError
from diskd.core import checkpoint
from diskd.core.checkpoint import Record
from diskd.core.inventory import CHECKPOINT_PATTERN
from diskd.shell.files import Files

log = structlog.get_logger()

Loaded: TypeAlias = tuple[Record, bool, Files]  # the record, whether it is invalid, its open directory

_DAMAGED = ".damaged-"
_NEW = ".new-"


async def make_directory(parent: Path, record: Record, daemon: str) -> Files:
    """A new checkpoint's, with its record, durable; under its own name only when it is whole, so that no
    other daemon takes it for something left over. Raises OSError."""
    path = parent / record.checkpoint
    unborn = parent / f"{_NEW}{record.checkpoint}@{daemon}"

    def make() -> None:
        unborn.mkdir()
        files = Files(unborn)
        try:
            files.run_blocking(checkpoint.reserve())
            files.run_blocking(checkpoint.persist(record))
            files.close()
            unborn.rename(path)
            sync_directory(parent)
        except BaseException:
            files.close()
            for left in (unborn, path):
                if left.is_dir():
                    _remove(left)
            raise

    await trio.to_thread.run_sync(make)
    return Files(path)


async def sweep(parent: Path, daemon: str) -> None:
    """Remove what this daemon, killed, did not come to make whole."""

    def remove() -> None:
        for path in parent.glob(f"{_NEW}*@{daemon}"):
            _remove(path)

    await trio.to_thread.run_sync(remove)


async def load_records(parent: Path) -> list[Loaded]:
    """Every record. What is left of others is removed."""
    found: list[Loaded] = []
    for path in await trio.to_thread.run_sync(_directories, parent):
        files = Files(path)
        try:
            loaded = await files.run(checkpoint.load())
            if loaded is not None and loaded[0].checkpoint == path.name:
                found.append((*loaded, files))
                continue
            files.close()
            if loaded is None:  # begun, but its record never was; or gone, but for the directory
                await trio.to_thread.run_sync(_remove, path)
                continue
            reason = f"it is the record of {loaded[0].checkpoint}"
        except (OSError, HoldfastError) as error:
            files.close()
            reason = str(error)
        await trio.to_thread.run_sync(_set_aside, path, reason)
    return found


def _directories(parent: Path) -> list[Path]:
    found: list[Path] = []
    for path in sorted(parent.iterdir()):
        if CHECKPOINT_PATTERN.fullmatch(path.name) is not None and path.is_dir():
            found.append(path)
        elif not path.name.startswith((_DAMAGED, _NEW)):
            log.warning("checkpoint.stranger", path=str(path))
    return found


def _remove(path: Path) -> None:
    """Whoever had it may be removing it just now, too."""
    for leftover in path.iterdir():
        leftover.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        path.rmdir()


def _set_aside(path: Path, reason: str) -> None:
    aside = path.with_name(f"{_DAMAGED}{path.name}")
    try:
        path.rename(aside)
        sync_directory(path.parent)
    except OSError as error:
        reason = f"{reason}; it cannot be set aside: {error.strerror}"
    log.error("checkpoint.damaged", checkpoint=path.name, reason=reason, kept_as=str(aside))

"""The directories under ROOT/checkpoints: one per checkpoint, with its record and its flag (core.checkpoint).

A record that cannot be read back must not keep the daemon from serving: it is set aside, said loudly, and
its AVHDs are merged as those of a checkpoint that never was. No byte of a guest hangs on it; the point that
it was to settle stays pending in the images' catalogues, and is refused as a base.
"""

from pathlib import Path

import structlog
import trio

from daemonkit.durable import sync_directory
from daemonkit.errors import HoldfastError
from diskd.core import checkpoint
from diskd.core.checkpoint import Record
from diskd.core.inventory import CHECKPOINT_PATTERN
from diskd.shell.files import Files

log = structlog.get_logger()

_DAMAGED = ".damaged-"


async def make_directory(parent: Path, identifier: str) -> Files:
    """A new checkpoint's, durable. Raises OSError."""
    path = parent / identifier

    def make() -> None:
        path.mkdir()
        sync_directory(parent)

    await trio.to_thread.run_sync(make)
    return Files(path)


async def load_records(parent: Path) -> list[tuple[Record, bool, Files]]:
    """Every record, whether it is invalid, and its open directory. What is left of others is removed."""
    found: list[tuple[Record, bool, Files]] = []
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
        elif not path.name.startswith(_DAMAGED):
            log.warning("checkpoint.stranger", path=str(path))
    return found


def _remove(path: Path) -> None:
    for leftover in path.iterdir():
        leftover.unlink()
    path.rmdir()


def _set_aside(path: Path, reason: str) -> None:
    aside = path.with_name(f"{_DAMAGED}{path.name}")
    try:
        path.rename(aside)
        sync_directory(path.parent)
    except OSError as error:
        reason = f"{reason}; it cannot be set aside: {error.strerror}"
    log.error("checkpoint.damaged", checkpoint=path.name, reason=reason, kept_as=str(aside))

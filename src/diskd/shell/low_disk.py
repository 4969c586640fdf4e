"""Looks after the file system while checkpoints stand: a full one hurts everybody, a lost backup nobody.

At ``low_disk_limit`` no checkpoint begins, and those that stand are given up as if an AVHD could take no more
(B2): invalidated durably, then merged. What comes faster than this looks is met by the AVHD's own failure.
"""

import os
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Final

import attrs
import structlog
import trio

from daemonkit.errors import words_of
from diskd.core.space import Reserve, low_disk_reason

# A guest that writes 1 GB/s adds half a gigabyte meanwhile: less than the limit's default leaves on any disk
# that takes so much.
LOOK_SECONDS: Final = 0.5

log = structlog.get_logger("low_disk")


@attrs.frozen
class Room:
    """Of one file system, in bytes."""

    free: int
    total: int


def room(directory: Path) -> Room:
    """Raises OSError."""
    found = os.statvfs(directory)
    return Room(found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize)


async def too_little(directories: Iterable[Path], reserve: Reserve | None) -> str | None:
    """Why no checkpoint may stand there, or None. Raises OSError."""
    if reserve is None:
        return None
    for directory in directories:
        found = await trio.to_thread.run_sync(room, directory)
        reason = low_disk_reason(reserve, found.free, found.total)
        if reason is not None:
            return reason
    return None


async def watch(
    directories: list[Path],
    reserve: Reserve | None,
    *,
    stands: Callable[[], bool],
    give_up: Callable[[str], Awaitable[None]],
) -> None:
    """Until the checkpoint stands no more, or ``give_up`` was called with the reason."""
    while reserve is not None and stands():
        await trio.sleep(LOOK_SECONDS)
        try:
            reason = await too_little(directories, reserve)
        except OSError:
            continue  # a file system that does not answer is not a full one
        if reason is not None and stands():
            try:
                await give_up(reason)
            except OSError as error:
                # The checkpoint stands, so look again: one bad file is not the end of every image here.
                log.warning("checkpoint.not_given_up", why=reason, reason=words_of(error))
                continue
            return

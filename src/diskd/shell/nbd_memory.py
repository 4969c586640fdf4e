"""What all connections of a server hold together for requests that are under way.

A connection has a little memory of its own, so that ordinary requests wait for nobody. What goes beyond that
comes out of one pool. Where the pool is used up, whoever needs a part of it waits, first come, first served,
and its further requests wait in its socket.

A peer may keep what it was given for ever: half a write that does not go on, replies that nobody reads. While
nobody needs it, that is its own affair. Once somebody waits, the one whose peer has been waited for longest,
and for longer than PATIENCE_SECONDS, is sent home.
"""

from collections.abc import Callable
from typing import Final

import attrs
import trio

from daemonkit.units import MiB

# Eight requests of the largest size; all that 64 hosts have under way on a good day is less.
POOL_BYTES: Final = 512 * MiB
# Twice the largest request of a guest's driver.
OWN_BYTES: Final = 2 * MiB
# Nobody who is alive takes that long for one request.
PATIENCE_SECONDS: Final = 10.0
# How long it takes at most until what a connection held is free, once it was sent home.
_GOING_SECONDS: Final = 3.0


@attrs.define(eq=False)
class Share:
    """A part of the pool. ``drop`` ends the connection that has it; ``peer_since``: since when its peer is
    waited for, or None while the device is."""

    size_bytes: int
    drop: Callable[[str], None]
    peer_since: float | None = None


class Pool:
    """Every ``take`` is followed by a ``give``, whatever happens to the connection."""

    def __init__(self, size_bytes: int = POOL_BYTES, *, patience_s: float = PATIENCE_SECONDS) -> None:
        self._patience_s = patience_s
        self._free_bytes = size_bytes
        self._shares: set[Share] = set()
        self._turn = trio.Lock()
        self._given = trio.Event()

    @property
    def used_bytes(self) -> int:
        return sum(share.size_bytes for share in self._shares)

    def take_nowait(self, size_bytes: int, drop: Callable[[str], None]) -> Share | None:
        """None where it is not free, or others wait already."""
        return None if self._turn.locked() else self._take(size_bytes, drop)

    def _take(self, size_bytes: int, drop: Callable[[str], None]) -> Share | None:
        if self._free_bytes < size_bytes:
            return None
        self._free_bytes -= size_bytes
        share = Share(size_bytes, drop)
        self._shares.add(share)
        return share

    async def take(self, size_bytes: int, drop: Callable[[str], None]) -> Share:
        """Wait for a part of that size, which is at most the whole pool."""
        async with self._turn:
            while (share := self._take(size_bytes, drop)) is None:
                with trio.move_on_after(self._press()):
                    await self._given.wait()
            return share

    def give(self, share: Share | None) -> None:
        """Back, where there is any."""
        if share is None:
            return
        self._shares.remove(share)
        # Who had it shall be gone with its last task, memory and all, not when cycles are looked for.
        share.drop = _nobody
        self._free_bytes += share.size_bytes
        self._given.set()
        self._given = trio.Event()

    def _press(self) -> float:
        """Send the worst of those home who keep others waiting; how long (s) until the next look."""
        now = trio.current_time()
        waiting = [(share.peer_since, share) for share in self._shares if share.peer_since is not None]
        if not waiting:
            return self._patience_s
        since, worst = min(waiting, key=lambda found: found[0])
        if now - since < self._patience_s:
            return since + self._patience_s - now
        worst.peer_since = None
        worst.drop("its requests kept memory that others wait for")
        return _GOING_SECONDS


def _nobody(_reason: str) -> None:
    """It holds nothing any more."""

"""How long a sender goes on trying to reach a receiver that it has lost.

The time counts from the loss, and begins anew whenever more has become durable at the receiver since the
last one: a link that breaks every minute lets a long export through, a receiver that takes nothing does not
hold it for longer than its operator wants. Between two attempts there is a pause, which grows while nothing
gets better.
"""

from typing import Final

import attrs

from daemonkit.units import SECOND

PAUSE_NS_MIN: Final = SECOND // 4
PAUSE_NS_MAX: Final = 5 * SECOND


@attrs.define
class Patience:
    """``total_ns``: how long a receiver may be lost without having got anywhere."""

    total_ns: int
    _since: int | None = None
    _durable: int = -1
    _pause_ns: int = PAUSE_NS_MIN

    def lost(self, now: int, durable: int) -> int | None:
        """The receiver is lost at ``now``, having made ``durable`` frames durable. How long to wait before
        the next attempt, in nanoseconds, or None to give up."""
        if self._since is None or durable > self._durable:
            self._since, self._pause_ns = now, PAUSE_NS_MIN
        self._durable = max(self._durable, durable)
        left = self._since + self.total_ns - now
        if left <= 0:
            return None
        pause, self._pause_ns = self._pause_ns, min(2 * self._pause_ns, PAUSE_NS_MAX)
        return min(pause, left)

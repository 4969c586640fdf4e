"""Waiting a moment for the next request instead of passing the scheduler.

A guest with one request at a time sends its next one some 20 us after our reply. A pass of trio's scheduler
costs as much again, and going to sleep and being woken more. So the connection that is the only busy one
looks again a few times, giving its core away in between (sched_yield), before it lets the scheduler wait.

It is bounded in every direction: LINGER_NS at a time; not at all while somebody else is busy too; ever more
rarely where the next request mostly does not come, or where others take the core (then yielding costs more
than sleeping). Other tasks still get their turn after BATCH_SECONDS_MAX of the connection.
"""

import os
import time
from collections.abc import Callable
from typing import Final

# Twice what a local client needs for its next request; what an idle moment costs at most.
LINGER_NS: Final = 50_000
# Longer than this in one go: the core went to somebody else.
_LOST_NS: Final = 8 * LINGER_NS
# So many wake-ups in a row with nobody else's between them make a connection the only busy one.
_ALONE_MIN: Final = 4
# At worst one wait in so many lingers in vain.
_SKIP_MAX: Final = 128


class Company:
    """All connections of one server: who was busy last."""

    def __init__(self) -> None:
        self.busy: object = None


class Lingering:
    """One connection's: ``begin`` says whether to look again, ``go_on`` after each look in vain."""

    def __init__(self, company: Company, *, clock_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self._company = company
        self._clock_ns = clock_ns
        self._alone = 0
        self._skip = 0
        self._misses = 0
        self._since = 0

    def woken(self) -> None:
        """The scheduler let the connection go on."""
        if self._company.busy is self:
            self._alone += 1
        else:
            self._company.busy = self
            self._alone = 0

    def begin(self) -> bool:
        if self._alone < _ALONE_MIN or self._company.busy is not self:
            return False
        if self._skip:
            self._skip -= 1
            return False
        self._since = self._clock_ns()
        os.sched_yield()
        return True

    def go_on(self) -> bool:
        """False: give up."""
        if self._clock_ns() - self._since < LINGER_NS:
            os.sched_yield()
            return True
        self._misses += 1
        self._skip = min(1 << self._misses, _SKIP_MAX)
        return False

    def found(self) -> None:
        """The request has come."""
        if self._clock_ns() - self._since < _LOST_NS:
            self._misses = 0
        else:
            self._misses += 2
            self._skip = min(1 << self._misses, _SKIP_MAX)

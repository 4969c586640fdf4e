"""The events that ``clusterctl events`` shows: the newest few thousand, numbered, with a way to wait."""

import datetime as dt
from collections import deque
from itertools import islice
from typing import Any, Final

import structlog
import trio

from clusterd.core.calls import EVENTS_PER_REPLY_MAX, EventList
from clusterd.core.types import EventName

EVENTS_MAX: Final = 4096
log = structlog.get_logger("cluster")


class EventLog:
    """In memory only: the log on stderr is the lasting record."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS_MAX)
        self._next = 1
        self._noted = trio.Event()

    def note(self, name: EventName, fields: dict[str, Any]) -> None:
        """Log it and keep it."""
        log.info(name.value, **{key: value for key, value in fields.items() if key != "event"})
        self._events.append(
            {
                "seq": self._next,
                "time": dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"),
                "node": self._node,
                "event": name.value,
                "fields": fields,
            }
        )
        self._next += 1
        self._noted.set()
        self._noted = trio.Event()

    def since(self, after: int) -> EventList:
        """The oldest kept events after this number, up to a reply's bound.

        A number from before a restart of this clusterd, which counts from 1 again, starts over.
        """
        if after >= self._next:
            after = 0
        first = self._next - len(self._events)
        skipped = max(0, after + 1 - first)
        events = list(islice(self._events, skipped, skipped + EVENTS_PER_REPLY_MAX))
        missed = max(0, first - after - 1)
        return EventList(events, after + missed + len(events), missed)

    async def wait_after(self, after: int) -> None:
        """Return once there is an event after this number."""
        while self._next <= after + 1:
            await self._noted.wait()

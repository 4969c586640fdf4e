"""structlog, set up so that logging never blocks the loop: lines go through a bounded queue to one thread.

A full pipe or a slow disk therefore costs log lines, never a heartbeat; how many were dropped is said
as soon as the thread gets through again. Events have stable names and facts as fields.
"""

import atexit
import contextlib
import os
import queue
import sys
import threading
from collections.abc import Mapping, MutableMapping
from typing import Any, Final

import structlog

from daemonkit.errors import plain

QUEUE_LINES_MAX: Final = 4096
LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_STOP_SECONDS_MAX: Final = 1.0


class QueuedWriter:
    """A structlog logger factory target: ``msg`` enqueues, a daemon thread writes to the descriptor."""

    def __init__(self, descriptor: int, *, lines_max: int = QUEUE_LINES_MAX) -> None:
        self._descriptor = descriptor
        self._queue: queue.Queue[str | None] = queue.Queue(lines_max)
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def msg(self, line: str) -> None:
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self.dropped += 1

    debug = info = warning = error = critical = exception = log = msg

    def _run(self) -> None:
        told = 0
        while (line := self._queue.get()) is not None:
            if self.dropped != told:
                self._write(f'{{"event": "log.dropped", "lines": {self.dropped - told}}}')
                told = self.dropped
            self._write(line)

    def _write(self, line: str) -> None:
        data = (line + "\n").encode("utf-8", "replace")
        # A closed or broken stderr must not end the thread: the daemon is worth more than its log.
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._descriptor, data) :]

    def stop(self) -> None:
        """Write what is queued, but wait no longer than a second for a reader that does not read."""
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(_STOP_SECONDS_MAX)


def _in_words(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = plain(value)
    return event


def set_up(*, level: str = "info", json: bool | None = None, descriptor: int | None = None) -> QueuedWriter:
    """Route all structlog output to ``descriptor`` (default stderr); JSON unless it is a terminal."""
    target = sys.stderr.fileno() if descriptor is None else descriptor
    as_json = not os.isatty(target) if json is None else json
    writer = QueuedWriter(target)
    renderer: Any = structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            _in_words,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=lambda *_: writer,
        cache_logger_on_first_use=True,
    )
    atexit.register(writer.stop)
    return writer

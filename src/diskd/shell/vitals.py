"""How the daemon itself is: for how long, how late its event loop was, threads, memory, descriptors."""

import os
import resource
import threading
from collections import deque
from pathlib import Path
from typing import Final

import trio

from daemonkit.units import SECOND
from diskd.core.statistics import DaemonVitals

# Often enough that a loop which stalls for long is caught in the act; two timers a second cost nothing.
_PERIOD_SECONDS: Final = 0.5
_WINDOW: Final = int(60 / _PERIOD_SECONDS)


class Vitals:
    """``run`` watches the loop until cancelled."""

    def __init__(self) -> None:
        self._began = trio.current_time()
        self._lags: deque[float] = deque(maxlen=_WINDOW)

    async def run(self) -> None:
        while True:
            due = trio.current_time() + _PERIOD_SECONDS
            await trio.sleep_until(due)
            self._lags.append(trio.current_time() - due)

    def read(self) -> DaemonVitals:
        return DaemonVitals(
            uptime_ns=int((trio.current_time() - self._began) * SECOND),
            loop_lag_ns=int(max(self._lags, default=0.0) * SECOND),
            threads=threading.active_count(),
            resident_bytes=_resident_bytes(),
            open_files=len(os.listdir("/proc/self/fd")),
            files_max=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        )


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

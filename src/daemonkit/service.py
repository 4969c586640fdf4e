"""What a daemon tells systemd (sd_notify(3)): that it serves, that it stops, how it is, and that it is alive.

Without a NOTIFY_SOCKET nobody is told anything; that costs nothing.

    READY=1       with the ready line on stdout: `Type=notify` units that come after start only now
    STOPPING=1    as soon as it was told to end
    STATUS=...    the line in `systemctl status`
    WATCHDOG=1    three times in WATCHDOG_USEC, after the event loop has turned and a thread has answered

A disk that does not answer is no reason for a restart, which would not cure it and would stop every other
image: only the loop and the threads are judged. Where they fail, systemd ends the process with SIGABRT, and
faulthandler then writes what every thread was doing.
"""

import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import structlog
import trio

# Where no watchdog asks for more, the status line is brought up to date this often.
STATUS_SECONDS: Final = 30.0
_PINGS_PER_TIMEOUT: Final = 3
_STATUS_LENGTH_MAX: Final = 200

log = structlog.get_logger("service")

Status = Callable[[], str]


def notify(**fields: str) -> bool:
    """Send one message; False where nobody wants it or it could not be sent, which is never an error."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return False
    address = "\0" + path[1:] if path.startswith("@") else path
    message = "".join(f"{name}={' '.join(value.split())}\n" for name, value in fields.items())
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.sendto(message.encode("utf-8", "replace"), address)
        return True
    return False


def notify_ready(status: str) -> None:
    """It serves from now on."""
    notify(READY="1", STATUS=status[:_STATUS_LENGTH_MAX])


def notify_stopping(status: str) -> None:
    """It was told to end; said again, ``status`` says what it waits for now."""
    notify(STOPPING="1", STATUS=f"stopping: {status}"[:_STATUS_LENGTH_MAX])


def watchdog_seconds(environment: Mapping[str, str]) -> float | None:
    """How long systemd waits for a sign of life of this very process, or None where it does not."""
    wanted, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID")
    if not wanted.isdecimal() or int(wanted) == 0 or (pid is not None and pid != str(os.getpid())):
        return None
    return int(wanted) / 1e6


async def is_alive(seconds_max: float) -> bool:
    """Whether a worker thread answers within that time; that the loop turns is seen by this returning."""
    with trio.move_on_after(seconds_max) as scope:
        # A limiter of its own: others' threads may all be waiting for a disk, which is not a dead process.
        await trio.to_thread.run_sync(lambda: None, limiter=trio.CapacityLimiter(1), abandon_on_cancel=True)
    return not scope.cancelled_caught


async def watch(status: Status | None = None) -> None:
    """Give signs of life, and the status line when it changes, until cancelled."""
    limit = watchdog_seconds(os.environ)
    pause = STATUS_SECONDS if limit is None else limit / _PINGS_PER_TIMEOUT
    told: str | None = None
    while True:
        if limit is not None:
            if await is_alive(pause):
                notify(WATCHDOG="1")
            else:
                log.error("service.no_thread", waited_s=pause)
        if status is not None and (line := status()[:_STATUS_LENGTH_MAX]) != told:
            told = line
            notify(STATUS=line)
        await trio.sleep(pause)


async def watched(main: Callable[[], Awaitable[None]]) -> None:
    """Run a daemon to its end, with its signs of life beside it. Raises what ``main`` raises."""
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        try:
            await main()
        except Exception as error:  # noqa: BLE001 - raised below, without the nursery's group around it
            failure = error
        notify_stopping("the last step")
        nursery.cancel_scope.cancel(reason="the daemon has ended")
    if failure is not None:
        raise failure

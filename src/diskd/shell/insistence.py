"""Durable steps that a full disk must not leave undone: tried again in the background until they succeed."""

from collections.abc import Awaitable, Callable
from typing import Final

import structlog
import trio

from daemonkit.errors import HoldfastError

log = structlog.get_logger()

# Space comes back when something else is deleted or merged; nobody waits for this meanwhile.
_RETRY_SECONDS: Final = 1.0

Action = Callable[[], Awaitable[None]]


class Insistence:
    """``action`` can be begun again at any time; it raises OSError where it could not be done now."""

    def __init__(self, *, nursery_that_outlives_calls: trio.Nursery) -> None:
        self._nursery = nursery_that_outlives_calls

    async def do(self, what: str, action: Action, is_hopeless: Callable[[], bool]) -> None:
        """Return when it is done, whoever stops waiting. Raises what the first try raises; after an OSError
        it is tried again behind the caller's back, unless ``is_hopeless`` (until the next start)."""
        errors: list[Exception] = []
        done = trio.Event()

        async def run() -> None:
            try:
                await action()
            except OSError as error:
                errors.append(error)
                done.set()
                await self._again(what, action, is_hopeless)
            except HoldfastError as error:
                errors.append(error)
            finally:
                done.set()

        self._nursery.start_soon(run)
        await done.wait()
        if errors:
            raise errors[0]

    async def _again(self, what: str, action: Action, is_hopeless: Callable[[], bool]) -> None:
        log.warning("durable.put_off", what=what)
        while not is_hopeless():
            await trio.sleep(_RETRY_SECONDS)
            try:
                await action()
            except OSError:
                continue
            except HoldfastError as error:  # somebody else has done it meanwhile
                log.info("durable.overtaken", what=what, reason=str(error))
                return
            log.info("durable.made_up_for", what=what)
            return

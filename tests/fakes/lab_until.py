"""Waiting for a condition of a lab: looked at until it holds, with a deadline."""

from collections.abc import Awaitable, Callable
from typing import Any

import trio

DEADLINE_SECONDS = 25.0


async def until(what: str, condition: Callable[[], Awaitable[Any]], seconds: float = DEADLINE_SECONDS) -> Any:
    """Whatever true thing ``condition`` returns, once it does."""
    last: object = None
    with trio.move_on_after(seconds):
        while True:
            last = await condition()
            if last:
                return last
            await trio.sleep(0.05)
    raise AssertionError(f"not within {seconds:g} s: {what}")

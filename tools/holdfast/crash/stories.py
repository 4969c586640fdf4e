"""The kinds of stories of real processes, by name, each run to its end by one call."""

from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import trio

from holdfast.crash import leases, rounds, story

LIVES: Final = 6

_STORIES: Final[dict[str, Callable[[int, int], Awaitable[Counter[str]]]]] = {
    "killed": partial(story.play, can_lose_power=False),
    "power-loss": partial(story.play, can_lose_power=True),
    "backups": rounds.play,
    "leases": leases.play,
}
NAMES: Final = tuple(_STORIES)


def run(name: str, seed: int, *, lives: int = LIVES) -> Counter[str]:
    """What happened. Raises Violation, alone or in groups."""
    return trio.run(_STORIES[name], seed, lives)

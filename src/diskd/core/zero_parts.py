"""How much of a large TRIM or WRITE_ZEROES is done at a stretch: a cut waits for the part that is under way.

How long a punch takes depends on how many extents it meets: 64 MiB of a hole take microseconds, 64 MiB of
scattered blocks took 10 s on a file system mounted with `discard`. So a part's size is found by trying.
"""

from typing import Final

from daemonkit.units import MILLISECOND, KiB
from diskd.core.tracker import REQUEST_BYTES_MAX

PART_BYTES_MIN: Final = 256 * KiB
PART_NS_GOAL: Final = 20 * MILLISECOND


def next_part(part: int, took_ns: int) -> int:
    """The size of the next part, after one of ``part`` bytes took so long."""
    if took_ns > PART_NS_GOAL:
        return max(PART_BYTES_MIN, part // 4)
    if took_ns < PART_NS_GOAL // 4:
        return min(REQUEST_BYTES_MAX, part * 2)
    return part

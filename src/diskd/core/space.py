"""How much of a file system is left alone: so many bytes, or a share of it."""

from typing import Final

import attrs

from daemonkit.units import UnitError, format_size, parse_size

PERCENT_MAX: Final = 90


@attrs.frozen
class Reserve:
    """``percent`` of the file system, or else ``size_bytes``."""

    size_bytes: int = 0
    percent: int = 0

    def of(self, total_bytes: int) -> int:
        """In bytes, for a file system of that size."""
        return max(self.size_bytes, total_bytes * self.percent // 100)

    def __str__(self) -> str:
        return f"{self.percent}%" if self.percent else format_size(self.size_bytes)


def parse_reserve(text: str) -> Reserve:
    """``10GiB`` or ``5%``. Raises UnitError."""
    number, percent, rest = text.strip().partition("%")
    if not percent:
        return Reserve(size_bytes=parse_size(text))
    if rest or not (number.isascii() and number.isdigit()) or not 0 < int(number[:4]) <= PERCENT_MAX:
        raise UnitError(f"{text!r} is no share of a file system: write 1% to {PERCENT_MAX}%, or a size")
    return Reserve(percent=int(number))


def low_disk_reason(reserve: Reserve | None, free_bytes: int, total_bytes: int) -> str | None:
    """Why no checkpoint may stand on a file system with so little left, or None."""
    if reserve is None or free_bytes >= reserve.of(total_bytes):
        return None
    return f"the file system has {format_size(free_bytes)} left, less than low_disk_limit ({reserve})"

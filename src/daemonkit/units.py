"""Durations are integer nanoseconds and sizes are integer bytes; this module reads and writes both.

On the command line and in files they carry a unit (``250ms``, ``4m``, ``64KiB``, ``10GiB``); in JSON
durations are seconds and sizes are bytes (DESIGN.md section 9).
"""

import re
from typing import Final

NANOSECOND: Final = 1
MICROSECOND: Final = 1_000
MILLISECOND: Final = 1_000_000
SECOND: Final = 1_000_000_000
MINUTE: Final = 60 * SECOND
HOUR: Final = 60 * MINUTE
DAY: Final = 24 * HOUR

KiB: Final = 1 << 10
MiB: Final = 1 << 20
GiB: Final = 1 << 30
TiB: Final = 1 << 40

# An upper bound keeps every sum of two durations or sizes far away from 64 bits on the wire.
DURATION_NS_MAX: Final = 100 * 365 * DAY
SIZE_BYTES_MAX: Final = 1 << 56

_DURATION_UNITS: Final = {
    "ns": NANOSECOND,
    "us": MICROSECOND,
    "ms": MILLISECOND,
    "s": SECOND,
    "m": MINUTE,
    "h": HOUR,
    "d": DAY,
}
_SIZE_UNITS: Final = {"": 1, "b": 1, "kib": KiB, "mib": MiB, "gib": GiB, "tib": TiB}
_QUANTITY: Final = re.compile(r"^([0-9]{1,19})(?:\.([0-9]{1,9}))?\s*([A-Za-z]*)$", re.ASCII)


class UnitError(ValueError):
    """A duration or size cannot be read; the message says which and how it is written."""


def _parse(text: str, units: dict[str, int], what: str, examples: str, maximum: int) -> int:
    match = _QUANTITY.match(text.strip())
    if match is None or match[3].lower() not in units:
        raise UnitError(f"{text!r} is not a {what}: write it like {examples}")
    scale = units[match[3].lower()]
    fraction = match[2] or ""
    value = int(match[1]) * scale
    if fraction:
        numerator, denominator = int(fraction) * scale, 10 ** len(fraction)
        if numerator % denominator:
            raise UnitError(f"{text!r} is finer than a {what} can be: use a smaller unit")
        value += numerator // denominator
    if value > maximum:
        raise UnitError(f"{text!r} is too large for a {what}")
    return value


def parse_duration(text: str) -> int:
    """Nanoseconds of ``250ms``, ``1.5s``, ``4m``, ``2h``, ``1d``. Raises UnitError; a unit is required."""
    return _parse(text, _DURATION_UNITS, "duration", "250ms, 10s, 4m or 2h", DURATION_NS_MAX)


def parse_size(text: str) -> int:
    """Bytes of ``4096``, ``64KiB``, ``1.5GiB``. Raises UnitError."""
    return _parse(text, _SIZE_UNITS, "size", "4096, 64KiB, 512MiB or 10GiB", SIZE_BYTES_MAX)


def format_duration(duration_ns: int) -> str:
    """The shortest exact text that ``parse_duration`` reads back to the same value (``90s`` stays)."""
    if duration_ns < 0:
        return "-" + format_duration(-duration_ns)
    for unit in ("d", "h", "m", "s", "ms", "us"):
        scale = _DURATION_UNITS[unit]
        if duration_ns >= scale and duration_ns % scale == 0:
            return f"{duration_ns // scale}{unit}"
    return f"{duration_ns}ns" if duration_ns else "0s"


def format_size(size_bytes: int) -> str:
    """Exact where a binary unit fits, else one decimal: for people, not for parsing back."""
    for unit, scale in (("TiB", TiB), ("GiB", GiB), ("MiB", MiB), ("KiB", KiB)):
        if size_bytes >= scale:
            if size_bytes % scale == 0:
                return f"{size_bytes // scale}{unit}"
            return f"{size_bytes / scale:.1f}{unit}"
    return f"{size_bytes}B"


def to_seconds(duration_ns: int) -> float:
    """Seconds for JSON, rounded to the microsecond so that documents stay readable."""
    return round(duration_ns / SECOND, 6)

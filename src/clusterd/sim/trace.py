"""Trace lines: stable, one per event, byte-identical for equal scenario and seed."""

from typing import Any

from daemonkit.units import MILLISECOND


def _value(value: Any) -> str:
    text = str(value)
    return repr(text) if " " in text or not text else text


def line(now: int, who: str, what: str, fields: dict[str, Any] | None = None) -> str:
    """``seconds who what key=value ...``; keys in the order of the event."""
    words = [f"{now // MILLISECOND / 1000:10.3f}", who, what]
    words += [f"{key}={_value(value)}" for key, value in (fields or {}).items()]
    return " ".join(words)

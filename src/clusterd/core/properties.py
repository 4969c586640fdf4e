"""Cluster properties: names, defaults, and their validation together (DESIGN section 6).

In the store they are kept as the text that the operator wrote; here they become one frozen value, or a
refusal with the reason. A property that is absent has its default.
"""

import difflib
from typing import Any, Final, Literal

import attrs

from clusterd.errors import Refused
from daemonkit.units import (
    HOUR,
    MILLISECOND,
    SECOND,
    UnitError,
    format_duration,
    parse_duration,
    to_seconds,
)

ResiliencyLevel = Literal["off", "always", "uncertain"]
IsolationResponse = Literal["leave", "stop"]

HEARTBEAT_INTERVAL_NS_MIN: Final = 20 * MILLISECOND
HEARTBEAT_INTERVAL_NS_MAX: Final = 60 * SECOND
THRESHOLD_MIN: Final = 3  # fewer would call one lost datagram and its late relay an isolation
THRESHOLD_MAX: Final = 1000
ISOLATION_NS_MIN: Final = 200 * MILLISECOND
STORE_SESSION_NS_MIN: Final = 2 * SECOND  # etcd grants whole seconds, and keepalives need room to be late


@attrs.frozen
class Properties:
    """Validated as a whole by ``parse_properties``; Windows Server's names are in DESIGN section 6."""

    heartbeat_interval_ns: int = SECOND
    heartbeat_threshold: int = 10
    resiliency_level: ResiliencyLevel = "uncertain"
    resiliency_period_ns: int = 240 * SECOND
    quarantine_threshold: int = 3
    quarantine_window_ns: int = HOUR
    quarantine_duration_ns: int = 2 * HOUR
    quarantine_cap: float = 0.25
    mass_failure_brake: float = 0.5
    mass_failure_hold_ns: int | None = None
    store_session_ns: int = 15 * SECOND
    restart_grace_ns: int = 120 * SECOND
    storage_timeout_ns: int = 1800 * SECOND
    isolation_response: IsolationResponse = "leave"

    @property
    def isolation_ns(self) -> int:
        """The isolation time: how long evidence of a node stays fresh."""
        return self.heartbeat_interval_ns * self.heartbeat_threshold


DEFAULTS: Final[dict[str, str]] = {
    "heartbeat_interval": "1s",
    "heartbeat_threshold": "10",
    "resiliency_level": "uncertain",
    "resiliency_period": "240s",
    "quarantine_threshold": "3",
    "quarantine_window": "3600s",
    "quarantine_duration": "7200s",
    "quarantine_cap": "0.25",
    "mass_failure_brake": "0.5",
    "mass_failure_hold": "never",
    "store_session": "15s",
    "restart_grace": "120s",
    "storage_timeout": "1800s",
    "isolation_response": "leave",
}
_DURATIONS: Final = frozenset(
    {
        "heartbeat_interval",
        "resiliency_period",
        "quarantine_window",
        "quarantine_duration",
        "store_session",
        "restart_grace",
        "storage_timeout",
    }
)
_CHOICES: Final = {
    "resiliency_level": ("off", "always", "uncertain"),
    "isolation_response": ("leave", "stop"),
}
_WHOLE: Final = {"heartbeat_threshold": (THRESHOLD_MIN, THRESHOLD_MAX), "quarantine_threshold": (1, 100)}
_SHARES: Final = frozenset({"quarantine_cap", "mass_failure_brake"})
_DURATIONS_OR_NEVER: Final = frozenset({"mass_failure_hold"})


def _value(name: str, text: str) -> Any:
    if name in _DURATIONS_OR_NEVER and text == "never":
        return None
    if name in _DURATIONS or name in _DURATIONS_OR_NEVER:
        try:
            return parse_duration(text)
        except UnitError as error:
            raise Refused(f"{name}: {error}") from error
    if name in _CHOICES:
        if text not in _CHOICES[name]:
            raise Refused(f"{name}: {text!r} is not one of {', '.join(_CHOICES[name])}")
        return text
    if name in _WHOLE:
        low, high = _WHOLE[name]
        if not (text.isascii() and text.isdigit() and len(text) < 6 and low <= int(text) <= high):
            raise Refused(f"{name}: {text!r} is not a whole number from {low} to {high}")
        return int(text)
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0.0 <= share <= 1.0:
        raise Refused(f"{name}: {text!r} is not a share from 0 to 1")
    return share


def parse_properties(texts: dict[str, str]) -> Properties:
    """All properties of these texts, defaults filled in. Raises Refused: unknown name, wrong unit or value,
    impossible combination."""
    values: dict[str, Any] = {}
    for name, text in sorted(texts.items()):
        if name not in DEFAULTS:
            near = difflib.get_close_matches(name, DEFAULTS, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f" (known: {', '.join(DEFAULTS)})"
            raise Refused(f"unknown property {name!r}{hint}")
        is_duration = name in _DURATIONS or name in _DURATIONS_OR_NEVER
        values[f"{name}_ns" if is_duration else name] = _value(name, text)
    properties = Properties(**values)
    _check_together(properties)
    return properties


def _check_together(p: Properties) -> None:
    if not HEARTBEAT_INTERVAL_NS_MIN <= p.heartbeat_interval_ns <= HEARTBEAT_INTERVAL_NS_MAX:
        raise Refused("heartbeat_interval: must lie between 20ms and 60s")
    if p.isolation_ns < ISOLATION_NS_MIN:
        raise Refused(
            f"heartbeat_interval x heartbeat_threshold is {format_duration(p.isolation_ns)}: "
            "below 200ms an ordinary pause of the scheduler would isolate a node"
        )
    if p.store_session_ns < STORE_SESSION_NS_MIN:
        raise Refused("store_session: must be at least 2s")
    if p.store_session_ns < p.isolation_ns:
        raise Refused(
            f"store_session ({format_duration(p.store_session_ns)}) is shorter than the isolation time "
            f"({format_duration(p.isolation_ns)}): raise it, or lower heartbeat_interval or _threshold"
        )
    if p.quarantine_window_ns < p.isolation_ns:
        raise Refused("quarantine_window is shorter than the isolation time: no two exits could fall into it")
    if p.quarantine_duration_ns <= 0:
        raise Refused("quarantine_duration: must be more than 0")
    if p.mass_failure_hold_ns is not None and p.mass_failure_hold_ns <= 0:
        raise Refused("mass_failure_hold: must be more than 0, or never; mass_failure_brake 1 turns it off")


def property_texts(texts: dict[str, str]) -> dict[str, str]:
    """Every property as the operator would write it: ``clusterctl get``."""
    return {name: texts.get(name, default) for name, default in DEFAULTS.items()}


def property_document(texts: dict[str, str]) -> dict[str, Any]:
    """Every property as JSON shows it: durations in seconds, shares and counts as numbers."""
    properties = parse_properties(texts)
    document: dict[str, Any] = {}
    for name in DEFAULTS:
        if name in _DURATIONS:
            document[name] = to_seconds(getattr(properties, f"{name}_ns"))
        elif name in _DURATIONS_OR_NEVER:
            held_ns = getattr(properties, f"{name}_ns")
            document[name] = "never" if held_ns is None else to_seconds(held_ns)
        else:
            document[name] = getattr(properties, name)
    return document

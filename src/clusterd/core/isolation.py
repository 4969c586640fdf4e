"""The isolation window of one node, as the leader keeps it.

Theory of operation. When contact is lost, a window opens. Each VM of the node has its own length of it
(``resiliency_period``), so the window is just elapsed time, plus the grace of an announced restart. It is
``ended`` once the longest finite one is over; the node then shows as down. When the node is back, the
window closes, and the episode counts as an ungraceful exit unless it was announced (and kept).

    (none) --contact lost--> open --longest finite window over--> ended
    open | ended --back in contact--> (none)      [counts an exit unless announced]
"""

import attrs

from clusterd.core.properties import Properties
from clusterd.core.records import Window
from clusterd.core.types import NEVER, VmConfig


def opened(incarnation: int, elapsed_ns: int, announced_grace_ns: int | None) -> Window:
    """Contact was lost ``elapsed_ns`` ago. ``announced_grace_ns``: the node said ``restart`` before."""
    if announced_grace_ns is None:
        return Window(elapsed_ns, incarnation=incarnation)
    return Window(elapsed_ns, grace_ns=announced_grace_ns, incarnation=incarnation, counts=False)


def progressed(window: Window, longest_ns: int) -> Window:
    """What follows from the time elapsed: a broken promise to be back counts, and windows end."""
    counts = window.counts or window.elapsed_ns >= window.grace_ns
    ended = window.ended or window.elapsed_ns >= window.grace_ns + longest_ns
    return attrs.evolve(window, counts=counts, ended=ended)


def period_ns(config: VmConfig, properties: Properties, proven_dead: bool) -> int | None:
    """How long this VM is left alone on an isolated node; None: for ever."""
    if properties.resiliency_level == "off":
        return 0
    if proven_dead and properties.resiliency_level == "uncertain":
        return 0
    own = config.resiliency_period_ns
    if own == NEVER:
        return None
    return properties.resiliency_period_ns if own is None else own


def longest_ns(configs: list[VmConfig], properties: Properties) -> int:
    """The last finite window of a node with these VMs; without VMs the cluster's own."""
    periods = [period_ns(config, properties, False) for config in configs]
    finite = [period for period in periods if period is not None]
    if finite:
        return max(finite)
    return 0 if properties.resiliency_level == "off" else properties.resiliency_period_ns


def remaining_ns(window: Window, period: int | None) -> int | None:
    """What is left of this VM's window, 0 when over, None when it never ends."""
    return None if period is None else max(0, window.grace_ns + period - window.elapsed_ns)

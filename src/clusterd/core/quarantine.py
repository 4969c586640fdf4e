"""Quarantine: a node that keeps leaving without a goodbye is kept out until it has calmed down.

Theory of operation. The leader counts an ungraceful exit once per isolation episode, when the node is
back. Ages of exits are kept in the store, since clocks are not shared. At ``quarantine_threshold`` exits
within ``quarantine_window`` the node is *due*. It enters if the cap has room; else it is *held by the
cap*, and enters later only if it is still due. After ``quarantine_duration`` (or when an operator clears
it) it is released, and its exits are forgotten.

    normal --due, room--> quarantined --time over | cleared--> normal (exits cleared)
    normal --due, no room--> held (shown) --room, still due--> quarantined
"""

import attrs

from clusterd.core.properties import Properties
from clusterd.core.records import EXITS_MAX, NodeRecord


def aged(record: NodeRecord, age_ns: int, properties: Properties) -> NodeRecord:
    """``record`` as it is ``age_ns`` after it was written; exits beyond the sliding window are dropped."""
    window = record.window
    if window is not None:
        window = attrs.evolve(window, elapsed_ns=window.elapsed_ns + age_ns)
    exits = tuple(
        age + age_ns for age in record.exit_ages_ns if age + age_ns < properties.quarantine_window_ns
    )
    quarantine = record.quarantine_elapsed_ns
    return NodeRecord(window, exits, None if quarantine is None else quarantine + age_ns)


def count_exit(record: NodeRecord) -> NodeRecord:
    """One more ungraceful exit, just now."""
    return attrs.evolve(record, exit_ages_ns=(*record.exit_ages_ns, 0)[-EXITS_MAX:])


def cap(properties: Properties, members: int) -> int:
    """How many of ``members`` nodes may be quarantined at once (S5)."""
    if members < 2:
        return 0
    return max(1, int(properties.quarantine_cap * members))


def is_due(record: NodeRecord, properties: Properties) -> bool:
    """Whether the node ought to be quarantined now."""
    return (
        record.quarantine_elapsed_ns is None and len(record.exit_ages_ns) >= properties.quarantine_threshold
    )


def enter(record: NodeRecord) -> NodeRecord:
    """The record of a node whose quarantine begins now."""
    return attrs.evolve(record, quarantine_elapsed_ns=0)


def is_over(record: NodeRecord, properties: Properties) -> bool:
    """Whether a quarantined node has served its time."""
    elapsed = record.quarantine_elapsed_ns
    return elapsed is not None and elapsed >= properties.quarantine_duration_ns


def release(record: NodeRecord) -> NodeRecord:
    """Released, by time or by an operator: its exits are cleared."""
    return attrs.evolve(record, quarantine_elapsed_ns=None, exit_ages_ns=())

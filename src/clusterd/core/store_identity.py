"""Whose store is this, and is it as new as what we have seen of it? (S6)

A node remembers *marks*: the id of its store, the newest epoch and revision it saw there, and the newest
recovery. A store is *ours* if it has the id and none of the marks went back; after a recovery that we have
not seen yet, revisions start over, but the epoch still must not go back. Anything else is unknown:

    empty       no id, though we know one
    rebuilding  a recovery has begun and has not ended: it is complete only with its id
    foreign     another id, or another recovery of the same number
    older       an epoch, a revision or a recovery below what we have seen
"""

from collections.abc import Iterable
from typing import Any, Final, Literal

import attrs

from clusterd.core import records
from clusterd.core.events import StoreEntry

Condition = Literal["ours", "rebuilt", "empty", "rebuilding", "foreign", "older"]
GOOD: Final = ("ours", "rebuilt")
REMEDY: Final = (
    "it is not used until an operator restores the right one, or rebuilds it (clusterctl store recover)"
)


@attrs.frozen
class Marks:
    """What was seen. ``store_id`` None: no store so far."""

    store_id: str | None
    epoch: int
    revision: int
    recovery: int = 0
    recovery_token: str = ""


@attrs.frozen
class StoreHead:
    """What a store says of itself."""

    id: str | None = None
    epoch: int = 0
    recovered: records.Recovered | None = None
    recovering: records.Recovering | None = None

    @property
    def recovery(self) -> int:
        """How often it has been rebuilt."""
        return self.recovered.number if self.recovered else 0


def read_head(prefix: str, entries: Iterable[StoreEntry]) -> StoreHead:
    """Raises StoreUnknown for a record that does not read."""
    found: dict[str, Any] = {}
    for entry in entries:
        key = entry.key[len(prefix) :]
        if key in ("id", "epoch", "recovered", "recovering") and entry.key.startswith(prefix):
            found[key] = records.decode_record(records.KINDS[key], key, entry.value)
    own, counter = found.get("id"), found.get("epoch")
    return StoreHead(
        own.id if own else None,
        counter.epoch if counter else 0,
        found.get("recovered"),
        found.get("recovering"),
    )


def judge_store(marks: Marks, head: StoreHead, revision: int) -> tuple[Condition, str]:
    """What the store is to a node with these marks, and the reason where it is not good."""
    known, found = marks.store_id, head.id
    if head.recovering is not None:
        by = head.recovering.node
        return "rebuilding", (
            f"the store is being rebuilt by {by}: it is unknown until that is complete;"
            " if it was interrupted, run 'clusterctl store recover' again"
        )
    if known is None:
        return "ours", ""
    if found is None:
        return "empty", f"the store is empty, but this node knows the cluster {known}: {REMEDY}"
    if found != known:
        return "foreign", f"the store belongs to the cluster {found}, not to {known}: {REMEDY}"
    is_rebuilt = head.recovery > marks.recovery
    token = head.recovered.token if head.recovered else ""
    if head.recovery == marks.recovery and token != marks.recovery_token:
        return (
            "foreign",
            f"the store was rebuilt twice, apart from each other (number {head.recovery}): {REMEDY}",
        )
    since = 0 if is_rebuilt else marks.revision
    if head.recovery < marks.recovery:
        return "older", f"the store is a copy of before its recovery number {marks.recovery}: {REMEDY}"
    if head.epoch < marks.epoch or revision < since:
        return "older", (
            f"the store is an older copy (epoch {head.epoch} of {marks.epoch}, "
            f"revision {revision} of {since}): {REMEDY}"
        )
    return ("rebuilt" if is_rebuilt else "ours"), ""

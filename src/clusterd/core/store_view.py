"""The node's picture of the store: parsed records with their revisions, as of the last linearizable read,
plus its own successful writes since. Records are parsed once per revision."""

from collections.abc import Iterator
from typing import Any, Final, TypeVar

import attrs

from clusterd.core import records
from clusterd.core.events import StoreEntry
from clusterd.core.properties import Properties, parse_properties

R = TypeVar("R")
NOTHING_RECORDED: Final = records.NodeRecord()
NOTHING_HELD: Final = records.BrakeRecord()


@attrs.frozen
class Seen:
    """A record with what guards need to know of its key. ``value``: its bytes."""

    record: Any
    create_revision: int
    mod_revision: int
    lease: int
    value: bytes = attrs.field(repr=False, eq=False)


@attrs.define
class StoreView:
    """``read_revision``: of the last full read; everything up to it has been seen. ``revision``: also
    counts own writes."""

    prefix: str
    seen: dict[str, Seen] = attrs.field(factory=dict)
    read_revision: int = 0
    revision: int = 0
    properties: Properties = attrs.field(factory=Properties)
    has_read: bool = False
    version: int = 0  # counts changes of the picture
    _members: dict[str, records.Member] | None = None
    _vms: list[str] | None = None
    memo: dict[Any, Any] = attrs.field(factory=dict)  # what others derived from this version of the picture

    def _changed(self) -> None:
        self.version += 1
        self._members = self._vms = None
        self.memo.clear()

    def replace(self, revision: int, entries: tuple[StoreEntry, ...]) -> bool:
        """Take in a full read; whether anything changed. Raises StoreUnknown for a record that does not
        read, and then keeps the old picture."""
        if self.has_read and revision == self.revision == self.read_revision:
            return False
        fresh: dict[str, Seen] = {}
        changed = False
        for entry in sorted(entries, key=lambda e: e.key):
            if not entry.key.startswith(self.prefix):
                continue
            key = entry.key[len(self.prefix) :]
            cls = records.kind_of(key)
            if cls is None:
                continue
            old = self.seen.get(key)
            if old is not None and old.mod_revision == entry.mod_revision:
                fresh[key] = old
                continue
            record: Any = records.decode_record(cls, key, entry.value)
            fresh[key] = Seen(record, entry.create_revision, entry.mod_revision, entry.lease, entry.value)
            changed = True
        changed = changed or len(fresh) != len(self.seen)
        self.seen, self.has_read = fresh, True
        self.read_revision, self.revision = revision, max(revision, self.revision)
        if changed:
            self._changed()
            self._read_properties()
        return changed

    def start_over(self) -> None:
        """The next read is of another database: its revisions say nothing about those of before."""
        self.seen, self.has_read = {}, False
        self.read_revision = self.revision = 0
        self._changed()

    def wrote(self, key: str, record: Any, revision: int, lease: int) -> None:
        """One of our puts succeeded at ``revision``."""
        old = self.seen.get(key)
        created = old.create_revision if old else revision
        self.seen[key] = Seen(record, created, revision, lease, records.encode_record(record))
        self.revision = max(self.revision, revision)
        self._changed()
        if key == "properties":
            self._read_properties()

    def deleted(self, key: str, revision: int) -> None:
        """One of our deletes succeeded at ``revision``."""
        self.seen.pop(key, None)
        self._changed()
        self.revision = max(self.revision, revision)

    def _read_properties(self) -> None:
        record = self.record("properties", records.PropertyTexts)
        self.properties = parse_properties(record.texts if record else {})

    def record(self, key: str, cls: type[R]) -> R | None:
        """The record under ``key``, or None."""
        seen = self.seen.get(key)
        if seen is None:
            return None
        assert isinstance(seen.record, cls), key
        return seen.record

    def mod(self, key: str) -> int:
        """The key's mod revision, 0 if absent: what a guard compares."""
        seen = self.seen.get(key)
        return 0 if seen is None else seen.mod_revision

    def create(self, key: str) -> int:
        """The key's create revision, 0 if absent."""
        seen = self.seen.get(key)
        return 0 if seen is None else seen.create_revision

    def named(self, folder: str) -> Iterator[str]:
        """The names under ``folder/``, ascending."""
        head = folder + "/"
        return (key[len(head) :] for key in sorted(self.seen) if key.startswith(head))

    def members(self) -> dict[str, records.Member]:
        """Every member of the cluster, by name."""
        if self._members is None:
            self._members = {name: self.seen[f"members/{name}"].record for name in self.named("members")}
        return self._members

    def vms(self) -> list[str]:
        """The names of all VMs with a specification, ascending."""
        if self._vms is None:
            self._vms = [key[4:-5] for key in sorted(self.seen) if key[:4] == "vms/" and key[-5:] == "/spec"]
        return self._vms

    def presence(self, node: str) -> records.Presence | None:
        """The node's presence, or None: then its session is gone."""
        return self.record(f"presence/{node}", records.Presence)

    def node(self, node: str) -> records.NodeRecord:
        """The leader's record of a node; an empty one where there is none."""
        return self.record(f"nodes/{node}", records.NodeRecord) or NOTHING_RECORDED

    def brake(self) -> records.BrakeRecord:
        """What the mass-failure brake holds; an empty record where it holds nothing."""
        return self.record("brake", records.BrakeRecord) or NOTHING_HELD

    def spec(self, vm: str) -> records.VmSpec | None:
        return self.record(f"vms/{vm}/spec", records.VmSpec)

    def assignment(self, vm: str) -> records.Assignment | None:
        return self.record(f"vms/{vm}/assignment", records.Assignment)

    def run(self, vm: str) -> records.Run | None:
        return self.record(f"vms/{vm}/run", records.Run)

    def current_run(self, vm: str) -> records.Run | None:
        """What the owner says about the run that the assignment names, None while it has not claimed it."""
        assignment, run = self.assignment(vm), self.run(vm)
        if assignment is None or run is None or run.epoch != assignment.epoch:
            return None
        return run

    def epoch(self) -> int:
        counter = self.record("epoch", records.EpochCounter)
        return counter.epoch if counter else 0

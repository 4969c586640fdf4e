"""What the witness keeps: a revisioned key-value store with leases, after etcd v3's model.

Theory of operation. The whole content lives in memory; every request is first *planned*, which changes
nothing and yields the answer together with the ``Changes`` it implies, then the shell makes those durable,
then they are *applied*. A failure between the two therefore leaves memory and disk agreeing on the old
content, and a reader never sees what a power loss could take back.

A revision is one number for the whole store; each transaction that writes raises it by one, and all keys
written in it carry it as ``mod_revision``. ``create_revision`` is the revision that made the key;
``version`` counts its writes since. A compare on a key that does not exist sees zeroes, except that a
compare of its value never holds (as in etcd).

A lease carries keys and a time to live. It is kept alive by its owner; when its deadline has passed, it
and its keys vanish, in one revision. Deadlines are not durable: after a restart of the witness every
lease has its full time again, since the time during which nobody could have kept it alive is not counted
against its owner.
"""

import enum
from bisect import bisect_left, insort
from typing import Final

import attrs

from daemonkit.errors import HoldfastError
from daemonkit.units import SECOND

# Bounds: a cluster of 64 nodes and a few thousand VMs needs three keys of about 2 KiB per VM.
KEYS_MAX: Final = 65_536
KEY_BYTES_MAX: Final = 1_024
VALUE_BYTES_MAX: Final = 256 << 10
TOTAL_BYTES_MAX: Final = 256 << 20
OPERATIONS_MAX: Final = 128  # etcd's own default for one transaction
LEASES_MAX: Final = 4_096
TTL_SECONDS_MAX: Final = 9_000_000_000  # etcd's own
INT64_MAX: Final = (1 << 63) - 1


class StoreRefusal(HoldfastError):
    """The request cannot be done; ``code`` is the gRPC status that etcd would give."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


INVALID: Final = 3
NOT_FOUND: Final = 5
ALREADY_EXISTS: Final = 6
EXHAUSTED: Final = 8
FAILED_PRECONDITION: Final = 9
OUT_OF_RANGE: Final = 11
UNIMPLEMENTED: Final = 12


class Target(enum.Enum):
    """What a compare looks at."""

    VERSION = "VERSION"
    CREATE = "CREATE"
    MOD = "MOD"
    VALUE = "VALUE"
    LEASE = "LEASE"


class Relation(enum.Enum):
    """How a compare relates what is there to what is given."""

    EQUAL = "EQUAL"
    GREATER = "GREATER"
    LESS = "LESS"
    NOT_EQUAL = "NOT_EQUAL"


@attrs.frozen
class KeyValue:
    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int = 0


@attrs.frozen
class Compare:
    key: bytes
    target: Target
    relation: Relation
    operand: int | bytes


@attrs.frozen
class Range:
    """``range_end`` empty: one key; a zero byte: every key from ``key`` on; else up to it, exclusive."""

    key: bytes
    range_end: bytes = b""
    limit: int = 0
    keys_only: bool = False
    count_only: bool = False


@attrs.frozen
class Put:
    key: bytes
    value: bytes
    lease: int = 0


@attrs.frozen
class Delete:
    key: bytes
    range_end: bytes = b""


Operation = Range | Put | Delete


@attrs.frozen
class RangeResult:
    kvs: tuple[KeyValue, ...]
    count: int
    more: bool


@attrs.frozen
class PutResult:
    pass


@attrs.frozen
class DeleteResult:
    deleted: int


OperationResult = RangeResult | PutResult | DeleteResult


@attrs.frozen
class Lease:
    id: int
    ttl_seconds: int


@attrs.frozen
class Changes:
    """What to make durable, in one transaction, before it is applied."""

    revision: int
    puts: tuple[KeyValue, ...] = ()
    deletes: tuple[bytes, ...] = ()
    leases_added: tuple[Lease, ...] = ()
    leases_removed: tuple[int, ...] = ()

    @property
    def empty(self) -> bool:
        return not (self.puts or self.deletes or self.leases_added or self.leases_removed)


@attrs.frozen
class Plan:
    """The answer to a transaction, and what it would change."""

    succeeded: bool
    results: tuple[OperationResult, ...]
    changes: Changes


@attrs.define
class _LeaseState:
    lease: Lease
    deadline_ns: int
    keys: set[bytes] = attrs.field(factory=set)


def _matches(compare: Compare, kv: KeyValue | None) -> bool:
    """Does the compare hold for the key as it is (None: absent)?"""
    if compare.target is Target.VALUE:
        if kv is None:
            return False
        return _relate(compare.relation, kv.value, compare.operand)
    seen = {
        Target.VERSION: kv.version if kv else 0,
        Target.CREATE: kv.create_revision if kv else 0,
        Target.MOD: kv.mod_revision if kv else 0,
        Target.LEASE: kv.lease if kv else 0,
    }[compare.target]
    return _relate(compare.relation, seen, compare.operand)


def _relate(relation: Relation, seen: int | bytes, operand: int | bytes) -> bool:
    if isinstance(seen, bytes) and isinstance(operand, bytes):
        order = (seen > operand) - (seen < operand)
    elif isinstance(seen, int) and isinstance(operand, int):
        order = (seen > operand) - (seen < operand)
    else:
        raise StoreRefusal(INVALID, "etcdserver: a compare's operand does not fit its target")
    return {
        Relation.EQUAL: order == 0,
        Relation.GREATER: order > 0,
        Relation.LESS: order < 0,
        Relation.NOT_EQUAL: order != 0,
    }[relation]


class _View:
    """The content as a transaction in progress sees it: the store beneath, its own writes above."""

    def __init__(self, store: "WitnessStore") -> None:
        self.store = store
        self.written: dict[bytes, KeyValue | None] = {}

    def get(self, key: bytes) -> KeyValue | None:
        return self.written[key] if key in self.written else self.store.get(key)

    def keys(self, key: bytes, range_end: bytes) -> list[bytes]:
        below = self.store.key_names(key, range_end)
        if not self.written:
            return below
        names = {name for name in below if self.get(name) is not None}
        names |= {name for name, kv in self.written.items() if kv and _within(name, key, range_end)}
        return sorted(names)


def _within(name: bytes, key: bytes, range_end: bytes) -> bool:
    if not range_end:
        return name == key
    return name >= key and (range_end == b"\0" or name < range_end)


class WitnessStore:
    """The content. ``plan_*`` change nothing; ``apply`` makes a plan's changes the content."""

    def __init__(
        self,
        now: int,
        *,
        revision: int = 1,
        kvs: tuple[KeyValue, ...] = (),
        leases: tuple[Lease, ...] = (),
    ) -> None:
        self.revision = revision
        self._kvs = {kv.key: kv for kv in kvs}
        self._names = sorted(self._kvs)
        self._bytes = sum(len(kv.key) + len(kv.value) for kv in kvs)
        self._leases = {lease.id: _LeaseState(lease, now + lease.ttl_seconds * SECOND) for lease in leases}
        for kv in kvs:
            if kv.lease in self._leases:
                self._leases[kv.lease].keys.add(kv.key)

    @property
    def size_bytes(self) -> int:
        """Bytes of all keys and values."""
        return self._bytes

    def get(self, key: bytes) -> KeyValue | None:
        """The key as it is, or None."""
        return self._kvs.get(key)

    def key_names(self, key: bytes, range_end: bytes) -> list[bytes]:
        """The names within a range, in order."""
        if not range_end:
            return [key] if key in self._kvs else []
        first = bisect_left(self._names, key)
        last = len(self._names) if range_end == b"\0" else bisect_left(self._names, range_end)
        return self._names[first:last]

    def range(self, request: Range) -> RangeResult:
        """Answer a read alone."""
        _check_key(request.key, request.range_end)
        return self._range(_View(self), request)

    def _range(self, view: _View, request: Range) -> RangeResult:
        names = view.keys(request.key, request.range_end)
        count = len(names)
        if request.count_only:
            return RangeResult((), count, more=False)
        more = bool(request.limit) and count > request.limit
        if more:
            names = names[: request.limit]
        found = [kv for kv in map(view.get, names) if kv is not None]
        if request.keys_only:
            found = [attrs.evolve(kv, value=b"") for kv in found]
        return RangeResult(tuple(found), count, more)

    def plan_txn(
        self,
        compares: tuple[Compare, ...],
        success: tuple[Operation, ...],
        failure: tuple[Operation, ...],
    ) -> Plan:
        """What the transaction answers and changes. Raises StoreRefusal; then it changes nothing."""
        if max(len(compares), len(success), len(failure)) > OPERATIONS_MAX:
            raise StoreRefusal(INVALID, "etcdserver: too many operations in txn request")
        for branch in (success, failure):
            self._check_operations(branch)
        for compare in compares:
            _check_key(compare.key, b"")
        succeeded = all(_matches(compare, self._kvs.get(compare.key)) for compare in compares)
        view = _View(self)
        results = tuple([self._perform(view, operation) for operation in (success if succeeded else failure)])
        changes = self._changes(view)
        self._check_room(changes)
        return Plan(succeeded, results, changes)

    def _perform(self, view: _View, operation: Operation) -> OperationResult:
        if isinstance(operation, Range):
            return self._range(view, operation)
        if isinstance(operation, Delete):
            names = view.keys(operation.key, operation.range_end)
            view.written.update(dict.fromkeys(names))
            return DeleteResult(len(names))
        if operation.lease and operation.lease not in self._leases:
            raise StoreRefusal(NOT_FOUND, "etcdserver: requested lease not found")
        old, revision = view.get(operation.key), self.revision + 1
        view.written[operation.key] = KeyValue(
            operation.key,
            operation.value,
            old.create_revision if old else revision,
            revision,
            old.version + 1 if old else 1,
            operation.lease,
        )
        return PutResult()

    def _changes(self, view: _View) -> Changes:
        puts = tuple(kv for kv in view.written.values() if kv is not None)
        deletes = tuple(name for name, kv in view.written.items() if kv is None and name in self._kvs)
        return Changes(self.revision + bool(puts or deletes), puts, deletes)

    def _check_operations(self, operations: tuple[Operation, ...]) -> None:
        put: set[bytes] = set()
        for operation in operations:
            _check_key(operation.key, b"" if isinstance(operation, Put) else operation.range_end)
            if isinstance(operation, Put):
                if operation.key in put:
                    raise StoreRefusal(INVALID, "etcdserver: duplicate key given in txn request")
                put.add(operation.key)
                if len(operation.value) > VALUE_BYTES_MAX:
                    raise StoreRefusal(INVALID, f"etcdserver: a value exceeds {VALUE_BYTES_MAX} bytes")
        for operation in operations:
            if isinstance(operation, Delete) and any(
                _within(name, operation.key, operation.range_end) for name in put
            ):
                raise StoreRefusal(INVALID, "etcdserver: duplicate key given in txn request")

    def _check_room(self, changes: Changes) -> None:
        grown = sum(len(kv.key) + len(kv.value) for kv in changes.puts)
        new = sum(1 for kv in changes.puts if kv.key not in self._kvs)
        if changes.puts and (self._bytes + grown > TOTAL_BYTES_MAX or len(self._kvs) + new > KEYS_MAX):
            raise StoreRefusal(EXHAUSTED, "etcdserver: mvcc: database space exceeded")

    def plan_grant(self, lease_id: int, ttl_seconds: int) -> Changes:
        """Grant a lease. Raises StoreRefusal for a bad time, a taken id or too many."""
        if not 1 <= ttl_seconds <= TTL_SECONDS_MAX:
            raise StoreRefusal(
                OUT_OF_RANGE,
                "etcdserver: too large lease TTL"
                if ttl_seconds > 0
                else "etcdserver: a lease lives at least one second",
            )
        if not 0 < lease_id <= INT64_MAX:
            raise StoreRefusal(INVALID, "etcdserver: a lease's ID is a positive 64-bit number")
        if lease_id in self._leases:
            raise StoreRefusal(FAILED_PRECONDITION, "etcdserver: lease already exists")
        if len(self._leases) >= LEASES_MAX:
            raise StoreRefusal(EXHAUSTED, "etcdserver: too many leases")
        return Changes(self.revision, leases_added=(Lease(lease_id, ttl_seconds),))

    def keep_alive(self, lease_id: int, now: int) -> int | None:
        """Give the lease its full time again: its seconds, or None for a lease that is gone.

        A lease past its deadline that ``plan_expiry`` has not ended yet still lives: after a stall of the
        witness its owner's message may be waiting in a socket, unread through no fault of the owner.
        """
        state = self._leases.get(lease_id)
        if state is None:
            return None
        state.deadline_ns = now + state.lease.ttl_seconds * SECOND
        return state.lease.ttl_seconds

    def plan_revoke(self, lease_id: int) -> Changes:
        """End a lease and delete its keys. Raises StoreRefusal where there is none."""
        if lease_id not in self._leases:
            raise StoreRefusal(NOT_FOUND, "etcdserver: requested lease not found")
        return self._ending((lease_id,))

    def plan_expiry(self, now: int) -> Changes:
        """End every lease whose deadline has passed, all in one revision."""
        return self._ending(
            tuple(sorted(lease_id for lease_id, state in self._leases.items() if now >= state.deadline_ns))
        )

    def _ending(self, lease_ids: tuple[int, ...]) -> Changes:
        names = tuple(sorted(name for lease_id in lease_ids for name in self._leases[lease_id].keys))
        return Changes(self.revision + bool(names), deletes=names, leases_removed=lease_ids)

    def next_deadline(self) -> int | None:
        """When ``plan_expiry`` has something to do next."""
        return min((state.deadline_ns for state in self._leases.values()), default=None)

    def postpone(self, duration_ns: int) -> None:
        """The process itself stood still: nobody could keep a lease alive, so all get that time back."""
        for state in self._leases.values():
            state.deadline_ns += duration_ns

    def apply(self, changes: Changes, now: int) -> None:
        """Make durable changes the content."""
        for lease in changes.leases_added:
            self._leases[lease.id] = _LeaseState(lease, now + lease.ttl_seconds * SECOND)
        for name in changes.deletes:
            self._forget(name)
            del self._names[bisect_left(self._names, name)]
        for kv in changes.puts:
            if kv.key in self._kvs:
                self._forget(kv.key)
            else:
                insort(self._names, kv.key)
            self._kvs[kv.key] = kv
            self._bytes += len(kv.key) + len(kv.value)
            if kv.lease in self._leases:
                self._leases[kv.lease].keys.add(kv.key)
        for lease_id in changes.leases_removed:
            del self._leases[lease_id]
        self.revision = changes.revision

    def _forget(self, name: bytes) -> None:
        kv = self._kvs.pop(name)
        self._bytes -= len(kv.key) + len(kv.value)
        if kv.lease in self._leases:
            self._leases[kv.lease].keys.discard(name)


def _check_key(key: bytes, range_end: bytes) -> None:
    if not key:
        raise StoreRefusal(INVALID, "etcdserver: key is not provided")
    if len(key) > KEY_BYTES_MAX or len(range_end) > KEY_BYTES_MAX:
        raise StoreRefusal(INVALID, f"etcdserver: a key exceeds {KEY_BYTES_MAX} bytes")

"""The witness's content against a naive oracle: a dict, and a full replay of every durable change."""

import contextlib
from typing import Any

import attrs
from hypothesis import given
from hypothesis import strategies as st

from clusterd.core.witness_store import (
    Changes,
    Compare,
    Delete,
    KeyValue,
    Lease,
    Put,
    Range,
    RangeResult,
    Relation,
    StoreRefusal,
    Target,
    WitnessStore,
)
from clusterd.core.witness_wire import read_txn
from daemonkit.units import SECOND

KEYS = st.sampled_from([b"a", b"a/1", b"a/2", b"b", b"c\xff"])
LEASES = st.integers(1, 3)
STEPS = st.one_of(
    st.tuples(st.just("put"), KEYS, st.binary(max_size=3), st.one_of(st.just(0), LEASES)),
    st.tuples(st.just("put-if-absent"), KEYS, st.binary(max_size=3), st.just(0)),
    st.tuples(st.just("delete"), KEYS, st.sampled_from([b"", b"\0", b"b"]), st.just(0)),
    st.tuples(st.just("grant"), LEASES, st.integers(1, 5), st.just(0)),
    st.tuples(st.just("revoke"), LEASES, st.just(b""), st.just(0)),
    st.tuples(st.just("keep"), LEASES, st.just(b""), st.just(0)),
    st.tuples(st.just("wait"), st.integers(0, 4), st.just(b""), st.just(0)),
)


@attrs.define
class Disk:
    """What SQLite would hold: every durable change, replayed."""

    revision: int = 1
    kvs: dict[bytes, KeyValue] = attrs.field(factory=dict)
    leases: dict[int, Lease] = attrs.field(factory=dict)

    def commit(self, changes: Changes) -> None:
        for name in changes.deletes:
            del self.kvs[name]
        for kv in changes.puts:
            self.kvs[kv.key] = kv
        for lease in changes.leases_added:
            self.leases[lease.id] = lease
        for lease_id in changes.leases_removed:
            del self.leases[lease_id]
        self.revision = changes.revision


def plan(store: WitnessStore, step: tuple[Any, ...], now: int) -> Changes | None:
    kind, subject, value, lease = step
    if kind == "put":
        return store.plan_txn((), (Put(subject, value, lease),), ()).changes
    if kind == "put-if-absent":
        absent = Compare(subject, Target.CREATE, Relation.EQUAL, 0)
        return store.plan_txn((absent,), (Put(subject, value),), ()).changes
    if kind == "delete":
        return store.plan_txn((), (Delete(subject, value),), ()).changes
    if kind == "grant":
        return store.plan_grant(subject, value)
    if kind == "revoke":
        return store.plan_revoke(subject)
    if kind == "keep":
        store.keep_alive(subject, now)
    return None


@given(st.lists(STEPS, max_size=40))
def test_content_is_what_was_made_durable_and_leases_end_on_time(steps: list[tuple[Any, ...]]) -> None:
    store, disk, now = WitnessStore(0), Disk(), 0
    deadlines: dict[int, int] = {}
    for step in steps:
        if step[0] == "wait":
            now += step[1] * SECOND
            due = {lease_id for lease_id, at in deadlines.items() if at <= now}
            changes = store.plan_expiry(now)
            assert set(changes.leases_removed) == due
            disk.commit(changes)
            store.apply(changes, now)
            deadlines = {lease_id: at for lease_id, at in deadlines.items() if lease_id not in due}
            assert not any(kv.lease in due for kv in disk.kvs.values())
        else:
            before = store.range(Range(b"\0", b"\0"))
            try:
                planned = plan(store, step, now)
            except StoreRefusal:
                assert store.range(Range(b"\0", b"\0")) == before
                continue
            assert store.range(Range(b"\0", b"\0")) == before, "a plan changes nothing"
            if planned is not None:
                assert planned.revision == disk.revision + bool(planned.puts or planned.deletes)
                disk.commit(planned)
                store.apply(planned, now)
            if step[0] in ("grant", "keep") and step[1] in disk.leases:
                deadlines[step[1]] = now + disk.leases[step[1]].ttl_seconds * SECOND
            deadlines.pop(step[1] if step[0] == "revoke" else -1, None)
        found = store.range(Range(b"\0", b"\0"))
        assert {kv.key: kv for kv in found.kvs} == disk.kvs
        assert [kv.key for kv in found.kvs] == sorted(disk.kvs)
        assert store.size_bytes == sum(len(kv.key) + len(kv.value) for kv in disk.kvs.values())
        assert store.next_deadline() == min(deadlines.values(), default=None)
        restarted = WitnessStore(
            now, revision=disk.revision, kvs=tuple(disk.kvs.values()), leases=tuple(disk.leases.values())
        )
        assert restarted.range(Range(b"\0", b"\0")) == found


@given(st.sets(KEYS), KEYS, st.sampled_from([b"", b"\0", b"b", b"a0"]), st.integers(0, 3))
def test_ranges(present: set[bytes], key: bytes, end: bytes, limit: int) -> None:
    store = WitnessStore(0)
    for name in sorted(present):
        store.apply(store.plan_txn((), (Put(name, b""),), ()).changes, 0)
    if end == b"":
        wanted = sorted(present & {key})
    else:
        wanted = sorted(name for name in present if name >= key and (end == b"\0" or name < end))
    result = store.range(Range(key, end, limit))
    assert isinstance(result, RangeResult)
    assert [kv.key for kv in result.kvs] == (wanted[:limit] if limit else wanted)
    assert result.count == len(wanted)
    assert result.more == (0 < limit < len(wanted))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["YQ==", "EQUAL", "CREATE"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["compare", "success", "failure", "request_put", "key", "value", "lease", "target"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_any_json_is_read_or_refused(document: Any) -> None:
    store = WitnessStore(0)
    with contextlib.suppress(StoreRefusal):
        compares, success, failure = read_txn(document)
        store.plan_txn(compares, success, failure)

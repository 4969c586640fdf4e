"""Carries a recovery's plan out in the store: a script of reads and guarded transactions.

    1. claim: ``recovering`` takes the place of ``id``. From here on the store is unknown to everybody.
    2. read everything; put what differs from the plan; delete what is not in it, after all puts. Again, until
       a read finds the plan and nothing else.
    3. ``id`` and ``recovered`` take the place of ``recovering``: now, and only now, it is complete.

Every transaction after the claim compares the revision of *our* claim and that no id is there: of two
recoveries the later claim wins and the earlier one's next transaction fails. A crash anywhere leaves a store
that is unknown, and the command is run again. A script yields effects and is sent their answers, so that the
shell runs it over HTTP and the simulator on its own store.
"""

from collections.abc import Generator
from typing import Final

import attrs

from clusterd.core import records
from clusterd.core.effects import Compare, Put, ReadStore, WriteStore
from clusterd.core.events import StoreEntry, StoreSnapshot, StoreWritten
from clusterd.core.recovery import Plan
from clusterd.core.store_identity import read_head
from clusterd.errors import Refused

Script = Generator[ReadStore | WriteStore, StoreSnapshot | StoreWritten, None]

OPERATIONS_MAX: Final = 100  # etcd takes 128 in a transaction
BATCH_BYTES_MAX: Final = 512 << 10  # the witness takes requests of 2 MiB, and base64 adds a third
ROUNDS_MAX: Final = 5  # others may still write once what they began before the claim
RACED: Final = (
    "another recovery, or another cluster, wrote to the store at the same time: look at 'clusterctl status',"
    " then run it again"
)


def rebuild(plan: Plan, prefix: str, entries: tuple[StoreEntry, ...], node: str, token: str) -> Script:
    """``entries``: what the plan was made from. Raises Refused where somebody else wrote."""
    mods = {entry.key[len(prefix) :]: entry.mod_revision for entry in entries}
    claim = _claim(plan, prefix, entries, node, token)
    guards = tuple(
        Compare(prefix + key, "mod", mods.get(key, 0)) for key in ("id", "recovering", "recovered", "epoch")
    )
    put = Put(prefix + "recovering", records.encode_record(claim))
    mine = yield from _write(guards, (put,), (prefix + "id",))
    held = (Compare(prefix + "recovering", "mod", mine), Compare(prefix + "id", "create", 0))
    for _ in range(ROUNDS_MAX):
        snapshot = yield ReadStore(0)
        assert isinstance(snapshot, StoreSnapshot)
        puts, deletes = _difference(plan, prefix, snapshot.entries)
        if not puts and not deletes:
            break
        for some in _batches(puts):
            yield from _write(held, some, ())
        for first in range(0, len(deletes), OPERATIONS_MAX):
            yield from _write(held, (), deletes[first : first + OPERATIONS_MAX])
    else:
        raise Refused(RACED)
    done = (
        Put(prefix + "id", records.encode_record(records.ClusterId(plan.store_id))),
        Put(prefix + "recovered", records.encode_record(records.Recovered(plan.number, token, node))),
    )
    yield from _write(held, done, (prefix + "recovering",))


def _claim(
    plan: Plan, prefix: str, entries: tuple[StoreEntry, ...], node: str, token: str
) -> records.Recovering:
    """It says what the store held, so that a recovery that follows an interrupted one can still use it."""
    head = read_head(prefix, entries)
    if head.id == plan.store_id:
        revision = max((entry.mod_revision for entry in entries), default=0)
        return records.Recovering(node, token, plan.store_id, head.recovery, revision)
    if head.recovering is not None:
        return attrs.evolve(head.recovering, node=node, token=token)
    return records.Recovering(node, token)


def _write(
    guards: tuple[Compare, ...], puts: tuple[Put, ...], deletes: tuple[str, ...]
) -> Generator[ReadStore | WriteStore, StoreSnapshot | StoreWritten, int]:
    written = yield WriteStore(0, guards, puts, deletes)
    assert isinstance(written, StoreWritten)
    if not written.succeeded:
        raise Refused(RACED)
    return written.revision


def _difference(
    plan: Plan, prefix: str, entries: tuple[StoreEntry, ...]
) -> tuple[list[Put], tuple[str, ...]]:
    there = {entry.key[len(prefix) :]: entry for entry in entries}
    puts = [
        Put(prefix + key, value)
        for key, value in sorted(plan.records.items())
        if key not in there or there[key].value != value or there[key].lease
    ]
    apart = ("recovering", "id")
    deletes = tuple(prefix + key for key in sorted(there) if key not in plan.records and key not in apart)
    return puts, deletes


def _batches(puts: list[Put]) -> Generator[tuple[Put, ...]]:
    batch: list[Put] = []
    size = 0
    for put in puts:
        length = len(put.key) + len(put.value)
        if batch and (len(batch) >= OPERATIONS_MAX or size + length > BATCH_BYTES_MAX):
            yield tuple(batch)
            batch, size = [], 0
        batch.append(put)
        size += length
    if batch:
        yield tuple(batch)

"""The core's store effects as calls of the store's client, and its answers as the core's events."""

from typing import Final

from clusterd.core import effects, events
from clusterd.core.witness_store import Compare, Delete, Put, Relation, Target
from clusterd.errors import StoreUnknown
from clusterd.shell.store import StoreClient

_TARGETS: Final = {"mod": Target.MOD, "create": Target.CREATE}


async def read_store(store: StoreClient, prefix: str, act: effects.ReadStore) -> events.StoreSnapshot:
    """Everything under ``prefix``. Raises StoreUnknown."""
    reply = await store.range_prefix(prefix.encode())
    try:
        entries = tuple(
            events.StoreEntry(kv.key.decode("utf-8"), kv.value, kv.create_revision, kv.mod_revision, kv.lease)
            for kv in reply.kvs
        )
    except UnicodeDecodeError as error:
        raise StoreUnknown(f"a key in the store is not text: {error}") from error
    return events.StoreSnapshot(act.request, reply.header.revision, entries)


async def write_store(store: StoreClient, act: effects.WriteStore) -> events.StoreWritten:
    """One guarded transaction. Raises StoreUnknown: then it may have been done or not."""
    compares = [
        Compare(compare.key.encode(), _TARGETS[compare.target], Relation.EQUAL, compare.revision)
        for compare in act.compares
    ]
    puts = [Put(put.key.encode(), put.value, put.lease) for put in act.puts]
    deletes = [Delete(key.encode()) for key in act.deletes]
    reply = await store.txn(compares, [*puts, *deletes])
    return events.StoreWritten(act.request, reply.succeeded, reply.header.revision)

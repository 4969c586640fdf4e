"""The witness's side of etcd v3's JSON gateway: requests into values, answers into plain data.

The gateway writes bytes as base64 and 64-bit numbers as text, takes numbers either way, and leaves out
whatever equals its default: a failed transaction has no ``succeeded``, an empty range no ``kvs``, a
keepalive of a dead lease no ``TTL``. The same is done here, so that the client meets one dialect.
An option that is not served is refused, never ignored: to ignore ``revision`` would be to lie.
"""

import base64
import binascii
from collections.abc import Iterable
from typing import Any, Final

from clusterd.core.witness_store import (
    INT64_MAX,
    INVALID,
    UNIMPLEMENTED,
    Compare,
    Delete,
    DeleteResult,
    KeyValue,
    Operation,
    OperationResult,
    Plan,
    Put,
    Range,
    RangeResult,
    Relation,
    StoreRefusal,
    Target,
)

Table = dict[str, Any]

_RANGE_KEYS: Final = ("key", "range_end", "limit", "keys_only", "count_only", "serializable")
_OPERAND_FIELDS: Final = {
    Target.VERSION: "version",
    Target.CREATE: "create_revision",
    Target.MOD: "mod_revision",
    Target.VALUE: "value",
    Target.LEASE: "lease",
}


def _table(value: Any, known: Iterable[str]) -> Table:
    if not isinstance(value, dict):
        raise StoreRefusal(INVALID, "json: expected an object")
    for name, given in value.items():
        if name not in known and given not in (None, 0, "0", "", False):
            raise StoreRefusal(UNIMPLEMENTED, f"the witness does not serve the option {name[:40]!r}")
    return value


def _list(table: Table, name: str) -> list[Any]:
    value = table.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise StoreRefusal(INVALID, f"json: {name} is not a list")
    return value


def _bytes(table: Table, name: str) -> bytes:
    value = table.get(name) or ""
    if not isinstance(value, str):
        raise StoreRefusal(INVALID, f"json: {name} is not base64 text")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise StoreRefusal(INVALID, f"json: {name} is not base64 text") from None


def read_int(table: Table, name: str) -> int:
    """A 64-bit number, as text or as a number; absent is 0. Raises StoreRefusal."""
    value = table.get(name) or 0
    if isinstance(value, str) and len(value) <= 20 and value.lstrip("-").isdecimal():
        value = int(value)
    if type(value) is not int or abs(value) > INT64_MAX:
        raise StoreRefusal(INVALID, f"json: {name} is not a 64-bit number")
    return value


def _bool(table: Table, name: str) -> bool:
    value = table.get(name) or False
    if not isinstance(value, bool):
        raise StoreRefusal(INVALID, f"json: {name} is not true or false")
    return value


def read_range(raw: Any) -> Range:
    """A range request. Raises StoreRefusal."""
    table = _table(raw, _RANGE_KEYS)
    return Range(
        _bytes(table, "key"),
        _bytes(table, "range_end"),
        max(0, read_int(table, "limit")),
        _bool(table, "keys_only"),
        _bool(table, "count_only"),
    )


def read_put(raw: Any) -> Put:
    """A put request. Raises StoreRefusal."""
    table = _table(raw, ("key", "value", "lease"))
    return Put(_bytes(table, "key"), _bytes(table, "value"), read_int(table, "lease"))


def _operation(raw: Any) -> Operation:
    table = _table(raw, ("request_range", "request_put", "request_delete_range"))
    given = [name for name in table if table[name] is not None]
    if len(given) != 1:
        raise StoreRefusal(INVALID, "json: an operation is exactly one request")
    body = table[given[0]]
    if given[0] == "request_range":
        return read_range(body)
    if given[0] == "request_put":
        return read_put(body)
    return read_delete(body)


def read_delete(raw: Any) -> Delete:
    """A delete request. Raises StoreRefusal."""
    table = _table(raw, ("key", "range_end"))
    return Delete(_bytes(table, "key"), _bytes(table, "range_end"))


def _compare(raw: Any) -> Compare:
    table = _table(raw, ("key", "target", "result", *_OPERAND_FIELDS.values()))
    try:
        target = Target(table.get("target") or "VERSION")
        relation = Relation(table.get("result") or "EQUAL")
    except ValueError:
        raise StoreRefusal(INVALID, "json: unknown target or result of a compare") from None
    field = _OPERAND_FIELDS[target]
    operand = _bytes(table, field) if target is Target.VALUE else read_int(table, field)
    return Compare(_bytes(table, "key"), target, relation, operand)


def read_txn(raw: Any) -> tuple[tuple[Compare, ...], tuple[Operation, ...], tuple[Operation, ...]]:
    """A transaction: its compares, and what to do on success and on failure. Raises StoreRefusal."""
    table = _table(raw, ("compare", "success", "failure"))
    return (
        tuple(_compare(item) for item in _list(table, "compare")),
        tuple(_operation(item) for item in _list(table, "success")),
        tuple(_operation(item) for item in _list(table, "failure")),
    )


def read_table(raw: Any, *known: str) -> Table:
    """An object with no other than the known keys. Raises StoreRefusal."""
    return _table(raw, known)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def sparse(table: Table) -> Table:
    """Without what equals its default, as the gateway writes it."""
    return {name: value for name, value in table.items() if value not in ("", "0", 0, False, None, [])}


def _kv(kv: KeyValue) -> Table:
    return sparse(
        {
            "key": _text(kv.key),
            "create_revision": str(kv.create_revision),
            "mod_revision": str(kv.mod_revision),
            "version": str(kv.version),
            "value": _text(kv.value),
            "lease": str(kv.lease),
        }
    )


def write_range(result: RangeResult) -> Table:
    """The answer to a range, without its header."""
    return sparse({"kvs": [_kv(kv) for kv in result.kvs], "more": result.more, "count": str(result.count)})


def _result(result: OperationResult, revision: int) -> Table:
    header = {"header": {"revision": str(revision)}}
    if isinstance(result, RangeResult):
        return {"response_range": header | write_range(result)}
    if isinstance(result, DeleteResult):
        return {"response_delete_range": header | sparse({"deleted": str(result.deleted)})}
    return {"response_put": header}


def write_txn(plan: Plan) -> Table:
    """The answer to a transaction, without its header."""
    revision = plan.changes.revision
    return sparse(
        {
            "succeeded": plan.succeeded,
            "responses": [_result(result, revision) for result in plan.results],
        }
    )

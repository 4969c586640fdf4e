"""The store's client: etcd v3 (>= 3.4) through its JSON gateway, or the witness, which speaks the same.

One rule covers every trouble: what is not a complete, well-formed answer within a second is
``StoreUnknown``, whether it was a refused connection, a timeout, an HTTP error, an error document under
status 200, or JSON that is not what was asked for. A write that ends so may or may not have happened;
only a later read tells. After an unknown answer the next call goes to the next endpoint.

Measured on etcd 3.4.23, and provided for here: a failed transaction omits ``succeeded``; a keepalive of a
dead lease answers 200 without ``TTL``; a member without a leader blocks for 7 s, then errs in several
shapes; 64-bit numbers are text; what equals its default is absent.
"""

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import attrs
import httpx
import trio

from clusterd.core.witness_store import (
    Compare,
    Delete,
    KeyValue,
    Operation,
    Put,
    Range,
    Target,
)
from clusterd.errors import StoreUnknown
from daemonkit.units import SECOND

CALL_SECONDS_MAX: Final = 1.0
ANSWER_BYTES_MAX: Final = 64 << 20
_INT64: Final = range(-(1 << 63), 1 << 64)

Table = dict[str, Any]
T = TypeVar("T")


@attrs.frozen
class Header:
    """Which store answered, and how far it was."""

    cluster_id: int
    revision: int


@attrs.frozen
class RangeReply:
    header: Header
    kvs: tuple[KeyValue, ...]


@attrs.frozen
class TxnReply:
    """``ranges`` holds the keys that each range among the performed operations found, in order."""

    header: Header
    succeeded: bool
    ranges: tuple[tuple[KeyValue, ...], ...]


@attrs.frozen
class GrantReply:
    header: Header
    lease_id: int
    ttl_ns: int


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _write_range(request: Range) -> Table:
    return {
        "key": _text(request.key),
        "range_end": _text(request.range_end),
        "limit": str(request.limit),
        "keys_only": request.keys_only,
        "count_only": request.count_only,
    }


def _write_operation(operation: Operation) -> Table:
    if isinstance(operation, Put):
        put = {"key": _text(operation.key), "value": _text(operation.value), "lease": str(operation.lease)}
        return {"request_put": put}
    if isinstance(operation, Delete):
        where = {"key": _text(operation.key), "range_end": _text(operation.range_end)}
        return {"request_delete_range": where}
    return {"request_range": _write_range(operation)}


def _write_compare(compare: Compare) -> Table:
    table: Table = {
        "key": _text(compare.key),
        "target": compare.target.value,
        "result": compare.relation.value,
    }
    if isinstance(compare.operand, bytes):
        table["value"] = _text(compare.operand)
    else:
        field = {
            Target.VERSION: "version",
            Target.CREATE: "create_revision",
            Target.MOD: "mod_revision",
            Target.LEASE: "lease",
        }[compare.target]
        table[field] = str(compare.operand)
    return table


def _number(table: Table, name: str) -> int:
    value = table.get(name, 0)
    number = int(value) if isinstance(value, str) and len(value) <= 20 else value
    if type(number) is not int or number not in _INT64:
        raise ValueError(f"{name} is not a number")
    return number


def _data(table: Table, name: str) -> bytes:
    return base64.b64decode(table.get(name, ""), validate=True)


def _header(table: Table) -> Header:
    header = table["header"]
    return Header(_number(header, "cluster_id"), _number(header, "revision"))


def _kvs(table: Table) -> tuple[KeyValue, ...]:
    return tuple(
        KeyValue(
            _data(kv, "key"),
            _data(kv, "value"),
            _number(kv, "create_revision"),
            _number(kv, "mod_revision"),
            _number(kv, "version"),
            _number(kv, "lease"),
        )
        for kv in table.get("kvs", [])
    )


def prefix_end(prefix: bytes) -> bytes:
    """The ``range_end`` of all keys that begin with ``prefix``."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else b"\0"


class StoreClient:
    """Calls on whichever endpoint answers. Every method raises StoreUnknown, nothing else, for trouble."""

    def __init__(self, endpoints: Sequence[str], *, seconds_max: float = CALL_SECONDS_MAX) -> None:
        self._endpoints = [endpoint.rstrip("/") for endpoint in endpoints]
        self._next = 0
        self._seconds_max = seconds_max
        # No proxy from the environment: the store is named by the configuration alone.
        self._http = httpx.AsyncClient(
            timeout=seconds_max,
            trust_env=False,
            limits=httpx.Limits(max_connections=16, max_keepalive_connections=8, keepalive_expiry=30),
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    @property
    def endpoint(self) -> str:
        """Where the next call goes."""
        return self._endpoints[self._next]

    async def _call(self, path: str, body: Table) -> Table:
        endpoint = self.endpoint
        try:
            with trio.fail_after(self._seconds_max):
                return _parse(await self._post(endpoint + path, body))
        except (trio.TooSlowError, httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            self._rotate(endpoint)
            reason = str(error) or type(error).__name__
            raise StoreUnknown(f"the store at {endpoint} did not answer: {reason}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error) as error:
            self._rotate(endpoint)
            raise StoreUnknown(f"the store at {endpoint} gave no usable answer: {error}") from error

    def _rotate(self, failed: str) -> None:
        # Calls run side by side: only the first that fails on an endpoint moves on from it.
        if self.endpoint == failed:
            self._next = (self._next + 1) % len(self._endpoints)

    async def _post(self, url: str, body: Table) -> bytes:
        data = bytearray()
        async with self._http.stream("POST", url, content=json.dumps(body)) as response:
            # Leaving the stream early closes it, so that an endless answer costs no more than its bound.
            async for chunk in response.aiter_bytes():
                data += chunk
                if len(data) > ANSWER_BYTES_MAX:
                    raise ValueError(f"an answer exceeds {ANSWER_BYTES_MAX} bytes")
            if response.status_code != httpx.codes.OK:
                raise ValueError(f"status {response.status_code}: {_error_text(bytes(data))}")
        return bytes(data)

    async def range(self, request: Range) -> RangeReply:
        """A linearizable read."""
        table = await self._call("/v3/kv/range", _write_range(request))
        return _read(lambda: RangeReply(_header(table), _kvs(table)))

    async def range_prefix(self, prefix: bytes) -> RangeReply:
        """A linearizable read of all keys that begin with ``prefix``."""
        return await self.range(Range(prefix or b"\0", prefix_end(prefix)))

    async def txn(
        self,
        compares: Sequence[Compare] = (),
        success: Sequence[Operation] = (),
        failure: Sequence[Operation] = (),
    ) -> TxnReply:
        """A transaction. A StoreUnknown may hide either outcome."""
        body = {
            "compare": [_write_compare(compare) for compare in compares],
            "success": [_write_operation(operation) for operation in success],
            "failure": [_write_operation(operation) for operation in failure],
        }
        table = await self._call("/v3/kv/txn", body)
        return _read(lambda: _read_txn(table))

    async def lease_grant(self, ttl_ns: int) -> GrantReply:
        """A new lease; its time is rounded up to whole seconds, and a store may grant more."""
        table = await self._call("/v3/lease/grant", {"TTL": str(-(-ttl_ns // SECOND))})

        def read() -> GrantReply:
            if not table.get("ID") or table.get("error"):
                raise ValueError(f"no lease was granted: {table.get('error', '')}")
            return GrantReply(_header(table), _number(table, "ID"), _number(table, "TTL") * SECOND)

        return _read(read)

    async def lease_keepalive(self, lease_id: int) -> int | None:
        """The time that the lease has from now on, or None: it is gone for good."""
        table = await self._call("/v3/lease/keepalive", {"ID": str(lease_id)})

        def read() -> int | None:
            result = table["result"]
            _header(result)
            ttl_ns = _number(result, "TTL") * SECOND
            return ttl_ns if ttl_ns > 0 else None

        return _read(read)

    async def lease_revoke(self, lease_id: int) -> None:
        """End the lease and delete its keys."""
        table = await self._call("/v3/lease/revoke", {"ID": str(lease_id)})
        _read(lambda: _header(table))

    async def status(self) -> tuple[Header, str]:
        """(header, version) of the endpoint asked. Not linearizable: says that it lives, not more."""
        table = await self._call("/v3/maintenance/status", {})
        return _read(lambda: (_header(table), str(table["version"])))


def _read(read: Callable[[], T]) -> T:
    try:
        return read()
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise StoreUnknown(f"the store gave no usable answer: {error!r}") from error


def _read_txn(table: Table) -> TxnReply:
    succeeded = table.get("succeeded", False)
    if not isinstance(succeeded, bool):
        raise TypeError("succeeded is not true or false")
    ranges = tuple(
        _kvs(response["response_range"])
        for response in table.get("responses", [])
        if "response_range" in response
    )
    return TxnReply(_header(table), succeeded, ranges)


def _parse(data: bytes) -> Table:
    # A stream (keepalive) may hold several documents, one a line: the first is the answer.
    lines = data.strip().splitlines()
    table = json.loads(lines[0]) if lines else None
    if not isinstance(table, dict):
        raise TypeError("not a JSON object")
    if "error" in table:
        raise ValueError(_error_text(data))
    return table


def _error_text(data: bytes) -> str:
    try:
        table = json.loads(data.strip().splitlines()[0])
        error = table.get("error", table)
        text = error.get("message", "") if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError, IndexError, RecursionError):
        text = data[:200].decode("utf-8", "replace")
    return " ".join(str(text)[:200].split())

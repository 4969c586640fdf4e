"""``clusterd witness``: the embedded store, one process that serves a subset of etcd v3's JSON gateway.

The content is ``core.witness_store``; this shell makes its plans durable in SQLite (WAL, every commit
synced) before it applies and answers them, one at a time. Reads and keepalives wait for no disk.
The clients are the same as an etcd's (``shell.store``); see docs/formats/store.md for the subset.
"""

import contextlib
import functools
import json
import os
import secrets
import signal
import socket
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import hypercorn.config
import hypercorn.trio
import structlog
import trio
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from clusterd.core.witness_store import (
    ALREADY_EXISTS,
    EXHAUSTED,
    FAILED_PRECONDITION,
    INVALID,
    NOT_FOUND,
    OUT_OF_RANGE,
    UNIMPLEMENTED,
    Changes,
    KeyValue,
    Lease,
    Plan,
    StoreRefusal,
    WitnessStore,
)
from clusterd.core.witness_wire import (
    Table,
    read_delete,
    read_int,
    read_put,
    read_range,
    read_table,
    read_txn,
    sparse,
    write_range,
    write_txn,
)
from daemonkit.durable import lock_file
from daemonkit.errors import OperatorError
from daemonkit.ports import Address, listening_failed
from daemonkit.service import notify_stopping
from daemonkit.units import MILLISECOND, SECOND

BODY_BYTES_MAX: Final = 2 << 20  # etcd takes 1.5 MiB of request, which base64 makes 2 MiB
EXPIRY_TICK_NS: Final = 250 * MILLISECOND
STALL_NS_MIN: Final = 200 * MILLISECOND
VERSION: Final = "3.4.0"
_UNAVAILABLE: Final = 14
_HTTP_STATUS: Final = {
    INVALID: 400,
    NOT_FOUND: 404,
    ALREADY_EXISTS: 409,
    EXHAUSTED: 429,
    FAILED_PRECONDITION: 400,
    OUT_OF_RANGE: 400,
    UNIMPLEMENTED: 501,
    _UNAVAILABLE: 503,
}
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS kv (
    key BLOB PRIMARY KEY, value BLOB NOT NULL, create_revision INTEGER NOT NULL,
    mod_revision INTEGER NOT NULL, version INTEGER NOT NULL, lease INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS lease (id INTEGER PRIMARY KEY, ttl_seconds INTEGER NOT NULL);
"""

log = structlog.get_logger("witness")


class Database:
    """The durable side. Its methods block; they are called in a thread, one at a time."""

    def __init__(self, path: Path) -> None:
        try:
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.executescript(_SCHEMA)
            # INSERT OR IGNORE: made once, when the store is created, and never again (S6).
            self._connection.execute(
                "INSERT OR IGNORE INTO meta VALUES ('cluster_id', ?), ('revision', 1)",
                (secrets.randbits(62) + 1,),
            )
        except sqlite3.OperationalError as error:
            # Full, unreadable, in use: what it holds may be sound, and must not be given up for that.
            raise OperatorError(f"{path}: the witness database cannot be opened: {error}") from error
        except sqlite3.Error as error:
            raise OperatorError(
                f"{path}: not a usable witness database: {error}; put the newest copy of it back"
                " (to the nodes an empty one is a foreign store; VMs go on running meanwhile)"
            ) from error

    def load(self, now: int) -> tuple[int, WitnessStore]:
        """(cluster id, content)."""
        execute = self._connection.execute
        meta = dict(execute("SELECT name, value FROM meta").fetchall())
        kvs = tuple(
            KeyValue(*row)
            for row in execute("SELECT key, value, create_revision, mod_revision, version, lease FROM kv")
        )
        leases = tuple(Lease(*row) for row in execute("SELECT id, ttl_seconds FROM lease"))
        return meta["cluster_id"], WitnessStore(now, revision=meta["revision"], kvs=kvs, leases=leases)

    def commit(self, changes: Changes) -> None:
        """All of it, durably, or (sqlite3.Error) nothing."""
        with self._transaction() as execute:
            for lease in changes.leases_added:
                execute("INSERT INTO lease VALUES (?, ?)", (lease.id, lease.ttl_seconds))
            for name in changes.deletes:
                execute("DELETE FROM kv WHERE key = ?", (name,))
            for kv in changes.puts:
                execute(
                    "INSERT OR REPLACE INTO kv VALUES (?, ?, ?, ?, ?, ?)",
                    (kv.key, kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease),
                )
            for lease_id in changes.leases_removed:
                execute("DELETE FROM lease WHERE id = ?", (lease_id,))
            execute("UPDATE meta SET value = ? WHERE name = 'revision'", (changes.revision,))

    @contextlib.contextmanager
    def _transaction(self) -> Any:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection.execute
            self._connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise

    def close(self) -> None:
        self._connection.close()


def _now() -> int:
    return int(trio.current_time() * SECOND)


class Witness:
    """Answers requests: plan, make durable, apply, answer."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._cluster_id, self._store = database.load(_now())
        self._writing = trio.Lock()
        self._limiter = trio.CapacityLimiter(1)
        self._member_id = self._cluster_id ^ 1

    def _header(self) -> Table:
        return {
            "cluster_id": str(self._cluster_id),
            "member_id": str(self._member_id),
            "revision": str(self._store.revision),
            "raft_term": "1",
        }

    async def _commit(self, plan: Callable[[], Changes]) -> None:
        async with self._writing:
            changes = plan()
            if changes.empty:
                return
            # Shielded through the thread (it cannot be cancelled): applied if and only if it is durable.
            try:
                await trio.to_thread.run_sync(self._database.commit, changes, limiter=self._limiter)
            except sqlite3.Error as error:
                log.warning("witness.commit_failed", error=str(error))
                raise StoreRefusal(_UNAVAILABLE, f"the witness cannot write: {error}") from error
            self._store.apply(changes, _now())

    async def range(self, body: Any) -> Table:
        return {"header": self._header(), **write_range(self._store.range(read_range(body)))}

    async def _txn(self, plan: Callable[[], Plan]) -> Plan:
        planned: list[Plan] = []

        def changes() -> Changes:
            planned.append(plan())
            return planned[0].changes

        await self._commit(changes)
        return planned[0]

    async def txn(self, body: Any) -> Table:
        compares, success, failure = read_txn(body)
        plan = await self._txn(lambda: self._store.plan_txn(compares, success, failure))
        return {"header": self._header(), **write_txn(plan)}

    async def put(self, body: Any) -> Table:
        put = read_put(body)
        await self._txn(lambda: self._store.plan_txn((), (put,), ()))
        return {"header": self._header()}

    async def delete_range(self, body: Any) -> Table:
        delete = read_delete(body)
        plan = await self._txn(lambda: self._store.plan_txn((), (delete,), ()))
        deleted = write_txn(plan)["responses"][0]["response_delete_range"].get("deleted", "0")
        return {"header": self._header(), **sparse({"deleted": deleted})}

    async def lease_grant(self, body: Any) -> Table:
        table = read_table(body, "TTL", "ID")
        ttl_seconds = read_int(table, "TTL")
        lease_id = read_int(table, "ID") or secrets.randbits(62) + 1
        await self._commit(lambda: self._store.plan_grant(lease_id, ttl_seconds))
        return {"header": self._header(), "ID": str(lease_id), "TTL": str(ttl_seconds)}

    async def lease_keepalive(self, body: Any) -> Table:
        lease_id = read_int(read_table(body, "ID"), "ID")
        ttl_seconds = self._store.keep_alive(lease_id, _now())
        answer = {"header": self._header(), **sparse({"ID": str(lease_id), "TTL": str(ttl_seconds or 0)})}
        return {"result": answer}

    async def lease_revoke(self, body: Any) -> Table:
        lease_id = read_int(read_table(body, "ID"), "ID")
        await self._commit(lambda: self._store.plan_revoke(lease_id))
        return {"header": self._header()}

    async def status(self, body: Any) -> Table:
        read_table(body)
        return {
            "header": self._header(),
            "version": VERSION,
            "dbSize": str(self._store.size_bytes),
            "leader": str(self._member_id),
            "raftIndex": str(self._store.revision),
            "raftTerm": "1",
        }

    async def expire(self) -> None:
        """End leases when their time is over; a stall of this process is given back to their owners."""
        expected = _now()
        while True:
            late = _now() - expected
            if late > STALL_NS_MIN:
                log.warning("witness.stalled", seconds=late / SECOND)
                self._store.postpone(late)
            with contextlib.suppress(StoreRefusal):  # logged; tried again at the next tick
                await self._commit(lambda: self._store.plan_expiry(_now()))
            deadline = self._store.next_deadline()
            expected = _now() + EXPIRY_TICK_NS
            if deadline is not None:
                expected = max(_now(), min(expected, deadline))
            await trio.sleep(max(1, expected - _now()) / SECOND)


async def _read_body(request: Request) -> Any:
    data, size_bytes = bytearray(), 0
    async with contextlib.aclosing(request.stream()) as chunks:
        async for chunk in chunks:
            # A little too much is read and dropped, so that the client gets to hear why; no more than that.
            size_bytes += len(chunk)
            if size_bytes <= BODY_BYTES_MAX:
                data += chunk
            elif size_bytes > 2 * BODY_BYTES_MAX:
                break
    if size_bytes > BODY_BYTES_MAX:
        raise StoreRefusal(INVALID, f"a request exceeds {BODY_BYTES_MAX} bytes")
    try:
        return json.loads(data or b"{}")
    except (ValueError, RecursionError):
        raise StoreRefusal(INVALID, "json: not a JSON document") from None


def _endpoint(answer: Callable[[Any], Awaitable[Table]]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return JSONResponse(await answer(await _read_body(request)))
        except StoreRefusal as refusal:
            text = {"error": str(refusal), "code": refusal.code, "message": str(refusal)}
            return JSONResponse(text, status_code=_HTTP_STATUS[refusal.code])
        except ClientDisconnect:
            return Response(status_code=499)

    return endpoint


async def _no_watch(body: Any) -> Table:
    del body
    raise StoreRefusal(UNIMPLEMENTED, "the witness does not serve watches; its clients read periodically")


def application(witness: Witness) -> Starlette:
    """The HTTP side; every path of the gateway that is served."""
    routes: dict[str, Callable[[Any], Awaitable[Table]]] = {
        "/v3/kv/range": witness.range,
        "/v3/kv/txn": witness.txn,
        "/v3/kv/put": witness.put,
        "/v3/kv/deleterange": witness.delete_range,
        "/v3/lease/grant": witness.lease_grant,
        "/v3/lease/keepalive": witness.lease_keepalive,
        "/v3/lease/revoke": witness.lease_revoke,
        "/v3/kv/lease/revoke": witness.lease_revoke,
        "/v3/maintenance/status": witness.status,
        "/v3/watch": _no_watch,
    }
    return Starlette(
        routes=[Route(path, _endpoint(answer), methods=["POST"]) for path, answer in routes.items()]
    )


def _bind(listen: Address) -> socket.socket:
    """Bound here and handed over, so that a port in use is a plain OSError and not a group of them."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            listen.host, listen.port, type=socket.SOCK_STREAM
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(where)
        except BaseException:
            bound.close()
            raise
    except OSError as error:
        raise listening_failed(listen, error) from error
    return bound


def _config(bound: socket.socket) -> hypercorn.config.Config:
    config = hypercorn.config.Config()
    config.bind = [f"fd://{bound.detach()}"]
    config.accesslog = None
    config.errorlog = None
    config.graceful_timeout = 0.2
    config.shutdown_timeout = 0.5
    config.keep_alive_timeout = 60
    return config


def _claim(data: Path) -> int:
    data.mkdir(parents=True, exist_ok=True)
    return lock_file(data / "lock")


async def serve_witness(
    data: Path, listen: Address, *, task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve until cancelled; started() gives the bound address. Raises OperatorError, one line."""
    lock = _claim(data)
    try:
        database = Database(data / "witness.sqlite3")
        try:
            await _serve(Witness(database), listen, task_status)
        finally:
            database.close()
    finally:
        os.close(lock)


async def _serve(witness: Witness, listen: Address, task_status: trio.TaskStatus[Address]) -> None:
    bound = _bind(listen)
    port = bound.getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(witness.expire)
        await nursery.start(hypercorn.trio.serve, application(witness), _config(bound))
        task_status.started(Address(listen.host, port))


async def run_witness(data: Path, listen: Address, announce: Callable[..., Any]) -> None:
    """Serve until SIGTERM or SIGINT; ``announce`` is called once with the bound address."""
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            bound = await nursery.start(functools.partial(serve_witness, data, listen))
            announce(control=str(bound), url=f"http://{bound}")
            await anext(signals)
            notify_stopping("the database is closed")
        nursery.cancel_scope.cancel(reason="signalled")

"""The store's contract, run against the witness always and against a real etcd where one is installed.

The client is the same for both; so whatever the witness gets wrong about etcd shows here.
"""

import contextlib
import shutil
import socket
import sqlite3
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from subprocess import DEVNULL

import httpx
import pytest
import trio

from clusterd.core.witness_store import (
    Changes,
    Compare,
    Delete,
    Put,
    Range,
    Relation,
    StoreRefusal,
    Target,
)
from clusterd.errors import StoreUnknown
from clusterd.shell.store import StoreClient, prefix_end
from clusterd.shell.witness import Database, Witness, serve_witness
from daemonkit.errors import OperatorError
from daemonkit.ports import Address
from daemonkit.units import SECOND

ETCD = shutil.which("etcd") or shutil.which("etcd", path="/usr/bin:/usr/sbin:/usr/local/bin")
DEADLINE_S = 20
ANY = Address("127.0.0.1", 0)


def absent(key: bytes) -> Compare:
    return Compare(key, Target.CREATE, Relation.EQUAL, 0)


@contextlib.asynccontextmanager
async def running_witness(data: Path) -> AsyncIterator[str]:
    async with trio.open_nursery() as nursery:
        address = await nursery.start(partial(serve_witness, data, ANY))
        try:
            yield f"http://{address}"
        finally:
            nursery.cancel_scope.cancel()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.asynccontextmanager
async def running_etcd(data: Path) -> AsyncIterator[str]:
    client, peer = f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"
    options = {
        "data-dir": str(data),
        "listen-client-urls": client,
        "advertise-client-urls": client,
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
        "initial-cluster": f"default={peer}",
    }
    argv = [ETCD or "etcd", *(f"--{name}={value}" for name, value in options.items())]
    process = await trio.lowlevel.open_process(argv, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
    try:
        await until_answering(client)
        yield client
    finally:
        process.kill()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + DEADLINE_S):
            await process.wait()


async def until_answering(url: str) -> None:
    store = StoreClient([url])
    try:
        await until(partial(answers, store))
    finally:
        await store.aclose()


async def answers(store: StoreClient) -> bool:
    try:
        await store.range(Range(b"probe"))
    except StoreUnknown:
        return False
    return True


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(DEADLINE_S):
        while not await condition():
            await trio.lowlevel.checkpoint()


@pytest.fixture(
    params=[
        "witness",
        pytest.param(
            "etcd",
            marks=[
                pytest.mark.interop,
                pytest.mark.skipif(ETCD is None, reason="no etcd here (Debian: etcd-server)"),
            ],
        ),
    ]
)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[StoreClient]:
    running = running_witness if request.param == "witness" else running_etcd
    async with running(tmp_path / "data") as url:
        client = StoreClient([url])
        try:
            yield client
        finally:
            await client.aclose()


async def test_a_guarded_transaction_writes_once(store: StoreClient) -> None:
    first = await store.txn([absent(b"k")], [Put(b"k", b"one")], [Range(b"k")])
    second = await store.txn([absent(b"k")], [Put(b"k", b"two")], [Range(b"k")])
    assert first.succeeded
    assert not second.succeeded
    (found,) = second.ranges[0]
    assert (found.value, found.version, found.create_revision) == (b"one", 1, found.mod_revision)
    assert found.mod_revision == first.header.revision == second.header.revision
    assert first.header.cluster_id == second.header.cluster_id != 0


async def test_revisions_versions_and_prefixes(store: StoreClient) -> None:
    await store.txn(success=[Put(b"p/a", b"1"), Put(b"p/b", b"2"), Put(b"q", b"3")])
    again = await store.txn(success=[Put(b"p/a", b"\x00\xff")])
    reply = await store.range_prefix(b"p/")
    assert [(kv.key, kv.value, kv.version) for kv in reply.kvs] == [
        (b"p/a", b"\x00\xff", 2),
        (b"p/b", b"2", 1),
    ]
    assert reply.kvs[0].mod_revision == again.header.revision == reply.header.revision
    assert reply.kvs[0].create_revision < reply.kvs[0].mod_revision
    limited = await store.range(Range(b"p/", prefix_end(b"p/"), limit=1))
    assert [kv.key for kv in limited.kvs] == [b"p/a"]
    everything = await store.range(Range(b"\0", b"\0", keys_only=True))
    assert [(kv.key, kv.value) for kv in everything.kvs] == [(b"p/a", b""), (b"p/b", b""), (b"q", b"")]


@pytest.mark.parametrize(
    ("compare", "holds"),
    [
        (Compare(b"k", Target.VALUE, Relation.EQUAL, b"v"), True),
        (Compare(b"k", Target.VALUE, Relation.NOT_EQUAL, b"v"), False),
        (Compare(b"k", Target.VALUE, Relation.LESS, b"w"), True),
        (Compare(b"missing", Target.VALUE, Relation.NOT_EQUAL, b"v"), False),
        (Compare(b"missing", Target.VERSION, Relation.EQUAL, 0), True),
        (Compare(b"missing", Target.MOD, Relation.LESS, 1), True),
        (Compare(b"k", Target.VERSION, Relation.EQUAL, 1), True),
        (Compare(b"k", Target.CREATE, Relation.GREATER, 0), True),
        (Compare(b"k", Target.LEASE, Relation.EQUAL, 0), True),
    ],
)
async def test_compares(store: StoreClient, compare: Compare, holds: bool) -> None:
    await store.txn(success=[Put(b"k", b"v")])
    assert (await store.txn([compare])).succeeded is holds


async def test_deletes_are_seen_within_the_transaction(store: StoreClient) -> None:
    await store.txn(success=[Put(b"d/1", b""), Put(b"d/2", b""), Put(b"e", b"")])
    reply = await store.txn(
        success=[
            Delete(b"d/", prefix_end(b"d/")),
            Range(b"d/", prefix_end(b"d/")),
            Put(b"f", b"x"),
            Range(b"f"),
        ]
    )
    assert reply.ranges[0] == ()
    assert [kv.value for kv in reply.ranges[1]] == [b"x"]
    assert [kv.key for kv in (await store.range(Range(b"\0", b"\0"))).kvs] == [b"e", b"f"]


async def test_a_key_put_twice_is_refused_and_nothing_happens(store: StoreClient) -> None:
    with pytest.raises(StoreUnknown, match="duplicate key"):
        await store.txn(success=[Put(b"k", b"1"), Put(b"k", b"2")])
    assert (await store.range(Range(b"k"))).kvs == ()


async def test_a_revoked_lease_takes_its_keys_along(store: StoreClient) -> None:
    grant = await store.lease_grant(30 * SECOND)
    assert grant.ttl_ns == 30 * SECOND
    await store.txn(success=[Put(b"present", b"n1", grant.lease_id)])
    (found,) = (await store.range(Range(b"present"))).kvs
    assert found.lease == grant.lease_id
    assert await store.lease_keepalive(grant.lease_id) == 30 * SECOND
    await store.lease_revoke(grant.lease_id)
    assert (await store.range(Range(b"present"))).kvs == ()
    assert await store.lease_keepalive(grant.lease_id) is None
    with pytest.raises(StoreUnknown, match="lease not found"):
        await store.lease_revoke(grant.lease_id)
    with pytest.raises(StoreUnknown, match="lease not found"):
        await store.txn(success=[Put(b"present", b"n1", grant.lease_id)])


@pytest.mark.slow
async def test_a_lease_that_nobody_keeps_alive_ends(store: StoreClient) -> None:
    grant = await store.lease_grant(1)  # rounded up; etcd itself raises it to its own minimum
    await store.txn(success=[Put(b"present", b"n1", grant.lease_id), Put(b"stays", b"")])

    async def gone() -> bool:
        return not (await store.range(Range(b"present"))).kvs

    await until(gone)
    assert (await store.range(Range(b"stays"))).kvs
    assert await store.lease_keepalive(grant.lease_id) is None


async def test_status(store: StoreClient) -> None:
    header, version = await store.status()
    assert header.cluster_id == (await store.range(Range(b"k"))).header.cluster_id
    assert version.startswith("3.")


async def test_the_witness_remembers_and_gives_leases_their_time_again(tmp_path: Path) -> None:
    async def session(url: str) -> StoreClient:
        return StoreClient([url])

    async with running_witness(tmp_path) as url:
        before = await session(url)
        grant = await before.lease_grant(60 * SECOND)
        written = await before.txn(success=[Put(b"a", b"1", grant.lease_id), Put(b"b", b"2")])
        await before.aclose()
    async with running_witness(tmp_path) as url:
        after = await session(url)
        reply = await after.range_prefix(b"")
        assert [(kv.key, kv.lease) for kv in reply.kvs] == [(b"a", grant.lease_id), (b"b", 0)]
        assert reply.header == written.header
        assert await after.lease_keepalive(grant.lease_id) == 60 * SECOND
        await after.aclose()


async def test_two_witnesses_on_one_directory_and_a_port_in_use(tmp_path: Path) -> None:
    async with running_witness(tmp_path / "one") as url:
        with pytest.raises(OperatorError, match="in use by another process"):
            await serve_witness(tmp_path / "one", ANY)
        address = Address.parse(url.removeprefix("http://"))
        with pytest.raises(OperatorError, match="cannot listen"):
            await serve_witness(tmp_path / "two", address)


class FullDatabase(Database):
    """A database whose next commits fail, as on a full disk."""

    failing = False

    def commit(self, changes: Changes) -> None:
        if self.failing:
            raise sqlite3.OperationalError("database or disk is full")
        super().commit(changes)


async def test_what_cannot_be_made_durable_is_not_seen_either(tmp_path: Path) -> None:
    with contextlib.closing(FullDatabase(tmp_path / "witness.sqlite3")) as database:
        witness = Witness(database)
        put = {"success": [{"request_put": {"key": "aw==", "value": "MQ=="}}]}
        before = await witness.range({"key": "aw=="})
        database.failing = True
        with pytest.raises(StoreRefusal, match="cannot write"):
            await witness.txn(put)
        assert await witness.range({"key": "aw=="}) == before
        database.failing = False
        await witness.txn(put)
        assert (await witness.range({"key": "aw=="}))["kvs"][0]["value"] == "MQ=="


async def test_a_damaged_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "witness.sqlite3").write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(OperatorError, match="not a usable witness database"):
        await serve_witness(tmp_path, ANY)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v3/kv/range", b"{", 400),
        ("/v3/kv/range", b"[]", 400),
        ("/v3/kv/range", b"{}", 400),
        ("/v3/kv/range", b'{"key": "!"}', 400),
        ("/v3/kv/range", b'{"key": "YQ==", "revision": "3"}', 501),
        ("/v3/kv/range", b"[" * 100_000, 400),
        ("/v3/kv/txn", b'{"compare": {}}', 400),
        ("/v3/kv/txn", b'{"compare": [{"key": "YQ==", "target": "NONSENSE"}]}', 400),
        ("/v3/kv/txn", b'{"success": [{}]}', 400),
        ("/v3/lease/grant", b'{"TTL": "-1"}', 400),
        ("/v3/lease/grant", b'{"TTL": "99999999999999999999999"}', 400),
        ("/v3/watch", b"{}", 501),
        ("/v3/nonsense", b"{}", 404),
        ("/v3/kv/txn", b" " * (3 << 20), 400),
    ],
)
async def test_nonsense_is_refused_and_the_witness_lives(
    tmp_path: Path, path: str, body: bytes, status: int
) -> None:
    async with running_witness(tmp_path) as url, httpx.AsyncClient(trust_env=False) as http:
        answer = await http.post(url + path, content=body)
        assert answer.status_code == status
        assert (await http.post(url + "/v3/maintenance/status", content=b"{}")).status_code == 200


async def serve_answers(answers: list[bytes], task_status: trio.TaskStatus[str]) -> None:
    """A peer that answers each connection with the next of the given bytes, then with silence."""

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some(65536)
            if answers:
                await stream.send_all(answers.pop(0))
            else:
                await trio.sleep_forever()

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    task_status.started(f"http://127.0.0.1:{listener.socket.getsockname()[1]}")
    await trio.serve_listeners(answer, [listener])


def http_answer(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        http_answer(b""),
        http_answer(b"null"),
        http_answer(b"{}"),
        http_answer(b'{"header": {}}'[:-2]),
        http_answer(b'{"header": {"cluster_id": "x"}}'),
        http_answer(b'{"header": {"cluster_id": "1", "revision": "1"}, "kvs": [1]}'),
        http_answer(b'{"header": {"cluster_id": "1", "revision": "1"}, "kvs": [{"key": "!"}]}'),
        http_answer(b'{"error": "etcdserver: no leader", "code": 14}'),
        http_answer(b'{"error": {"grpc_code": 14, "message": "etcdserver: no leader"}}'),
        http_answer(b'{"error": "etcdserver: request timed out"}', "503 Service Unavailable"),
        http_answer(b"<html>", "404 Not Found"),
    ],
)
async def test_every_error_shape_is_unknown(answer: bytes) -> None:
    async with trio.open_nursery() as nursery:
        url = await nursery.start(serve_answers, [answer])
        client = StoreClient([url])
        with pytest.raises(StoreUnknown):
            await client.range(Range(b"k"))
        await client.aclose()
        nursery.cancel_scope.cancel()


async def test_a_silent_endpoint_is_given_up_and_the_next_one_asked(tmp_path: Path) -> None:
    async with running_witness(tmp_path) as url, trio.open_nursery() as nursery:
        silent = await nursery.start(serve_answers, [])
        client = StoreClient([silent, url], seconds_max=0.2)
        with pytest.raises(StoreUnknown, match="did not answer"):
            await client.range(Range(b"k"))
        await until(partial(answers, client))
        await client.aclose()
        nursery.cancel_scope.cancel()


def test_prefix_end() -> None:
    assert prefix_end(b"a/") == b"a0"
    assert prefix_end(b"a\xff\xff") == b"b"
    assert prefix_end(b"\xff") == b"\0"

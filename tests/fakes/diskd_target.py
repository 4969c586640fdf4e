"""A target in this process, a proxy that swallows an answer, and exceptions that come in groups."""

import contextlib

import trio

from daemonkit.ports import Address
from daemonkit.rpc import Registry
from daemonkit.rpc import serve as serve_rpc
from diskd.core.stream import StreamDecoder, StreamEncoder
from diskd.core.stream_frames import scan
from diskd.shell.export import prepare_blocking
from diskd.shell.producing import BUFFER_BYTES, Producers
from diskd.shell.repository import open_repository
from diskd.shell.target import Target


def leaves(error):
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]


class RaisesLeaf:
    """pytest.raises for an exception that may come wrapped in groups."""

    def __init__(self, kind, match=""):
        self.kind, self.match, self.said = kind, match, ""

    def __enter__(self):
        return self

    def __exit__(self, _type, error, _traceback):
        assert error is not None, "nothing was raised"
        if isinstance(error, trio.Cancelled):
            return False
        found = leaves(error)
        self.said = "; ".join(str(leaf) for leaf in found)
        assert any(isinstance(leaf, self.kind) and self.match in str(leaf) for leaf in found), found
        return True


async def start_target(nursery, root, address=None, files=None):
    """(address, a function that stops it)."""
    scope = trio.CancelScope()
    stopped = trio.Event()

    async def run(*, task_status=trio.TASK_STATUS_IGNORED):
        with scope, open_repository(root, files) as repository:
            registry = Registry()
            Target(repository).register(registry)
            await serve_rpc(registry, address or Address("127.0.0.1", 0), task_status=task_status)
        stopped.set()

    bound = await nursery.start(run)

    async def stop():
        scope.cancel()
        await stopped.wait()

    return bound, stop


async def start_deaf_proxy(nursery, target):
    """Forwards; while ``swallow`` is not empty it cuts the connection when the target says Committed."""
    swallow = []

    async def forward(source, sink, look):
        async for data in source:
            if look and swallow and b"committed" in data:
                return
            await sink.send_all(data)

    async def handle(client):
        try:
            server = await trio.open_tcp_stream(target.host, target.port)
        except OSError:
            return  # The target has gone as well.
        async with server, trio.open_nursery() as inner:

            async def both(source, sink, look):
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await forward(source, sink, look)
                inner.cancel_scope.cancel()

            inner.start_soon(both, client, server, False)
            inner.start_soon(both, server, client, True)

    listeners = await nursery.start(trio.serve_tcp, handle, 0)
    port = listeners[0].socket.getsockname()[1]
    return Address("127.0.0.1", port), swallow


def interleaved(parts, chance):
    """The frames of each disk in order, those of different disks shuffled."""
    waiting = [list(reversed(part)) for part in parts if part]
    while waiting:
        chosen = chance.choice(waiting)
        yield chosen.pop()
        waiting = [part for part in waiting if part]


def stream_of(frozen, base=None, *, chance=None, compress_level=0):
    """(bytes, events, opening) of the whole export of a frozen VM. ``chance``: shuffles the disks' frames,
    which come disk by disk without it."""
    prepared = prepare_blocking(frozen, base)
    encoder = StreamEncoder(prepared.header)
    producers = Producers(prepared, encoder)
    producers.begin(compress_level)
    parts, buffer = [], bytearray(BUFFER_BYTES)
    for producer in producers.disks:
        parts.append([])
        while not producer.is_done:
            batch = producer.fill(buffer)
            data = bytes(buffer[: batch.used])
            while data:
                found = scan(memoryview(data))
                ends = [*found.starts[1:], found.used]
                parts[-1] += [data[a:b] for a, b in zip(found.starts, ends, strict=True)]
                data = data[found.used :]
    frames = interleaved(parts, chance) if chance else (frame for part in parts for frame in part)
    return taken_apart(b"".join([encoder.opening, *frames, encoder.finish()]))


def taken_apart(data):
    """(bytes, events, opening) of a stream."""
    decoder = StreamDecoder()
    decoder.feed(data)
    events = []
    while (event := decoder.next_event()) is not None:
        events.append(event)
    return data, events, decoder.opening


def receive_all(repository, stream):
    """What the target does with an export, in this thread; the manifest."""
    _, events, opening = stream
    incoming = repository.receive(events[0], opening)
    try:
        for event in events[1:-1]:
            incoming.frame(event)
        manifest = incoming.commit(
            events[-1],
            source_digest=events[-1].digest.hex(),
            committed_at="2026-01-01T00:00:00+00:00",
            poll=lambda: None,
        )
        incoming.publish()
    except Exception:
        incoming.discard()
        raise
    return manifest

"""A proxy before a target that cuts connections after so many bytes, or falls silent."""

import contextlib

import trio

from daemonkit.ports import Address


class CuttingProxy:
    """Forwards; a connection that has carried its share of bytes to the target is cut."""

    def __init__(self, target, shares):
        self.target, self.shares = target, list(shares)
        self.carried = []
        self.pause_at = None  # silence from there on

    async def serve(self, nursery):
        listeners = await nursery.start(trio.serve_tcp, self._handle, 0)
        return Address("127.0.0.1", listeners[0].socket.getsockname()[1])

    async def _handle(self, client):
        try:
            server = await trio.open_tcp_stream(self.target.host, self.target.port)
        except OSError:
            return
        number = len(self.carried)
        self.carried.append(0)
        async with server, trio.open_nursery() as both:

            async def forward(source, sink, counted):
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    async for data in source:
                        await sink.send_all(data)
                        if counted:
                            limit = self.pause_at or float("inf")
                            while self.carried[number] >= limit:  # noqa: ASYNC110 - silent for good
                                await trio.sleep(0.01)
                            self.carried[number] += len(data)
                            if self.shares and self.carried[number] >= self.shares[0]:
                                self.shares.pop(0)
                                break
                both.cancel_scope.cancel()

            both.start_soon(forward, client, server, True)
            both.start_soon(forward, server, client, False)

"""Bulk data over a connection, moved by a worker thread in large pieces.

The loop of a daemon serves guests, or many exports at once. Copying a megabyte into or out of a socket takes
150 to 300 µs, so that it belongs in a thread, where the interpreter's lock is not held meanwhile. The thread
works on a duplicate of the socket; the other direction of the connection stays with the loop.

All that blocks here is for worker threads started by trio, and ends with ``trio.Cancelled`` soon after the
caller was cancelled.
"""

from typing import Final

import trio

from daemonkit.errors import InvariantBroken
from daemonkit.rpc import HandedOver

# How soon a thread that waits for its peer notices that it has been cancelled.
_WAIT_SECONDS: Final = 0.25
# A receiver that has something gives it away when nothing more has come for so long.
_PAUSE_SECONDS: Final = 0.002


class BulkSocket:
    """One direction of a connection. ``close`` leaves the connection itself open."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        if not isinstance(stream, HandedOver):
            raise InvariantBroken("bulk data goes over connections that a stream method was given")
        self._stream = stream
        self._socket = stream.duplicate()

    def __enter__(self) -> "BulkSocket":
        return self

    def __exit__(self, *_error: object) -> None:
        self._socket.close()

    def take_rest(self) -> bytes:
        """What the loop has read already and nobody has taken: it comes before what is received here."""
        return self._stream.take_rest()

    def send_blocking(self, data: memoryview) -> None:
        """All of it. Raises OSError."""
        self._socket.settimeout(_WAIT_SECONDS)
        while data:
            trio.from_thread.check_cancelled()
            try:
                data = data[self._socket.send(data) :]
            except TimeoutError:
                continue

    def receive_blocking(self, buffer: memoryview) -> int:
        """At least one byte, then what follows without a pause, as far as there is room. 0 at the end of the
        stream. Raises OSError."""
        filled = 0
        self._socket.settimeout(_WAIT_SECONDS)
        while filled < len(buffer):
            # Every time: from a peer that drips there is always something, and nobody could end it.
            trio.from_thread.check_cancelled()
            try:
                count = self._socket.recv_into(buffer[filled:])
            except TimeoutError:
                if filled:
                    break
                continue
            if count == 0:
                break
            if not filled:
                self._socket.settimeout(_PAUSE_SECONDS)
            filled += count
        return filled

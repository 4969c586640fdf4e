"""Long connections on which nothing may be said for hours, and peers that go without a goodbye."""

import contextlib
import socket
from typing import Final, Protocol

# Then the kernel asks, and again every 75 s; after nine questions without an answer the connection is broken.
_IDLE_SECONDS: Final = 60


class _Tunable(Protocol):
    """A socket, or trio's stream over one."""

    def setsockopt(self, level: int, option: int, value: int, /) -> None: ...


def notice_lost_peer(connection: _Tunable) -> None:
    """Have a TCP connection break, within 13 minutes, when the peer's host is gone: one that loses power says
    nothing, and who only listens would wait for ever. Shorter cuts of the network it survives."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_SECONDS)

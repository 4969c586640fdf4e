"""Heartbeats on the wire: one unconnected UDP socket per network, every error a loss.

Sending and reading are plain non-blocking calls, made in the loop's own step: nothing here waits for a
disk, a name service, a log or a peer. Sockets stay unconnected, since a connected one raises the ICMP
errors of one dead peer at every other call; addresses are numeric, so that nothing is ever resolved.
Received datagrams wait in a bounded mailbox; when it is full the oldest is dropped, being worth least.
"""

import contextlib
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import structlog
import trio

from daemonkit.errors import OperatorError
from daemonkit.ports import Address

DATAGRAM_BYTES_MAX: Final = 2048  # heartbeats stay under 1,400; a longer one is cut off and fails its MAC
MAILBOX_DATAGRAMS_MAX: Final = 4096  # 64 nodes, 4 networks, 16 intervals
DRAIN_DATAGRAMS_MAX: Final = 8192
RECEIVE_BUFFER_BYTES: Final = 1 << 20

log = structlog.get_logger("udp")


class Heartbeats:
    """The sockets of all networks. ``wake`` is called when the mailbox has gained something."""

    def __init__(
        self,
        listen: Mapping[str, Address],
        peers: Mapping[str, Sequence[Address]],
        wake: Callable[[], None],
    ) -> None:
        """``peers``: network -> the addresses of all peers on it. Raises OperatorError, one line."""
        self._wake = wake
        self._peers = {
            network: [(address.host, address.port) for address in addresses]
            for network, addresses in peers.items()
        }
        self.mailbox: deque[tuple[str, bytes]] = deque(maxlen=MAILBOX_DATAGRAMS_MAX)
        self.dropped = 0
        self.sends_lost = 0
        self._sockets: dict[str, socket.socket] = {}
        try:
            for network, address in listen.items():
                self._sockets[network] = _open(network, address)
        except BaseException:
            self.close()
            raise

    @property
    def addresses(self) -> dict[str, str]:
        """network -> the bound address."""
        return {network: str(Address(*bound.getsockname()[:2])) for network, bound in self._sockets.items()}

    def close(self) -> None:
        for opened in self._sockets.values():
            opened.close()

    def send(self, data: bytes) -> None:
        """Once to every peer on every network."""
        for network, addresses in self._peers.items():
            sender = self._sockets[network]
            for address in addresses:
                try:
                    sender.sendto(data, address)
                except OSError:
                    # Unreachable, filtered, too long, buffer full: to the peers it is all the same, a loss.
                    self.sends_lost += 1

    def drain(self) -> None:
        """Read whatever the kernel holds into the mailbox, now."""
        for network, receiver in self._sockets.items():
            for _ in range(DRAIN_DATAGRAMS_MAX):
                try:
                    data, _sender = receiver.recvfrom(DATAGRAM_BYTES_MAX)
                except OSError:  # nothing there, or an ICMP error of some peer
                    break
                self.dropped += len(self.mailbox) == MAILBOX_DATAGRAMS_MAX
                self.mailbox.append((network, data))

    async def receive(self) -> None:
        """Move datagrams into the mailbox until cancelled."""
        async with trio.open_nursery() as nursery:
            for receiver in self._sockets.values():
                nursery.start_soon(self._receive, receiver)

    async def _receive(self, receiver: socket.socket) -> None:
        while True:
            with contextlib.suppress(OSError):
                await trio.lowlevel.wait_readable(receiver)
            self.drain()
            self._wake()
            # A flood must not keep the other tasks from their turn.
            await trio.lowlevel.checkpoint()


def _open(network: str, address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        opened.setblocking(False)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        opened.bind((address.host, address.port))
    except OSError as error:
        opened.close()
        raise OperatorError(
            f"network {network}: cannot listen on {address}: {error.strerror or error}"
        ) from error
    except BaseException:
        opened.close()
        raise
    return opened

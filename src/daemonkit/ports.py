"""Network addresses as text, and the ports through which pure code meets the outside world."""

import errno
import ipaddress
from typing import Protocol

import attrs

from daemonkit.errors import OperatorError

_LISTEN_REMEDIES = {
    errno.EADDRINUSE: "another process listens there (ss -ltnp tells which): end it, or choose another port",
    errno.EADDRNOTAVAIL: "this host has no such address (ip address tells which it has)",
    errno.EACCES: "ports below 1024 are kept for root: choose a higher one",
}


def listening_failed(address: object, error: OSError) -> OperatorError:
    """Why an address cannot be listened on, and what to do about it."""
    remedy = _LISTEN_REMEDIES.get(error.errno or 0)
    reason = error.strerror or str(error)
    return OperatorError(f"cannot listen on {address}: {reason}{': ' + remedy if remedy else ''}")


class Clock(Protocol):
    """Monotonic time in integer nanoseconds; its zero means nothing."""

    def now_ns(self) -> int: ...


@attrs.frozen(order=True)
class Address:
    """``HOST:PORT``, ``[v6]:PORT``. Port 0 asks the system for a free one where listening."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False  # a name: whatever it begins with, it may lead anywhere

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Raises OperatorError with the expected form."""
        host, colon, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            colon = ""
        if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise OperatorError(f"{text!r} is not an address: write HOST:PORT, for example 127.0.0.1:7100")
        return cls(host, int(port))

"""Sockets that whoever started us had opened already: systemd's protocol (sd_listen_fds), and inetd's.

systemd's: LISTEN_PID is our process id, LISTEN_FDS how many listening sockets there are, from descriptor 3
on. nbdkit, libnbd and nbdcopy's `[ COMMAND ]` speak it as well. inetd's: standard input is a connection.
"""

import os
import socket
from collections.abc import Mapping
from typing import Final

from daemonkit.errors import OperatorError

_FIRST_DESCRIPTOR: Final = 3
# One for each address family and transport would be a handful.
_LISTENERS_MAX: Final = 16


def inherited_listeners(environment: Mapping[str, str]) -> list[socket.socket]:
    """The listening sockets meant for this process, none of them for its children. Raises OperatorError."""
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return []
    text = environment.get("LISTEN_FDS", "")
    if not text.isdecimal() or not 1 <= int(text) <= _LISTENERS_MAX:
        raise OperatorError(f"LISTEN_FDS={text!r}: expected 1 to {_LISTENERS_MAX} sockets")
    return [
        _inherited(descriptor, listening=True, what=f"LISTEN_FDS: descriptor {descriptor}")
        for descriptor in range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + int(text))
    ]


def inherited_connection() -> socket.socket:
    """Standard input as a connection. Raises OperatorError where it is none."""
    return _inherited(os.dup(0), listening=False, what="standard input")


def _inherited(descriptor: int, *, listening: bool, what: str) -> socket.socket:
    wanted = "a listening socket" if listening else "a connected socket"
    try:
        os.set_inheritable(descriptor, False)
        sock = socket.socket(fileno=descriptor)
    except OSError as error:
        raise OperatorError(f"{what} is not {wanted}") from error
    accepts = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
    if sock.type != socket.SOCK_STREAM or accepts != listening:
        sock.close()
        raise OperatorError(f"{what} is not {wanted}")
    sock.setblocking(False)
    return sock

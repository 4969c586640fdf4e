"""Do any of the reference addresses answer a ping? Asked on a tie, to tell "alone" from "cut off".

An ICMP echo through an unprivileged datagram socket where the kernel allows it (net.ipv4.ping_group_range),
else through a raw one, which root may open. Where neither is allowed, nothing answers.
"""

import ipaddress
import os
import socket
import struct
from collections.abc import Sequence
from typing import Final

import structlog
import trio

ANSWER_SECONDS_MAX: Final = 1.5
_ECHO: Final = {4: 8, 6: 128}

log = structlog.get_logger("references")


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _echo(version: int, token: bytes) -> bytes:
    head = struct.pack(">BBHHH", _ECHO[version], 0, 0, os.getpid() & 0xFFFF, 1)
    # Over IPv6 the kernel fills the checksum in, since it covers the addresses.
    sum_ = checksum(head + token) if version == 4 else 0
    return head[:2] + struct.pack(">H", sum_) + head[4:] + token


def _open(version: int) -> trio.socket.SocketType:
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    protocol = socket.IPPROTO_ICMP if version == 4 else socket.IPPROTO_ICMPV6
    try:
        return trio.socket.socket(family, socket.SOCK_DGRAM, protocol)
    except OSError:
        return trio.socket.socket(family, socket.SOCK_RAW, protocol)


async def _answers(text: str) -> bool:
    address = ipaddress.ip_address(text)
    token = os.urandom(16)
    try:
        with _open(address.version) as pinger:
            await pinger.sendto(_echo(address.version, token), (text, 0))
            while True:
                data, _ = await pinger.recvfrom(2048)
                # A raw socket also sees our own request where we ping ourselves: that is no answer.
                if data.endswith(token) and data[-len(token) - 8] != _ECHO[address.version]:
                    return True
    except OSError as error:
        log.info("reference.not_asked", address=text, reason=error.strerror)
        return False


async def any_answers(addresses: Sequence[str]) -> bool:
    """True as soon as one answers; False when none does in time."""
    found = False

    async def ask(text: str) -> None:
        nonlocal found
        if await _answers(text):
            found = True
            nursery.cancel_scope.cancel(reason="one answer is enough")

    with trio.move_on_after(ANSWER_SECONDS_MAX):
        async with trio.open_nursery() as nursery:
            for text in addresses:
                nursery.start_soon(ask, text)
    return found

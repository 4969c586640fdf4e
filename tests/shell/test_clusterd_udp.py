"""Heartbeats over real sockets: what is lost is lost quietly, what is there is read at once."""

import contextlib
import socket

import pytest
import trio

from clusterd.shell.udp import DATAGRAM_BYTES_MAX, MAILBOX_DATAGRAMS_MAX, Heartbeats
from daemonkit.errors import OperatorError
from daemonkit.ports import Address

ANY = Address("127.0.0.1", 0)
DEADLINE_S = 20


def nothing() -> None:
    """Nobody waits."""


@contextlib.contextmanager
def sender(*peers: Address):
    heartbeats = Heartbeats({"a": ANY}, {"a": peers}, nothing)
    with contextlib.closing(heartbeats):
        yield heartbeats


async def test_a_datagram_reaches_every_peer_and_wakes_its_loop() -> None:
    woken = trio.Event()
    receiver = Heartbeats({"a": ANY, "b": ANY}, {}, woken.set)
    with contextlib.closing(receiver):
        addresses = [Address.parse(receiver.addresses[network]) for network in ("a", "b")]
        with sender(*addresses) as one:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receiver.receive)
                one.send(b"beat")
                with trio.fail_after(DEADLINE_S):
                    while len(receiver.mailbox) < 2:
                        await woken.wait()
                        await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
    assert sorted(receiver.mailbox) == [("a", b"beat"), ("b", b"beat")]


async def test_a_dead_peer_an_unroutable_one_and_an_oversized_datagram_are_losses() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as closed:
        closed.bind(("127.0.0.1", 0))
        dead = Address(*closed.getsockname())
    alive = Heartbeats({"a": ANY}, {}, nothing)
    with contextlib.closing(alive):
        peers = (dead, Address("255.255.255.255", 9), Address.parse(alive.addresses["a"]))
        with sender(*peers) as one:
            for _ in range(20):
                one.send(b"beat")
                one.drain()  # an ICMP error of the dead peer must not hide what others sent
            one.send(b"x" * 70_000)
            assert one.sends_lost >= 20 + 3
            alive.drain()
    assert list(alive.mailbox) == [("a", b"beat")] * 20


async def test_what_waited_during_a_stall_is_drained_at_once() -> None:
    late = Heartbeats({"a": ANY}, {}, nothing)
    with contextlib.closing(late), sender(Address.parse(late.addresses["a"])) as one:
        for number in range(100):
            one.send(str(number).encode())
        late.drain()
        assert [data for _, data in late.mailbox] == [str(number).encode() for number in range(100)]


async def test_the_mailbox_is_bounded_and_the_oldest_goes() -> None:
    flooded = Heartbeats({"a": ANY}, {}, nothing)
    with contextlib.closing(flooded), sender(Address.parse(flooded.addresses["a"])) as one:
        for number in range(MAILBOX_DATAGRAMS_MAX + 10):
            one.send(str(number).encode())
            flooded.drain()
        one.send(b"y" * (DATAGRAM_BYTES_MAX + 100))
        flooded.drain()
        assert len(flooded.mailbox) == MAILBOX_DATAGRAMS_MAX
        assert flooded.dropped == 11
        assert flooded.mailbox[0] == ("a", b"11")
        assert len(flooded.mailbox[-1][1]) == DATAGRAM_BYTES_MAX


async def test_an_address_in_use_is_one_line() -> None:
    with (
        contextlib.closing(Heartbeats({"a": ANY}, {}, nothing)) as one,
        pytest.raises(
            OperatorError, match=r"network b: cannot listen on 127.0.0.1:[0-9]+: Address already in use"
        ),
    ):
        Heartbeats({"a": ANY, "b": Address.parse(one.addresses["a"])}, {}, nothing)

"""Guests that write, zero, trim and flush without pause, and tell the oracle of every step."""

from random import Random
from typing import Final

import trio

from holdfast.crash.client import Client, ConnectionLost, RequestFailed, connect
from holdfast.crash.journal import SECTOR
from holdfast.crash.machine import Machine
from holdfast.crash.oracle import BLOCK, Image, Violation

ESHUTDOWN: Final = 108  # NBD's own numbers
ENOSPC: Final = 28
NEVER_FLUSHING: Final = ("write",) * 6 + ("zero", "trim")
BUSY: Final = (*NEVER_FLUSHING, "flush", "fua")
_SECTORS_MAX: Final = 128
_BLOCK_SECTORS: Final = BLOCK // SECTOR
# Nothing that diskd does may hold a request up for longer, on the slowest machine.
_STANDSTILL_SECONDS: Final = 90.0


def free_range(image: Image, sectors: int, rng: Random) -> tuple[int, int]:
    """Sectors of the first ``sectors`` that no request in flight touches."""
    while True:
        length = rng.choice((1, 3, _BLOCK_SECTORS, _BLOCK_SECTORS, 2 * _BLOCK_SECTORS, _SECTORS_MAX))
        # Half of the requests meet the first quarter: where blocks are met again, things go wrong.
        room = sectors // 4 if rng.random() < 0.5 else sectors
        first = rng.randrange(room - length + 1)
        if rng.random() < 0.7:
            first -= first % _BLOCK_SECTORS
        if image.is_free(first, first + length):
            return first, first + length


class Guests:
    """Those of one life of the daemon. ``kinds``: what they do, each as often as it is named."""

    def __init__(self, machine: Machine, kinds: tuple[str, ...]) -> None:
        self.acks = 0
        self.is_over = False  # they leave; a daemon that dies now was to
        self.may_fail = False  # the images' disk is full: a write may have been done in part, or not
        self._machine = machine
        self._kinds = kinds
        self._moved = trio.Event()

    def wake(self) -> None:
        """Whoever waits looks again."""
        self._moved.set()
        self._moved = trio.Event()

    def end(self) -> None:
        """They leave when they have been answered, or the daemon dies."""
        self.is_over = True
        self.wake()

    async def wait(self) -> None:
        """Until one of them has been answered, or it is over. Raises Violation where they stand still."""
        if self.is_over:
            return
        with trio.move_on_after(_STANDSTILL_SECONDS):
            await self._moved.wait()
            return
        raise Violation(f"the guests stand still: {self._machine.log()}")

    async def run(self, image: Image, rng: Random) -> None:
        """One of them, until it is over. Raises Violation where its connection breaks before."""
        nbd = self._machine.nbd
        broken: ConnectionLost | RequestFailed | None = None
        try:
            while not self.is_over:
                async with connect(nbd.host, nbd.port, image.name) as client:
                    requests = rng.choice((20, 100, 1000))
                    while requests and not self.is_over:
                        await self._request(image, client, rng)
                        self.acks += 1
                        self.wake()
                        requests -= 1
        except (ConnectionLost, RequestFailed) as lost:
            broken = lost
        # Sent home by a daemon that stops: what was in flight may or may not have been done.
        sent_home = isinstance(broken, ConnectionLost) or (broken is not None and broken.number == ESHUTDOWN)
        if broken is None or (self.is_over and sent_home):
            return
        if self.may_fail and isinstance(broken, RequestFailed) and broken.number == ENOSPC:
            return
        if not await self._machine.has_died_by_itself():
            raise Violation(f"{image.name}: {broken}: {self._machine.log()}") from broken
        self.end()

    async def _request(self, image: Image, client: Client, rng: Random) -> None:
        kind = rng.choice(self._kinds)
        if kind == "flush":
            sent = image.tick()
            await client.flush()
            image.flushed(sent)
            return
        # A client goes by the size that it was told when it connected.
        first, end = free_range(image, client.size_bytes // SECTOR, rng)
        write = image.send(first, end, is_zero=kind in ("zero", "trim"), is_fua=kind == "fua")
        offset, length = first * SECTOR, (end - first) * SECTOR
        if kind == "zero":
            await client.zero(offset, length, may_trim=rng.random() < 0.5)
        elif kind == "trim":
            await client.trim(offset, length)
        else:
            await client.write(offset, write.data(), fua=kind == "fua")
        image.ack(write)

"""Runs of a VM that race for one image's lease over real sockets, while its diskd is killed and loses power.

Every run takes a new, higher epoch, connects as IMAGE@EPOCH and writes its epoch into the first block, again
and again, until it is fenced; then it knocks on, in vain. What is checked (S1):

    nothing that was sent after a newer epoch was acknowledged is ever acknowledged
    the block never goes back to an older epoch
    after any crash the epoch is not lower than the newest that was acknowledged, and one that was asked for
"""

import contextlib
import struct
from collections import Counter
from random import Random
from typing import Final

import trio

from daemonkit.diskd_api import LEASE_ACQUIRE, LEASE_SHOW, ImageName, LeaseRequest
from daemonkit.rpc import CallFailed, CallRefused
from daemonkit.units import MiB
from diskd.core import calls
from holdfast.crash.client import ConnectionLost, RequestFailed, connect
from holdfast.crash.machine import Machine, machine
from holdfast.crash.oracle import Violation

_IMAGE: Final = "disk"
_BLOCK: Final = 4096
_RUNS: Final = 4
_KNOCKS_MAX: Final = 20


class Leases:
    """``told`` counts what happened."""

    def __init__(self, seed: int, machine: Machine) -> None:
        self.told: Counter[str] = Counter()
        self._rng = Random(seed)
        self._machine = machine
        self._asked = self._acquired = 0
        self._is_over = False

    async def tell(self, lives: int) -> None:
        """Raises Violation."""
        machine = self._machine
        await machine.start()
        await machine.call(calls.IMAGE_CREATE, calls.CreateImage(_IMAGE, MiB))
        for _ in range(lives):
            await self._live()
            if machine.can_lose_power and self._rng.random() < 0.7:
                machine.lose_power(self._rng)
                self.told["power losses"] += 1
            await machine.start()
            await self._check()
        await machine.stop()

    async def _live(self) -> None:
        self._is_over = False
        async with trio.open_nursery() as nursery:
            for _ in range(_RUNS):
                nursery.start_soon(self._owner, Random(self._rng.random()))
            await trio.sleep(0.6 * self._rng.random())
            self._is_over = True
            await self._machine.kill()
        self.told["lives"] += 1

    async def _owner(self, rng: Random) -> None:
        """One host: a run after the other, for as long as diskd lives."""
        with contextlib.suppress(CallFailed):
            while not self._is_over:
                self._asked += 1
                epoch = self._asked
                try:
                    await self._machine.call(LEASE_ACQUIRE, LeaseRequest(_IMAGE, epoch, f"n/{epoch}"))
                except CallRefused as error:
                    if self._asked == epoch and not self._is_over:
                        raise Violation(
                            f"epoch {epoch} is refused with {self._acquired} held: {error}"
                        ) from error
                    self.told["refused"] += 1
                    continue
                self._acquired = max(self._acquired, epoch)
                self.told["acquired"] += 1
                await self._run(epoch, rng)

    async def _run(self, epoch: int, rng: Random) -> None:
        """Write until fenced; then knock a few times more."""
        knocks = 0
        while not self._is_over and knocks < _KNOCKS_MAX:
            try:
                await self._write(epoch, rng)
                return
            except (ConnectionLost, RequestFailed):
                knocks += 1
                if self._acquired > epoch and rng.random() < 0.3:
                    return

    async def _write(self, epoch: int, rng: Random) -> None:
        nbd = self._machine.nbd
        async with connect(nbd.host, nbd.port, f"{_IMAGE}@{epoch}") as client:
            for _ in range(rng.randrange(1, 30)):
                newest = self._acquired
                await client.write(0, struct.pack("<Q", epoch) * (_BLOCK // 8), fua=rng.random() < 0.1)
                if newest > epoch:
                    raise Violation(f"epoch {epoch} wrote after {newest} had been acquired (S1)")
                found = set(struct.unpack(f"<{_BLOCK // 8}Q", await client.read(0, _BLOCK)))
                if min(found) < epoch:
                    raise Violation(f"epoch {epoch} wrote, and then reads {sorted(found)} (S1)")
                self.told["writes"] += 1

    async def _check(self) -> None:
        lease = await self._machine.call(LEASE_SHOW, ImageName(_IMAGE))
        if not self._acquired <= lease.epoch <= self._asked:
            raise Violation(
                f"epoch {lease.epoch} after a crash: {self._acquired} was acknowledged,"
                f" {self._asked} asked for (S1)"
            )
        self._acquired = lease.epoch


async def play(seed: int, lives: int) -> Counter[str]:
    """One story. Raises Violation with its first find."""
    rng = Random(f"machine {seed}")
    async with machine(rng, can_lose_power=rng.random() < 0.7, settings=()) as made:
        story = Leases(seed, made)
        await story.tell(lives)
        return story.told

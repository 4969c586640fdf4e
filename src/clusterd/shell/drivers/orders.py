"""Hands a driver its orders for a run in the order in which the core gave them.

Each order is carried out in a task of its own, and tasks that begin together run in any order. A stop that
overtook its start (both wait for the same state file to be durable) would find nothing to stop and say that
the run has ended; then the start would bring it to life, and nobody would know of it.
"""

from collections.abc import Awaitable, Callable

import trio

from clusterd.core.types import VmConfig
from clusterd.shell.drivers.port import Driver


class RunOrders:
    """``orders_nursery`` holds what is under way."""

    def __init__(self, driver: Driver, orders_nursery: trio.Nursery) -> None:
        self._driver = driver
        self._nursery = orders_nursery
        self._beginning: dict[tuple[str, int], trio.Event] = {}

    def start(self, config: VmConfig, epoch: int) -> None:
        """Begin to start this run."""
        self._begin(config.name, epoch, lambda: self._driver.start(config, epoch))

    def adopt(self, config: VmConfig, epoch: int) -> None:
        """Begin to look whether this run lives."""
        self._begin(config.name, epoch, lambda: self._driver.adopt(config, epoch))

    def stop(self, vm: str, epoch: int, *, force: bool) -> None:
        """Stop this run once it has been started or found, if that was ordered before."""
        self._nursery.start_soon(self._stop, self._beginning.get((vm, epoch)), vm, epoch, force)

    def _begin(self, vm: str, epoch: int, work: Callable[[], Awaitable[None]]) -> None:
        begun = self._beginning[vm, epoch] = trio.Event()

        async def run() -> None:
            await work()
            begun.set()
            if self._beginning.get((vm, epoch)) is begun:
                del self._beginning[vm, epoch]

        self._nursery.start_soon(run)

    async def _stop(self, begun: trio.Event | None, vm: str, epoch: int, force: bool) -> None:
        if begun is not None:
            await begun.wait()
        await self._driver.stop(vm, epoch, force=force)

"""What the shell asks of a driver, whatever runs the VM underneath.

A *run* is one process of one VM under one epoch. A driver reports what it observes as the core's events:
``RunStarted`` once it lives and is watched, ``RunNotStarted``, and ``RunEnded`` when it is certainly gone,
exactly once for each run that started.
"""

import os
import re
from collections.abc import Mapping
from typing import Final, Protocol

import attrs

from clusterd.core.events import RunEnded, RunNotStarted, RunStarted
from clusterd.core.types import VmConfig
from clusterd.errors import Refused
from daemonkit.ports import Address

RunEvent = RunStarted | RunNotStarted | RunEnded
_PLACEHOLDER: Final = re.compile(r"\{(vm|epoch|node|disk:[^{}]*)\}")


class Driver(Protocol):
    """Every method returns soon; what takes its time is reported later."""

    async def start(self, config: VmConfig, epoch: int) -> None:
        """Start this run, or find that it lives already."""

    async def adopt(self, config: VmConfig, epoch: int) -> None:
        """Find out whether this run, started by an earlier clusterd, still lives, and watch it."""

    async def stop(self, vm: str, epoch: int, *, force: bool) -> None:
        """End this run: ask, then insist; with ``force`` insist at once. Works also if it is gone."""


@attrs.frozen
class Surroundings:
    """What a run is told about where it runs. ``nbd``: the diskds' NBD addresses by their names here."""

    node: str
    nbd: Mapping[str, Address]

    def disk_uri(self, config: VmConfig, disk_name: str, epoch: int) -> str:
        """The NBD URI of a disk under this run's epoch. Raises Refused for a name that is not there."""
        for disk in config.disks:
            if disk.name == disk_name:
                if disk.diskd not in self.nbd:
                    raise Refused(
                        f"VM {config.name}: disk {disk.name} is on diskd {disk.diskd!r}, which this node's"
                        " configuration does not name"
                    )
                return f"nbd://{self.nbd[disk.diskd]}/{disk.image}@{epoch}"
        raise Refused(f"VM {config.name}: argv names disk {disk_name!r}, which it does not have")

    def argv(self, config: VmConfig, epoch: int) -> list[str]:
        """The command line with every placeholder filled in. Raises Refused."""
        plain = {"vm": config.name, "epoch": str(epoch), "node": self.node}

        def fill(match: re.Match[str]) -> str:
            name = match[1]
            return plain[name] if name in plain else self.disk_uri(config, name[len("disk:") :], epoch)

        return [_PLACEHOLDER.sub(fill, word) for word in config.argv]

    def environment(self, config: VmConfig, epoch: int) -> dict[str, str]:
        """The run's environment: this process's, and what names the run and its disks. Raises Refused."""
        disks = {
            f"HOLDFAST_DISK_{re.sub('[^A-Z0-9]', '_', disk.name.upper())}": self.disk_uri(
                config, disk.name, epoch
            )
            for disk in config.disks
        }
        run = {"HOLDFAST_VM": config.name, "HOLDFAST_EPOCH": str(epoch), "HOLDFAST_HOST": self.node}
        return {**os.environ, **run, **disks}

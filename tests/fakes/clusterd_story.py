"""A simulated cluster with an operator in front of it: stories for the golden tests."""

from collections.abc import Callable
from typing import Any

import pytest

from clusterd.core import commands as c
from clusterd.core.types import Disk, VmConfig
from clusterd.sim.run import apply_fault
from clusterd.sim.scenario import Do, choose_status, lab_properties
from clusterd.sim.world import World
from daemonkit.units import SECOND, GiB

PROPERTIES = {
    "heartbeat_interval": "200ms",
    "heartbeat_threshold": "5",
    "resiliency_period": "5s",
    "restart_grace": "6s",
    "quarantine_duration": "12s",
    "quarantine_threshold": "1",
}


def vm(name: str = "web", on: str = "n1", **more: Any) -> VmConfig:
    fields: dict[str, Any] = {"disks": (Disk("d", name),), "memory_bytes": GiB, **more}
    return VmConfig(name, argv=("guest",), preferred_nodes=(on,), **fields)


class Story:
    def __init__(self, nodes: int = 3, **properties: str) -> None:
        self.world = World([f"n{n}" for n in range(1, nodes + 1)], seed=7)
        self.world.set_properties(lab_properties({**PROPERTIES, "quarantine_threshold": "9", **properties}))
        self.world.start_all()
        self.world.run_for(SECOND)
        self.until(lambda s: s["leader"] and all(n["state"] == "up" for n in s["nodes"].values()))
        self.until(lambda s: len(s["nodes"]) == nodes)

    @property
    def status(self) -> dict[str, Any]:
        status = choose_status(self.world.statuses())
        assert status is not None
        return status

    def until(self, condition: Callable[[dict[str, Any]], Any], seconds: float = 30) -> dict[str, Any]:
        limit = self.world.now + int(seconds * SECOND)

        def is_awaited() -> bool:
            try:
                return not condition(self.status)
            except KeyError:  # this node has not read of it yet
                return True

        came = self.world.run_while(is_awaited, limit)
        assert came, (self.status, self.world.trace[-12:])
        return self.status

    def do(self, text: str) -> None:
        verb, *rest = text.split()
        flags = tuple(word for word in rest if word.startswith("--"))
        apply_fault(self.world, Do(verb, tuple(word for word in rest if word not in flags), flags))

    def command(self, command: c.Command, node: str = "n2") -> str:
        """The text of an accepted command; a refusal is an AssertionError."""
        ticket = self.world.command(node, command)
        assert self.world.run_while(lambda: ticket not in self.world.answers, self.world.now + 8 * SECOND)
        answer = self.world.answers[ticket]
        assert answer.accepted, answer.text
        return answer.text

    def refused(self, command: c.Command, node: str = "n2") -> str:
        with pytest.raises(AssertionError) as refusal:
            self.command(command, node)
        return str(refusal.value)

    def online(self, name: str = "web", on: str | None = None) -> dict[str, Any]:
        def is_online(status: dict[str, Any]) -> bool:
            entry = status["vms"].get(name)
            return entry is not None and entry["state"] == "online" and on in (None, entry["owner"])

        return self.until(is_online)["vms"][name]

    def noted(self, name: str) -> list[str]:
        return [line for line in self.world.trace if f" {name} " in line]

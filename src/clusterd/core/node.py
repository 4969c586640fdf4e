"""The only door of the core: ``handle(event, now) -> Ready`` and ``next_deadline()``."""

from typing import Any

import attrs

from clusterd.core.effects import Ready
from clusterd.core.events import Event
from clusterd.core.state import NodeState
from clusterd.core.types import Identity


@attrs.define
class NodeCore:
    """One node's decisions. ``state`` was durably written by ``begin_incarnation`` before.

    Call ``handle`` for every event, in order, never re-entrantly, and carry the Ready out as
    ``effects`` says. After each call ask ``next_deadline()`` and feed DeadlineReached at that time.
    """

    identity: Identity
    state: NodeState

    def handle(self, event: Event, now: int) -> Ready:
        """What ``event`` leads to. ``now`` never goes backwards."""
        raise NotImplementedError

    def next_deadline(self) -> int | None:
        """When DeadlineReached is due, in the time of ``now``."""
        raise NotImplementedError

    def status(self, now: int) -> dict[str, Any]:
        """The document of ``clusterctl status --json`` (DESIGN section 9), from memory alone."""
        raise NotImplementedError

    def explain_node(self, node: str, now: int) -> list[dict[str, Any]]:
        """If ``node`` vanished now: per VM what happens, when and why."""
        raise NotImplementedError

    def vm_config(self, vm: str) -> dict[str, Any] | None:
        """The recorded configuration and desired state of a VM, as plain data (``vm show``)."""
        raise NotImplementedError

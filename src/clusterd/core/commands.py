"""What an operator may ask of any node. The node turns it into one guarded transaction on the operator's
own keys; the leader acts on them. Accepted means recorded, not finished: ``clusterctl`` polls the status."""

import attrs

from clusterd.core.types import VmConfig


@attrs.frozen
class AddVm:
    """Record a new VM, desired online. ``replace`` (``vm apply``): the configuration of an existing one is
    replaced; it takes effect at its next start."""

    config: VmConfig
    replace: bool = False
    start: bool = True


@attrs.frozen
class RemoveVm:
    vm: str


@attrs.frozen
class StartVm:
    vm: str


@attrs.frozen
class StopVm:
    vm: str


@attrs.frozen
class MoveVm:
    """A restart-move: stopped where it is, started on ``node``."""

    vm: str
    node: str


@attrs.frozen
class FailoverVm:
    """End the window of this VM now: it is failed over as soon as it is fenced."""

    vm: str


@attrs.frozen
class SetProperty:
    name: str
    value: str


@attrs.frozen
class PauseNode:
    """``drain``: its VMs are moved away as well."""

    node: str
    drain: bool = False


@attrs.frozen
class ResumeNode:
    node: str


@attrs.frozen
class LeaveNode:
    node: str


@attrs.frozen
class RemoveNode:
    """Forget a node that is down and owns nothing."""

    node: str


@attrs.frozen
class ClearQuarantine:
    node: str


@attrs.frozen
class ConfirmDead:
    """The operator vouches that every run of this node has ended (its power is off)."""

    node: str


@attrs.frozen
class ReleaseHold:
    """Let go what the mass-failure brake holds: ``brake`` (all of it), ``brake-NODE``, or ``failover-VM``."""

    id: str


Command = (
    AddVm
    | RemoveVm
    | StartVm
    | StopVm
    | MoveVm
    | FailoverVm
    | SetProperty
    | PauseNode
    | ResumeNode
    | LeaveNode
    | RemoveNode
    | ClearQuarantine
    | ConfirmDead
    | ReleaseHold
)

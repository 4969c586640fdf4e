"""The calls of clusterd's control: what ``clusterctl`` asks of any node, and nodes of each other.

Reads are answered from memory and never wait for the store. Every verb of the operator is one method
whose parameters are the command itself; "accepted" means recorded in the store, not finished.
"""

from typing import Any, Final

import attrs

from clusterd.core.commands import (
    ClearQuarantine,
    ConfirmDead,
    FailoverVm,
    LeaveNode,
    MoveVm,
    PauseNode,
    ReleaseHold,
    RemoveNode,
    RemoveVm,
    ResumeNode,
    SetProperty,
    StartVm,
    StopVm,
)
from clusterd.core.recovery import Request
from clusterd.core.testimony import Testimony
from clusterd.core.types import Disk
from daemonkit.diskd_api import BackupReport
from daemonkit.methods import Method

EVENTS_PER_REPLY_MAX: Final = 1000


@attrs.frozen
class Nothing:
    """No parameters, or no result."""


@attrs.frozen
class Document:
    """Plain data for a JSON document."""

    document: dict[str, Any]


@attrs.frozen
class Rows:
    """Plain data for a JSON list."""

    rows: list[dict[str, Any]]


@attrs.frozen
class Accepted:
    """The command is recorded; ``text`` says what follows from it."""

    text: str


@attrs.frozen
class VmFile:
    """A VM file's text. ``replace``: apply, also to a VM that is there."""

    text: str
    replace: bool = False
    start: bool = True


@attrs.frozen
class VmName:
    vm: str


@attrs.frozen
class NodeName:
    node: str


@attrs.frozen
class EventsSince:
    """Events after this sequence number. ``wait``: answer only once there is one, or after some seconds."""

    after: int = 0
    wait: bool = False


@attrs.frozen
class EventList:
    """``next``: what to ask after. ``missed``: so many were too old to be kept."""

    events: list[dict[str, Any]]
    next: int
    missed: int = 0


@attrs.frozen
class ProbeRequest:
    """Could this node start the VM now? It asks each diskd over its own links."""

    vm: str
    disks: list[Disk]


@attrs.frozen
class ProbeReply:
    """``reached``: every diskd answered. ``epochs``: image -> the newest epoch that its diskd showed."""

    reached: bool
    reason: str
    epochs: dict[str, int]


@attrs.frozen
class BackupVm:
    """Back a VM up at its owner. ``target`` is where diskd finds the target. ``at``: set by a node that
    passes the call on; whoever does not own the VM any more refuses, so that no call goes in circles.
    ``compress_level``: of zstd; 0 for none."""

    vm: str
    target: str
    full: bool = False
    at: str | None = None
    compress_level: int = 0


@attrs.frozen
class RestoreVm:
    """Copy a point's disks into new images of ``diskd`` as the asked node knows it, and add the VM, under
    ``new_name`` if given. ``start``: and start it."""

    vm: str
    point: str
    target: str
    new_name: str | None = None
    diskd: str = "main"
    start: bool = False


@attrs.frozen
class RestoredVm:
    """``images``: disk name -> image. ``text``: what follows."""

    vm: str
    point: str
    images: dict[str, str]
    data_bytes: int
    text: str


@attrs.frozen
class PictureAfter:
    """The next page of the node's picture of the store, of this age, after this key."""

    recovery: int
    revision: int
    after: str = ""


@attrs.frozen
class PicturePage:
    """Keys (without the prefix) and values, ascending."""

    records: dict[str, bytes]
    is_last: bool


@attrs.frozen
class RecoverStore:
    """Carry out the plan with this digest, as ``store.plan`` of the same request has shown it."""

    request: Request
    digest: str


STATUS: Final = Method("status", Nothing, Document)
EVENTS: Final = Method("events", EventsSince, EventList)
EXPLAIN_NODE: Final = Method("explain.node", NodeName, Rows)
PROBE: Final = Method("node.probe", ProbeRequest, ProbeReply)
VM_SHOW: Final = Method("vm.show", VmName, Document)
VM_ADD: Final = Method("vm.add", VmFile, Accepted)
VM_BACKUP: Final = Method("vm.backup", BackupVm, BackupReport)
VM_RESTORE: Final = Method("vm.restore", RestoreVm, RestoredVm)
VM_REMOVE: Final = Method("vm.remove", RemoveVm, Accepted)
VM_START: Final = Method("vm.start", StartVm, Accepted)
VM_STOP: Final = Method("vm.stop", StopVm, Accepted)
VM_MOVE: Final = Method("vm.move", MoveVm, Accepted)
VM_FAILOVER: Final = Method("vm.failover", FailoverVm, Accepted)
NODE_PAUSE: Final = Method("node.pause", PauseNode, Accepted)
NODE_RESUME: Final = Method("node.resume", ResumeNode, Accepted)
NODE_LEAVE: Final = Method("node.leave", LeaveNode, Accepted)
NODE_REMOVE: Final = Method("node.remove", RemoveNode, Accepted)
NODE_CLEAR_QUARANTINE: Final = Method("node.clear_quarantine", ClearQuarantine, Accepted)
NODE_CONFIRM_DEAD: Final = Method("node.confirm_dead", ConfirmDead, Accepted)
HOLD_RELEASE: Final = Method("hold.release", ReleaseHold, Accepted)
STORE_TESTIMONY: Final = Method("store.testimony", Nothing, Testimony)
STORE_PICTURE: Final = Method("store.picture", PictureAfter, PicturePage)
STORE_PLAN: Final = Method("store.plan", Request, Document)
STORE_RECOVER: Final = Method("store.recover", RecoverStore, Accepted)
PROPERTY_SET: Final = Method("property.set", SetProperty, Accepted)

COMMANDS: Final[tuple[Method[Any, Accepted], ...]] = (
    VM_REMOVE,
    VM_START,
    VM_STOP,
    VM_MOVE,
    VM_FAILOVER,
    NODE_PAUSE,
    NODE_RESUME,
    NODE_LEAVE,
    NODE_REMOVE,
    NODE_CLEAR_QUARANTINE,
    NODE_CONFIRM_DEAD,
    HOLD_RELEASE,
    PROPERTY_SET,
)
"""Those whose parameters are the command as it is."""

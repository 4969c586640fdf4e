"""The nouns of the cluster: names, node and VM states with their meanings, VM configuration.

Everything here is a value. Times are integer nanoseconds on the receiver's own monotonic clock and
never leave it; what crosses a process boundary is a duration, a counter or a revision.
"""

import enum
import re
from typing import Final, Literal

import attrs

from clusterd.errors import Refused
from daemonkit.units import GiB

NAME_PATTERN: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)
NODES_MAX: Final = 64
VMS_MAX: Final = 4096
DISKS_PER_VM_MAX: Final = 16
ARGV_MAX: Final = 256
PREFERRED_NODES_MAX: Final = 64
NEVER: Final = -1
"""A ``resiliency_period`` of a VM: it is never failed over because of a window."""


def check_name(text: str, what: str) -> str:
    """``text`` if it may name a node, VM, disk or image. Raises Refused with the rule."""
    if NAME_PATTERN.fullmatch(text) is None:
        raise Refused(
            f"{what} {text!r}: a name is 1 to 63 of a-z, 0-9, '.', '_', '-' and starts with a letter or digit"
        )
    return text


class Liveness(enum.Enum):
    """What evidence says about a node."""

    JOINING = "joining"  # heard, but not yet counted: no presence key, or stale runs not yet stopped
    UP = "up"  # in contact, present in the store, settled
    ISOLATED = "isolated"  # no contact; its windows are running
    DOWN = "down"  # no contact, and its last finite window has ended, or it said it left


class Admission(enum.Enum):
    """What operators and the leader allow a node to do."""

    NORMAL = "normal"
    PAUSED = "paused"  # by an operator: nothing new is placed there
    QUARANTINED = "quarantined"  # by the leader: kept out until it has calmed down
    LEAVING = "leaving"  # by an operator: drained, then gone


class VmState(enum.Enum):
    """The states of DESIGN section 2, as shown."""

    OFFLINE = "offline"
    STARTING = "starting"
    ONLINE = "online"
    STOPPING = "stopping"
    MIGRATING = "migrating"
    UNMONITORED = "unmonitored"
    STALLED = "stalled"
    FAILED = "failed"
    HELD = "held"


RunState = Literal["fencing", "held", "starting", "online", "stalled", "stopping", "stopped", "failed"]
"""What the owner observes of one run (one epoch of one VM). ``fencing``: claimed, leases being taken.
``held``: claimed, but a lease got no answer or was refused. ``stopped`` and ``failed`` are final."""

FINAL_RUN_STATES: Final = ("stopped", "failed")
UNSTARTED_RUN_STATES: Final = ("fencing", "held")

Desired = Literal["online", "offline"]


@attrs.frozen(order=True)
class Disk:
    """A disk of a VM: its name in the configuration, its image, and the diskd (a name of NODE.toml)."""

    name: str
    image: str
    diskd: str = "main"


@attrs.frozen
class VmConfig:
    """A VM file, parsed. ``text`` is the file verbatim (it goes into backups).

    ``resiliency_period_ns``: None takes the cluster's property, 0 fails over at once, NEVER never.
    """

    name: str
    driver: str = "process"
    argv: tuple[str, ...] = ()
    memory_bytes: int = 0
    vcpus: int = 1
    priority: int = 0
    preferred_nodes: tuple[str, ...] = ()
    resiliency_period_ns: int | None = None
    stateless: bool = False
    disks: tuple[Disk, ...] = ()
    text: str = ""


def check_vm(config: VmConfig) -> VmConfig:
    """``config`` if a cluster can run it. Raises Refused with what is wrong."""
    check_name(config.name, "VM")
    if config.driver != "process":
        raise Refused(f"VM {config.name}: driver {config.driver!r} is not built; use 'process'")
    if not 1 <= len(config.argv) <= ARGV_MAX:
        raise Refused(f"VM {config.name}: argv needs 1 to {ARGV_MAX} words")
    if len(config.disks) > DISKS_PER_VM_MAX:
        raise Refused(f"VM {config.name}: at most {DISKS_PER_VM_MAX} disks")
    for disk in config.disks:
        check_name(disk.name, f"VM {config.name}: disk")
        check_name(disk.image, f"VM {config.name}: image")
    if len({disk.name for disk in config.disks}) < len(config.disks):
        raise Refused(f"VM {config.name}: two disks have one name")
    if len({disk.image for disk in config.disks}) < len(config.disks):
        raise Refused(f"VM {config.name}: two disks use one image")
    if len({disk.diskd for disk in config.disks}) > 1:  # B1: one instant over all disks
        raise Refused(f"VM {config.name}: all disks of a VM must be served by one diskd")
    if config.stateless and config.disks:
        raise Refused(f"VM {config.name}: a VM with disks is not stateless")
    if config.memory_bytes < 0 or config.vcpus < 0:
        raise Refused(f"VM {config.name}: memory and vcpus cannot be negative")
    period = config.resiliency_period_ns
    if period is not None and period < NEVER:
        raise Refused(f"VM {config.name}: resiliency_period is a duration, 0 or -1 (never)")
    if len(config.preferred_nodes) > PREFERRED_NODES_MAX:
        raise Refused(f"VM {config.name}: at most {PREFERRED_NODES_MAX} preferred nodes")
    return config


@attrs.frozen
class Identity:
    """Who this node is; fixed for the life of the process. ``fresh_id``: an unguessable text from the
    shell, which becomes the id of the store if this node is the first to find it new."""

    name: str
    cluster: str
    boot_id: str
    keys: tuple[bytes, ...]
    peers: tuple[str, ...] = ()
    networks: tuple[str, ...] = ("a",)
    memory_bytes: int = 4 * GiB
    vcpus: int = 4
    has_references: bool = False
    control: str = ""
    fresh_id: str = "unset"


class EventName(enum.Enum):
    """The stable names of the event log, each with one meaning (DESIGN section 9)."""

    NODE_STARTED = "node.started"  # this clusterd began, with its incarnation
    NODE_UP = "node.up"  # a node counts as up for the first time since this clusterd began
    NODE_ISOLATED = "node.isolated"  # this node lost contact with a node, or with the majority (itself)
    NODE_RETURNED = "node.returned"  # contact is back and the node is settled
    NODE_DOWN = "node.down"  # its last finite window has ended, or it left
    NODE_LEFT = "node.left"  # it said goodbye for good
    NODE_RESTARTING = "node.restarting"  # it announced a restart of its clusterd
    NODE_PROVEN_DEAD = "node.proven_dead"  # its runs are known not to live any more
    NODE_EXIT_COUNTED = "node.exit_counted"  # an ungraceful exit, counted on return
    NODE_QUARANTINED = "node.quarantined"
    NODE_QUARANTINE_RELEASED = "node.quarantine_released"
    QUARANTINE_HELD_BY_CAP = "quarantine.held_by_cap"
    BRAKE_ENGAGED = "brake.engaged"  # these nodes were lost in a mass failure: their failovers are held
    BRAKE_RELEASED = "brake.released"  # these nodes' failovers are held no more, with the reason
    NODE_INCARNATION_JUMPED = "node.incarnation_jumped"
    LOOP_STALLED = "loop.stalled"
    LEADER_ELECTED = "leader.elected"
    LEADER_RESIGNED = "leader.resigned"
    STORE_UNKNOWN = "store.unknown"
    STORE_KNOWN = "store.known"
    STORE_FOREIGN = "store.foreign"  # empty, older or another cluster's: treated as unknown (S6)
    STORE_RECOVERED = "store.recovered"  # rebuilt by an operator, and ours again: revisions start over
    VM_ASSIGNED = "vm.assigned"  # the leader recorded owner and epoch
    VM_UNMONITORED = "vm.unmonitored"
    VM_MONITORED = "vm.monitored"  # back within its window: the same run goes on
    VM_FAILED_OVER = "vm.failed_over"
    VM_FAILOVER_CANCELLED = "vm.failover_cancelled"
    VM_FENCED = "vm.fenced"  # this node's copy met a newer epoch and is stopped
    VM_STARTED = "vm.started"
    VM_ADOPTED = "vm.adopted"
    VM_STOPPED = "vm.stopped"
    VM_FAILED = "vm.failed"
    VM_STALLED = "vm.stalled"
    VM_STALE_STOPPED = "vm.stale_stopped"
    HELD = "hold.set"
    UNHELD = "hold.ended"

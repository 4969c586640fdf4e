"""The keys and values of the store: who writes what, and how it reads.

Keys lie under ``/holdfast/CLUSTER/``. Values are JSON objects, so that ``etcdctl`` shows them plainly.

| key                 | value        | writer                                               |
|---------------------|--------------|------------------------------------------------------|
| ``id``              | ClusterId    | the first node that finds the store new, once        |
| ``recovering``      | Recovering   | a recovery, from its first transaction to its last   |
| ``recovered``       | Recovered    | a recovery, in its last transaction, with ``id``     |
| ``properties``      | PropertyTexts| operator                                             |
| ``members/NODE``    | Member       | operator (the node itself adds it once)              |
| ``presence/NODE``   | Presence     | the node, under its session's lease                  |
| ``goodbyes/NODE``   | Goodbye      | the node; removed by it when it is back              |
| ``confirmed/NODE``  | ConfirmedDead| operator; the node itself takes its own boot out     |
| ``leader``          | Leader       | the leader, under its session's lease                |
| ``epoch``           | EpochCounter | the leader                                           |
| ``nodes/NODE``      | NodeRecord   | the leader (operator: clear-quarantine)              |
| ``moves/NODE``      | MovedAway    | the leader, with every assignment taken from NODE    |
| ``held``            | HeldList     | the leader                                           |
| ``brake``           | BrakeRecord  | the leader (operator: hold release)                  |
| ``vmset``           | VmSet        | operator, with every VM that takes new images        |
| ``vms/VM/spec``     | VmSpec       | operator                                             |
| ``vms/VM/request``  | VmRequest    | operator; removed by the leader when it acts on it   |
| ``vms/VM/assignment``| Assignment  | the leader                                           |
| ``vms/VM/run``      | Run          | the owner named by the assignment                    |
| ``vms/VM/doubt``    | Doubt        | a recovery; a node that it did not ask; the leader   |

The leader guards each write by the create revision of ``leader`` and by the mod revision of what it
read; the owner guards ``run`` by the mod revisions of ``assignment`` and ``run``. So a claim of a run and
the cancellation of its assignment exclude each other.
"""

import json
from typing import Any, Final, Literal, TypeVar

import attrs

from clusterd.core.types import FINAL_RUN_STATES, UNSTARTED_RUN_STATES, Desired, RunState, VmConfig
from clusterd.errors import StoreUnknown
from daemonkit.schema import SchemaError, structure, unstructure

RECORD_BYTES_MAX: Final = 256 << 10
EXITS_MAX: Final = 100
CONFIRMED_BOOTS_MAX: Final = 8  # of one node, beyond those that a VM waits for


def prefix(cluster: str) -> str:
    """Where all keys of this cluster lie."""
    return f"/holdfast/{cluster}/"


@attrs.frozen
class ClusterId:
    id: str


@attrs.frozen
class Recovering:
    """The store is being rebuilt, so it is unknown to everybody (S6), and each transaction of the rebuilding
    is guarded by this record. ``base_id``, ``base_number`` and ``base_revision``: of what the store held
    before, where that was an older copy of this cluster's own; what it holds now is then no worse."""

    node: str
    token: str
    base_id: str = ""
    base_number: int = 0
    base_revision: int = 0


@attrs.frozen
class Recovered:
    """The store was rebuilt for the ``number``-th time. Revisions of before mean nothing in it; ``token``
    tells two recoveries of one number apart."""

    number: int
    token: str
    node: str


@attrs.frozen
class PropertyTexts:
    texts: dict[str, str]


@attrs.frozen
class Member:
    """``admission``: normal, paused or leaving. ``drain``: its VMs are moved away too."""

    name: str
    admission: Literal["normal", "paused", "leaving"] = "normal"
    drain: bool = False


@attrs.frozen
class Presence:
    """``settled``: the store revision up to which the node has stopped every run that was taken from it."""

    node: str
    incarnation: int
    boot_id: str
    memory_bytes: int
    vcpus: int
    settled: int
    control: str = ""


@attrs.frozen
class RunName:
    vm: str
    epoch: int


@attrs.frozen
class Goodbye:
    """``leave``: ``runs`` were stopped, which is proof for exactly those. ``restart``: they go on."""

    kind: Literal["leave", "restart"]
    incarnation: int
    boot_id: str
    runs: tuple[RunName, ...] = ()


@attrs.frozen
class ConfirmedDead:
    """Everything the node ran under this boot id, or under one of ``also``, has ended. ``incarnation``: the
    newest that was known then. It outlives the node's membership: a boot id never comes back, and a VM may
    still wait for the proof. Records of before ``also`` read as having none."""

    boot_id: str
    incarnation: int
    also: tuple[str, ...] = ()

    def boots(self) -> tuple[str, ...]:
        """All boots of which this is the proof."""
        return (self.boot_id, *self.also)


@attrs.frozen
class Leader:
    node: str


@attrs.frozen
class EpochCounter:
    """The newest epoch ever handed out; never goes down."""

    epoch: int


@attrs.frozen
class Window:
    """An open isolation. ``elapsed_ns`` at the time of writing; ``grace_ns``: what an announced restart adds.
    ``counts``: whether this episode is an ungraceful exit. ``ended``: the last finite window is over."""

    elapsed_ns: int
    grace_ns: int = 0
    incarnation: int = 0
    counts: bool = True
    ended: bool = False


@attrs.frozen
class NodeRecord:
    """``exit_ages_ns``: ages of the counted ungraceful exits at the time of writing, oldest first."""

    window: Window | None = None
    exit_ages_ns: tuple[int, ...] = ()
    quarantine_elapsed_ns: int | None = None


NOT_ASKED: Final = ""  # in the place of a VM's name: a recovery of the store did without the node


@attrs.frozen
class MovedAway:
    """Its mod revision is what the node's presence must be settled to before the node counts as up."""

    vm: str
    epoch: int


@attrs.frozen
class HeldItem:
    """What the cluster would do but must not (S5). ``id`` is ``KIND-SUBJECT``."""

    id: str
    kind: str
    subject: str
    why: str
    ends_when: str


@attrs.frozen
class HeldList:
    items: tuple[HeldItem, ...]


BrakeState = Literal["held", "spared", "proven", "released", "expired", "back"]
"""What the mass-failure brake does to a node (``brake`` tells the meanings). Only ``held`` holds anything."""


@attrs.frozen
class BrakedNode:
    """``elapsed_ns``: how long it has been held, at the time of writing. ``counts``: whether it is one of the
    members by whose number it is judged how many are away."""

    state: BrakeState
    elapsed_ns: int = 0
    counts: bool = True


@attrs.frozen
class BrakeRecord:
    """The nodes that were lost in a mass failure, or while one lasted, and are not back yet. A key of its own
    and not fields of NodeRecord: a clusterd of before there was a brake skips keys that it does not know."""

    nodes: dict[str, BrakedNode] = attrs.field(factory=dict)

    def holds(self, node: str) -> bool:
        """Whether this node's failovers are held."""
        braked = self.nodes.get(node)
        return braked is not None and braked.state == "held"

    def held(self) -> list[str]:
        """The nodes whose failovers are held, ascending."""
        return sorted(name for name in self.nodes if self.holds(name))


@attrs.frozen
class VmSpec:
    config: VmConfig
    desired: Desired = "online"


@attrs.frozen
class VmSet:
    """Counts the changes of which images belong to which VM: two of them at once exclude each other."""

    changes: int = 0


@attrs.frozen
class VmRequest:
    verb: Literal["move", "failover", "start"]
    node: str | None = None


@attrs.frozen
class Assignment:
    """``action`` stop: the owner ends this run. ``then``: where a restart-move goes on. ``attempt``: how
    often in a row the VM was started again after it had failed. ``previous``: whom a failover took it
    from, and the epoch there, so that it can be cancelled before the first lease is taken. ``given_back``: by
    such a cancellation: the run of this epoch goes on if it still lives, and is never started again.
    ``last_node`` and ``last_boot``: the host, and its boot, on which the VM ran last: where every host has
    its own diskd, the one there may have its disks."""

    owner: str
    epoch: int
    action: Literal["run", "stop"] = "run"
    reason: str = ""
    then: str | None = None
    attempt: int = 0
    previous: str | None = None
    previous_epoch: int = 0
    given_back: bool = False
    last_node: str = ""
    last_boot: str = ""


@attrs.frozen
class Run:
    """What the owner observes of the run of this epoch. ``leased``: how many disks it has leased so far.
    ``seen_epoch``: a newer epoch that a diskd showed, when a lease was refused. ``counts``: a failure of the
    VM's own, which counts against its restarts; not one that the cluster caused."""

    node: str
    epoch: int
    state: RunState
    boot_id: str
    pid: int | None = None
    reason: str = ""
    leased: int = 0
    seen_epoch: int = 0
    counts: bool = True

    def has_disks(self) -> bool:
        """Whether the VM's disks came to this run's host. If not, they are still where it ran before: one
        that was stopped while it was held brought none."""
        if self.state in FINAL_RUN_STATES:
            return self.leased > 0
        return self.state not in UNSTARTED_RUN_STATES


FOUND_STATES: Final = ("online", "stalled", "stopping")  # of a run whose process was seen


@attrs.frozen
class Doubt:
    """Of a store that was rebuilt: the VM may live, unseen, on each of ``nodes``, which were not asked (with
    the boots that they had as far as is known). ``found``: the run, of the one that is back with it alive."""

    nodes: dict[str, str]
    found: Run | None = None


KINDS: Final[dict[str, type]] = {
    "id": ClusterId,
    "recovering": Recovering,
    "recovered": Recovered,
    "properties": PropertyTexts,
    "leader": Leader,
    "epoch": EpochCounter,
    "held": HeldList,
    "brake": BrakeRecord,
    "vmset": VmSet,
    "members/": Member,
    "presence/": Presence,
    "goodbyes/": Goodbye,
    "confirmed/": ConfirmedDead,
    "nodes/": NodeRecord,
    "moves/": MovedAway,
    "/spec": VmSpec,
    "/request": VmRequest,
    "/assignment": Assignment,
    "/run": Run,
    "/doubt": Doubt,
}

R = TypeVar("R")


def kind_of(key: str) -> type | None:
    """The class of the record under this key (without the prefix), or None if the key is not ours."""
    if "/" not in key and key in KINDS:
        return KINDS[key]
    head, slash, tail = key.partition("/")
    if head == "vms" and slash:
        return KINDS.get("/" + tail.rpartition("/")[2])
    return KINDS.get(head + "/") if slash and tail else None


def encode_record(record: Any) -> bytes:
    """JSON, with sorted keys: equal records are equal bytes."""
    return json.dumps(unstructure(record), sort_keys=True, separators=(",", ":")).encode()


def decode_record(cls: type[R], key: str, value: bytes) -> R:
    """Raises StoreUnknown naming the key: a record that does not read is no knowledge."""
    if len(value) > RECORD_BYTES_MAX:
        raise StoreUnknown(f"store record {key}: larger than {RECORD_BYTES_MAX} bytes")
    try:
        return structure(cls, json.loads(value), where=key)
    except (ValueError, RecursionError, SchemaError) as error:
        raise StoreUnknown(f"store record {key}: {error}") from error

"""The owner's side: how an assignment becomes a run, one machine per run (S2, S7).

Theory of operation. A run passes through these phases on the node that owns it:

    claiming    write run=fencing, guarded by the assignment: from now on the leader sees that we began
    fencing     acquire the lease on all disks at the new epoch, at diskd itself
    held        a lease was refused or got no answer: shown, and retried from ``claiming``
    committing  write run=starting, guarded by the assignment: this *is* the second linearizable read,
                and it excludes that the leader gave the VM to somebody else meanwhile
    spawning    the intent is durable, then the process is started, in one Ready
    adopting    after a restart of clusterd: does the process of a durable intent still live?
    online      it lives; its leases are looked at from time to time: a newer epoch stops it (``fenced``)
    stopping    asked to end, for a reason: asked, stale, fenced, isolated, storage
    ended       certainly gone: the intent is forgotten, the outcome is recorded, then the run is dropped

Nothing here looks at a clock to decide that somebody else is dead.
"""

import enum
from typing import Final

import attrs

from clusterd.core.records import Run
from clusterd.core.types import RunState, VmConfig
from daemonkit.errors import InvariantBroken


class Phase(enum.Enum):
    CLAIMING = "claiming"
    FENCING = "fencing"
    HELD = "held"
    COMMITTING = "committing"
    SPAWNING = "spawning"
    ADOPTING = "adopting"
    ONLINE = "online"
    STOPPING = "stopping"
    ENDED = "ended"


class Step(enum.Enum):
    """What happened to a run."""

    CLAIMED = "claimed"
    CLAIMED_DISKLESS = "claimed, no disks"
    LEASED = "all leases acquired"
    UNLEASED = "a lease refused or unanswered"
    RETRIED = "time to retry"
    COMMITTED = "committed"
    STARTED = "its process lives"
    ENDED = "its process is gone"
    STOP = "it shall end"
    DROPPED = "not ours any more, and never spawned"


_P, _S = Phase, Step
TABLE: Final[dict[tuple[Phase, Step], Phase]] = {
    (_P.CLAIMING, _S.CLAIMED): _P.FENCING,
    (_P.CLAIMING, _S.CLAIMED_DISKLESS): _P.COMMITTING,
    (_P.FENCING, _S.LEASED): _P.COMMITTING,
    (_P.FENCING, _S.UNLEASED): _P.HELD,
    (_P.HELD, _S.RETRIED): _P.CLAIMING,
    (_P.COMMITTING, _S.COMMITTED): _P.SPAWNING,
    (_P.CLAIMING, _S.DROPPED): _P.ENDED,
    (_P.FENCING, _S.DROPPED): _P.ENDED,
    (_P.HELD, _S.DROPPED): _P.ENDED,
    (_P.COMMITTING, _S.DROPPED): _P.ENDED,
    (_P.SPAWNING, _S.STARTED): _P.ONLINE,
    (_P.SPAWNING, _S.ENDED): _P.ENDED,
    (_P.SPAWNING, _S.STOP): _P.STOPPING,
    (_P.ADOPTING, _S.STARTED): _P.ONLINE,
    (_P.ADOPTING, _S.ENDED): _P.ENDED,
    (_P.ADOPTING, _S.STOP): _P.STOPPING,
    (_P.ONLINE, _S.STARTED): _P.ONLINE,
    (_P.ONLINE, _S.ENDED): _P.ENDED,
    (_P.ONLINE, _S.STOP): _P.STOPPING,
    (_P.STOPPING, _S.STARTED): _P.STOPPING,
    (_P.STOPPING, _S.ENDED): _P.ENDED,
}

UNSPAWNED: Final = (Phase.CLAIMING, Phase.FENCING, Phase.HELD, Phase.COMMITTING)
LIVE: Final = (Phase.SPAWNING, Phase.ADOPTING, Phase.ONLINE, Phase.STOPPING)
STOP_REASONS: Final = {
    "asked": "stopped as asked",
    "stale": "the VM was taken over by another run",
    "fenced": "fenced: its disks know a newer epoch",
    "isolated": "this node was isolated and isolation_response is stop",
    "storage": "its storage did not answer within storage_timeout",
}


@attrs.define
class LocalRun:
    """One run on this node. ``request``: the open AcquireLeases. ``final``: how it ended."""

    config: VmConfig
    epoch: int
    boot_id: str
    phase: Phase
    pid: int | None = None
    reason: str = ""
    leased: int = 0
    seen_epoch: int = 0
    request: int | None = None
    retry_at: int = 0
    stop_why: str = ""
    stop_asked_at: int = 0
    stop_forced: bool = False
    silent_since: int | None = None
    is_stalled: bool = False
    final: RunState = "failed"
    counts: bool = True
    was_adopted: bool = False

    @property
    def vm(self) -> str:
        return self.config.name

    def step(self, step: Step) -> None:
        """Advance by the table. Raises InvariantBroken for what is not in it."""
        after = TABLE.get((self.phase, step))
        if after is None:
            raise InvariantBroken(f"run {self.vm}@{self.epoch}: {step.value!r} while {self.phase.value}")
        self.phase = after

    def can(self, step: Step) -> bool:
        return (self.phase, step) in TABLE

    def may_live(self) -> bool:
        """Whether a process of this run may exist."""
        return self.phase in LIVE

    def record(self, node: str) -> Run | None:
        """What the store should say of this run; None: what it says already is right."""
        states: dict[Phase, RunState] = {
            Phase.HELD: "held",
            Phase.ONLINE: "stalled" if self.is_stalled else "online",
            Phase.STOPPING: "stopping",
            Phase.ENDED: self.final,
        }
        state = states.get(self.phase)
        if state is None:
            return None
        return self.as_record(node, state)

    def as_record(self, node: str, state: RunState) -> Run:
        return Run(
            node,
            self.epoch,
            state,
            self.boot_id,
            pid=self.pid if state in ("online", "stalled", "stopping") else None,
            reason=self.reason,
            leased=self.leased,
            seen_epoch=self.seen_epoch,
            counts=self.counts,
        )

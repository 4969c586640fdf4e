"""What the core asks the shell to do. Effects are values; the shell carries them out in order.

The order is part of the type ``Ready``:

1. ``send``: heartbeats. They depend on nothing: a slow disk never delays one.
2. ``persist``: the node's durable state. Replace the file, fsync, then feed back ``Persisted``.
   A failed write ends the process: a node that cannot remember must not act.
3. ``act``: only after ``persist`` (of this Ready and of all earlier ones) is durable.

Every effect with a ``request`` is answered exactly once, by the event named in its docstring, also when
nothing answered (then the event says so), and within the time stated. The core never asks twice for the
same thing while a request is open, so a lost answer would stall that one thing for ever.
Effects without ``request`` and without a named event are done and forgotten.
"""

from typing import Any, Final

import attrs

from clusterd.core.picture import Picture
from clusterd.core.types import Disk, EventName, VmConfig


@attrs.frozen
class SendHeartbeat:
    """Send ``data`` once to every address of every peer on every network. Errors count as loss."""

    data: bytes


@attrs.frozen
class Persist:
    """Durably replace the node's state file with ``document``; then feed ``Persisted(ticket)``.

    Given back to ``state.decode_state`` at the next start. A later Persist contains all earlier ones:
    the shell may skip to the newest, but must then answer with the newest ticket only.
    """

    ticket: int
    document: bytes


@attrs.frozen
class KeepPicture:
    """Durably keep this picture of the store, in place of the former one, when there is time: nothing waits
    for it, and of several only the newest need be written. A write that fails costs only what a later
    recovery could have known (``picture``)."""

    picture: Picture


@attrs.frozen
class ReadStore:
    """Read everything under ``records.PREFIX`` of this cluster, linearizably, in one range request.
    Answer within 1 s with ``StoreSnapshot`` or ``StoreFailed``."""

    request: int


@attrs.frozen
class Compare:
    """A guard on one key. ``target`` is ``mod`` or ``create`` (revision); 0 means that the key is absent."""

    key: str
    target: str
    revision: int


@attrs.frozen
class Put:
    """``lease`` 0: none."""

    key: str
    value: bytes
    lease: int = 0


@attrs.frozen
class WriteStore:
    """One transaction: if every compare holds, all puts and deletes. Answer within 1 s with
    ``StoreWritten`` (``succeeded`` as the store said) or ``StoreFailed`` (may have happened or not).
    Must not be retried by the shell."""

    request: int
    compares: tuple[Compare, ...]
    puts: tuple[Put, ...] = ()
    deletes: tuple[str, ...] = ()


@attrs.frozen
class GrantSession:
    """Grant a store lease of this TTL (rounded up to whole seconds). Answer within 1 s with
    ``SessionGranted`` or ``StoreFailed``."""

    request: int
    ttl_ns: int


@attrs.frozen
class KeepSession:
    """Keep the lease alive. Answer within 1 s with ``SessionKept`` or ``StoreFailed``."""

    request: int
    lease: int


@attrs.frozen
class RevokeSession:
    """Revoke the lease, once, at most 1 s, result ignored."""

    lease: int


@attrs.frozen
class Probe:
    """Ask ``node`` through its control RPC whether it could start ``vm`` now: its shell asks every diskd
    in ``disks`` for the lease of the image (from there: it is its links that matter). The node itself may
    be the target; then no RPC. Answer within 2 s with ``ProbeAnswered``."""

    request: int
    node: str
    vm: str
    disks: tuple[Disk, ...]


@attrs.frozen
class AcquireLeases:
    """diskd ``lease.acquire`` with ``epoch`` and ``holder`` for each disk, in order, stopping at the first
    that fails. Answer within 5 s with ``LeasesAnswered`` (an answer for each disk tried).

    ``dead_boots``: boots of hosts that are proven dead. Where each host has a diskd of its own, this one may
    take images from those of such hosts, and from living ones that hand them over, but from nobody else."""

    request: int
    vm: str
    epoch: int
    holder: str
    disks: tuple[Disk, ...]
    dead_boots: tuple[str, ...] = ()


@attrs.frozen
class ReleaseLeases:
    """diskd ``lease.release`` for each disk, once, result ignored: the run has ended."""

    vm: str
    epoch: int
    holder: str
    disks: tuple[Disk, ...]


@attrs.frozen
class LookAtImages:
    """diskd ``image.activity`` for these disks (one call per diskd). Answer within 2 s with
    ``ImagesSeen``; a disk whose diskd did not answer is missing from it."""

    request: int
    disks: tuple[Disk, ...]


@attrs.frozen
class SpawnRun:
    """Start the process of this run, detached, with a locked descriptor that it inherits (S7). The intent
    is durable already. Feed ``RunStarted`` or ``RunNotStarted``; later, when it ends, ``RunEnded``.
    If a process of exactly this (vm, epoch) lives already, do not start another: feed ``RunStarted``."""

    config: VmConfig
    epoch: int


@attrs.frozen
class AdoptRun:
    """At start: find out by the locked descriptor whether this run still lives. Feed ``RunStarted`` (and
    watch it) or ``RunEnded`` with reason."""

    config: VmConfig
    epoch: int


@attrs.frozen
class StopRun:
    """Stop the process of this run: SIGTERM, then SIGKILL after the driver's grace; with ``force`` SIGKILL
    at once (it is fenced: its writes are refused anyway). Feed ``RunEnded`` once it is really gone, also
    if it was gone before. Repeated with ``force`` if the first goes on too long."""

    vm: str
    epoch: int
    force: bool


@attrs.frozen
class CheckReferences:
    """Ping the configured reference addresses. Answer within 2 s with ``ReferencesAnswered``."""

    request: int


@attrs.frozen
class AnswerCommand:
    """Answer the operator's ``CommandGiven`` of this ticket. Refused: ``text`` is the one-line reason.
    ``is_unknown``: whether it was recorded cannot be told."""

    ticket: int
    accepted: bool
    text: str
    is_unknown: bool = False


@attrs.frozen
class NoteEvent:
    """Log this event (structlog) and keep it for ``clusterctl events``. Values are plain data."""

    name: EventName
    fields: dict[str, Any]


@attrs.frozen
class Exit:
    """The goodbye is said (or could not be): end the process with code 0. VMs are left alone."""

    reason: str


Act = (
    KeepPicture
    | ReadStore
    | WriteStore
    | GrantSession
    | KeepSession
    | RevokeSession
    | Probe
    | AcquireLeases
    | ReleaseLeases
    | LookAtImages
    | SpawnRun
    | AdoptRun
    | StopRun
    | CheckReferences
    | AnswerCommand
    | NoteEvent
    | Exit
)


@attrs.frozen
class Ready:
    """What one event led to: persist, then send, then act (``send`` may overtake ``persist``)."""

    persist: Persist | None = None
    send: tuple[SendHeartbeat, ...] = ()
    act: tuple[Act, ...] = ()


NOTHING: Final = Ready()

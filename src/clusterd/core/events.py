"""What the shell tells the core. Past tense: it has happened. The effects say which event answers which.

Answers to requests that the core has forgotten (it changed its mind) are ignored: feed them anyway.
"""

import attrs

from clusterd.core.commands import Command
from clusterd.core.types import Disk


@attrs.frozen
class Started:
    """Once, first. ``now`` of this call is where the node's time begins."""


@attrs.frozen
class DeadlineReached:
    """``next_deadline()`` is at or before now. Harmless when early."""


@attrs.frozen
class DatagramReceived:
    """Raw bytes from a heartbeat socket; anything may be in there."""

    network: str
    data: bytes


@attrs.frozen
class LoopStalled:
    """The shell's own loop stood still for this long. Feed after draining the sockets, before deadlines."""

    duration_ns: int


@attrs.frozen
class Persisted:
    ticket: int


@attrs.frozen
class StoreEntry:
    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease: int = 0


@attrs.frozen
class StoreSnapshot:
    """Answer to ReadStore. ``revision`` is the store's at the time of the read."""

    request: int
    revision: int
    entries: tuple[StoreEntry, ...]


@attrs.frozen
class StoreWritten:
    """Answer to WriteStore. ``revision`` as in the response header."""

    request: int
    succeeded: bool
    revision: int


@attrs.frozen
class SessionGranted:
    request: int
    lease: int


@attrs.frozen
class SessionKept:
    """Answer to KeepSession; ``alive`` False: the lease is gone."""

    request: int
    alive: bool


@attrs.frozen
class StoreFailed:
    """No usable answer to a store request, whatever the shape of the error: unknown (S3)."""

    request: int
    reason: str


@attrs.frozen
class ProbeAnswered:
    """``epochs``: image -> the newest epoch its diskd showed. ``reached``: node and all diskds answered."""

    request: int
    reached: bool
    reason: str
    epochs: dict[str, int]


@attrs.frozen
class LeaseAnswer:
    """``outcome``: ``acquired``, ``refused`` (then ``epoch`` is the newest that diskd holds, 0 if it did
    not say) or ``unanswered``."""

    image: str
    outcome: str
    epoch: int
    reason: str = ""


@attrs.frozen
class LeasesAnswered:
    request: int
    answers: tuple[LeaseAnswer, ...]


@attrs.frozen
class ImageLook:
    disk: Disk
    epoch: int
    holder: str | None
    last_io_age_ns: int | None


@attrs.frozen
class ImagesSeen:
    request: int
    looks: tuple[ImageLook, ...]


@attrs.frozen
class RunStarted:
    """The process of this run lives (spawned or adopted) and is being watched."""

    vm: str
    epoch: int
    pid: int


@attrs.frozen
class RunNotStarted:
    vm: str
    epoch: int
    reason: str


@attrs.frozen
class RunEnded:
    """The process of this run is certainly gone. ``exit_code`` None: not known."""

    vm: str
    epoch: int
    exit_code: int | None
    reason: str


@attrs.frozen
class ReferencesAnswered:
    request: int
    any_answered: bool


@attrs.frozen
class CommandGiven:
    """An operator's command; the core answers with AnswerCommand for this ticket, once."""

    ticket: int
    command: Command


@attrs.frozen
class ShutdownRequested:
    """SIGTERM: say the goodbye ``restart`` and Exit; the runs go on. Exit follows within 3 s."""


Event = (
    Started
    | DeadlineReached
    | DatagramReceived
    | LoopStalled
    | Persisted
    | StoreSnapshot
    | StoreWritten
    | SessionGranted
    | SessionKept
    | StoreFailed
    | ProbeAnswered
    | LeasesAnswered
    | ImagesSeen
    | RunStarted
    | RunNotStarted
    | RunEnded
    | ReferencesAnswered
    | CommandGiven
    | ShutdownRequested
)

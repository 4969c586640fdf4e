"""Which daemon serves an image: several may share one ROOT, on one host or on several (ADR 0014).

Theory of operation. An image directory holds one *owner record*, ``owner.N``; every change of owner, of its
state and of the image's lease writes N + 1 with a step that fails where N + 1 exists, and then removes what
is older. So of several that change it at once, whatever they believed, exactly one goes on; the others find
themselves lost. The highest number is the truth. Nobody needs a lock for that, nor a common clock.

    serving   the daemon may be writing, or died while it did
    closed    it stopped cleanly; the image is still its own, but anybody may be told to open it
    released  it gave the image away: whoever is told to opens it

A kernel lock on ``owner.lock``, held by whoever serves the image, tells on one host (and over a file system
that passes locks on) whether a record that says ``serving`` is a dead daemon's. What follows of both is a
table, ``decide``. A free lock proves nothing about another host, whose writes may still be on their way:
there only the operator's word that the host is fenced counts.

The record also keeps the number of the newest change of the lease: an older copy of the lease file, put
back, is known as such (``check_lease``), and a daemon that has lost the image cannot answer a change.
"""

import re
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Final, Literal

import attrs

from daemonkit.schema import SchemaError, structure, unstructure
from diskd.core.inventory import NAME_PATTERN
from diskd.core.sealed_line import seal, unseal
from diskd.core.steps import Create, Names, Read, Remove, Script, Size
from diskd.errors import Damaged, Refused

PREFIX: Final = "owner."
LOCK_FILE: Final = "owner.lock"
RECORD_BYTES_MAX: Final = 4096
TEXT_CHARS_MAX: Final = 255
NUMBER_MAX: Final = 2**63 - 1
_VERSION: Final = 1
_FILE: Final = re.compile(r"owner\.([1-9][0-9]{0,18})", re.ASCII)
# Between the list of names and the reading of one, its owner may have replaced it.
_LOAD_TRIES_MAX: Final = 16

State = Literal["serving", "closed", "released"]
Relation = Literal["nobody", "released", "mine", "closed", "same_host", "other_host"]
Wish = Literal["start", "open"]
Verdict = Literal["open", "leave", "refuse_held", "refuse_other_host"]


class Lost(Refused):
    """This daemon does not have the image any more; the message says who has."""


@attrs.frozen
class Daemon:
    """One run of a daemon. ``instance`` is random; a boot id is of one boot, a machine id of one machine."""

    name: str
    host: str
    machine_id: str
    boot_id: str
    instance: str


@attrs.frozen
class Owner:
    """An owner record. ``since_ns``: wall clock at which this daemon took the image; only shown."""

    number: int
    state: State
    daemon: Daemon
    since_ns: int
    lease_sequence: int = 0
    lease_epoch: int = 0


# --- who may open -------------------------------------------------------------------------------------

_TABLE: Final[dict[tuple[Relation, Wish], Verdict]] = {
    ("nobody", "start"): "open",
    ("nobody", "open"): "open",
    ("mine", "start"): "open",
    ("mine", "open"): "open",
    # Somebody gave it away, or stopped: it waits for its name to be called.
    ("released", "start"): "leave",
    ("released", "open"): "open",
    ("closed", "start"): "leave",
    ("closed", "open"): "open",
    # The owner is dead, and what it had in shared memory is still there.
    ("same_host", "start"): "leave",
    ("same_host", "open"): "open",
    ("other_host", "start"): "leave",
    ("other_host", "open"): "refuse_other_host",
}


def relation(owner: Owner | None, me: Daemon) -> Relation:
    """What an owner record means to this daemon."""
    if owner is None:
        return "nobody"
    if owner.state == "released":
        return "released"
    theirs = owner.daemon
    # A name on another machine is its own again after a clean stop only: two daemons may have one name.
    if theirs.name == me.name and (owner.state == "closed" or theirs.machine_id == me.machine_id):
        return "mine"
    if owner.state == "closed":
        return "closed"
    # Machine ids are cloned with disks; together with the boot id it is this very host.
    same_boot = (theirs.machine_id, theirs.boot_id) == (me.machine_id, me.boot_id)
    return "same_host" if same_boot else "other_host"


def decide(
    owner: Owner | None,
    me: Daemon,
    *,
    lock_is_free: bool,
    wish: Wish,
    fenced: str | None = None,
    dead_boots: Collection[str] = (),
) -> Verdict:
    """Whether this daemon opens an image. ``fenced``: the host that the operator says cannot write any more;
    ``dead_boots``: boot ids under which hosts were proven dead.

    A held lock is never overruled: whoever holds it lives.
    """
    if not lock_is_free:
        return "leave" if wish == "start" else "refuse_held"
    verdict = _TABLE[relation(owner, me), wish]
    if verdict == "refuse_other_host" and owner is not None:
        daemon = owner.daemon
        return "open" if fenced == daemon.host or daemon.boot_id in dead_boots else verdict
    return verdict


def describe(owner: Owner | None, control: str | None = None) -> str:
    """Who has the image, in one phrase. ``control``: where that daemon answers, if that is known."""
    if owner is None:
        return "nobody"
    since = datetime.fromtimestamp(owner.since_ns // 10**9, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    reached = f", control {control}" if control is not None else ""
    return f"diskd {owner.daemon.name} on host {owner.daemon.host} (since {since}{reached})"


def refusal(
    image: str, verdict: Verdict, owner: Owner | None, control: str | None, fenced: str | None
) -> str:
    """The one line for an image that may not be opened now: what, why, what to do."""
    if owner is None:
        return f"image {image} is just being opened by another diskd: ask again"
    who = describe(owner, control)
    there = f"diskctl --control {control or 'THERE'} image release {image}"
    if verdict == "refuse_held":
        return f"image {image} is served by {who}: release it there first ({there})"
    host = owner.daemon.host
    text = f"image {image} belongs to {who}, which has not released it: release it there ({there})"
    if fenced is not None:
        return f"{text}; --fenced {fenced} names another host than {host}"
    return (
        f"{text}; only if {host} is certainly down or cut off from this storage: "
        f"diskctl image open {image} --fenced {host}"
    )


# --- the record ---------------------------------------------------------------------------------------


def file_name(number: int) -> str:
    """Where the record of that number lies."""
    return f"{PREFIX}{number}"


def encode(owner: Owner) -> bytes:
    """One JSON line and its CRC-32."""
    return seal(_VERSION, unstructure(owner))


def decode(data: bytes, number: int) -> Owner:
    """Raises Damaged: an image whose owner is unknown must not be opened."""
    try:
        owner = structure(Owner, unseal(_VERSION, data))
        if not _is_well_formed(owner) or owner.number != number:
            raise ValueError("fields")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, SchemaError) as error:
        raise Damaged(
            f"{file_name(number)} is damaged ({error}): remove it only if no other diskd serves the image"
        ) from error
    return owner


def _is_well_formed(owner: Owner) -> bool:
    texts = [owner.daemon.host, owner.daemon.machine_id, owner.daemon.boot_id, owner.daemon.instance]
    numbers = [owner.number - 1, owner.since_ns, owner.lease_sequence, owner.lease_epoch]
    return (
        NAME_PATTERN.fullmatch(owner.daemon.name) is not None
        and all(0 < len(text) <= TEXT_CHARS_MAX and text.isprintable() for text in texts)
        and all(0 <= number < NUMBER_MAX for number in numbers)
    )


def _numbers() -> Script[list[int]]:
    """Of all records, ascending."""
    found: list[int] = []
    for name in (yield Names(PREFIX)):
        match = _FILE.fullmatch(name)
        if match is not None:
            found.append(int(match[1]))
    return sorted(found)


def load() -> Script[Owner | None]:
    """The newest record, or None where there was never one. Raises Damaged, OSError."""
    failure: OSError | None = None
    for _ in range(_LOAD_TRIES_MAX):
        numbers = yield from _numbers()
        if not numbers:
            return None
        try:
            data = yield Read(file_name(numbers[-1]), 0, RECORD_BYTES_MAX)
        except FileNotFoundError as error:
            failure = error
            continue
        return decode(data, numbers[-1])
    raise OSError("the owner record changes all the time") from failure


def _whoever_has_it() -> Script[Owner | None]:
    """The newest record, where it should be this daemon's. Raises Lost where nobody can tell whose it is."""
    try:
        return (yield from load())
    except Damaged as error:
        raise Lost(f"another record took its place: {error}") from error


def write(owner: Owner) -> Script[Owner]:
    """Make ``owner`` the newest record, durably. Raises Lost where somebody else was quicker.

    A record of our own in its way is what an earlier try left, which failed after it was written.
    """
    while True:
        name = file_name(owner.number)
        newest: Owner | None = None
        try:
            yield Create(name, encode(owner))
        except (FileExistsError, FileNotFoundError):  # the latter: its half was swept with the rest
            newest = yield from _whoever_has_it()
            if newest is None or newest.daemon.instance != owner.daemon.instance:
                raise Lost(f"another diskd took it: {describe(newest)}") from None
            owner = attrs.evolve(owner, number=newest.number + 1)
            continue
        numbers = yield from _numbers()
        if numbers[-1] != owner.number:
            # We slept while others came and went, and made a number that was swept long ago.
            yield Remove(name)
            raise Lost(f"another diskd took it: {describe((yield from _whoever_has_it()))}")
        for number in numbers[:-1]:  # the oldest first: where N is gone, everything before it is
            yield Remove(file_name(number))
        return owner


def take(found: Owner | None, me: Daemon, now_ns: int) -> Script[Owner]:
    """Become the owner after ``found``. Raises Lost."""
    if found is None:
        return (yield from write(Owner(1, "serving", me, now_ns)))
    mine = attrs.evolve(found, number=found.number + 1, state="serving", daemon=me, since_ns=now_ns)
    return (yield from write(mine))


def leave(owner: Owner, state: State) -> Script[Owner]:
    """Stop being the one that serves. Raises Lost."""
    return (yield from write(attrs.evolve(owner, number=owner.number + 1, state=state)))


def note_lease(owner: Owner, sequence: int, epoch: int) -> Script[Owner]:
    """Remember the newest change of the lease, before it is answered. Raises Lost."""
    changed = attrs.evolve(owner, number=owner.number + 1, lease_sequence=sequence, lease_epoch=epoch)
    return (yield from write(changed))


def check(owner: Owner) -> Script[Owner]:
    """The newest record, which is this daemon's. Raises Lost. Cheap: two looks at names."""
    gone = (yield Size(file_name(owner.number))) is None
    followed = (yield Size(file_name(owner.number + 1))) is not None
    if not gone and not followed:
        return owner
    newest = yield from _whoever_has_it()
    if newest is None or newest.number < owner.number:
        raise Lost("its owner record is gone")
    if newest.daemon.instance != owner.daemon.instance:
        raise Lost(f"it was taken over: {describe(newest)}")
    return newest


def check_lease(owner: Owner, sequence: int, epoch: int) -> None:
    """Raises Damaged where the lease file is older than the owner record knows."""
    if sequence < owner.lease_sequence or epoch < owner.lease_epoch:
        raise Damaged(
            f"the lease file is an older copy: it says epoch {epoch} (change {sequence}), but epoch "
            f"{owner.lease_epoch} (change {owner.lease_sequence}) was given out; put the newest one back, "
            "or, if no run can still reach the image, open it with --lost-lease"
        )

"""The lease of one image: who may write, under which epoch (rule S1).

Theory of operation. An epoch names one run of a VM. Taking a lease with a higher epoch *fences* every
older one: the shell makes the new state durable (``persist``), raises it in memory, waits for every
submitted call of older epochs, drops their connections, and only then answers. Until it is durable nothing
has changed; once it is, no restart can bring an older epoch back.

    free      epoch 0, or released       plain ``IMAGE`` may write (it counts as epoch 0)
    held      (epoch, holder)            exactly ``IMAGE@epoch`` may read and write
    prepared  beside either              ``IMAGE@prepared`` may connect and read; its writes get EPERM

Epochs never go down: release keeps the epoch, and the same epoch cannot be acquired again afterwards,
since a delayed copy of an old request must never bring an ended run back.
"""

import errno
from collections.abc import Callable
from typing import Any, Final

import attrs

from daemonkit.diskd_api import Lease
from diskd.core import ownership
from diskd.core.ownership import Daemon, Owner
from diskd.core.sealed_line import seal, unseal
from diskd.core.steps import Read, Replace, Script, Size
from diskd.errors import Damaged, Fenced, Refused

EPOCH_MAX: Final = 2**63 - 1  # what every store and language on the way can carry
HOLDER_CHARS_MAX: Final = 255
LEASE_FILE: Final = "lease"
LEASE_FILE_BYTES_MAX: Final = 4096
_VERSION: Final = 1
_LOST_HOLDER: Final = "lost"
_REMEDY: Final = "if no run can still reach the image, open it with --lost-lease"


@attrs.frozen
class LeaseState:
    """The durable state. ``holder`` stays visible after release; ``released`` says nobody holds it now."""

    epoch: int = 0
    holder: str | None = None
    released: bool = False
    prepared: int | None = None
    prepared_holder: str | None = None
    sequence: int = 0  # counts the changes, so that an older copy of the file is known as one

    @property
    def is_free(self) -> bool:
        """Nobody holds a lease, so plain ``IMAGE`` may write."""
        return self.epoch == 0 or self.released

    def show(self, image: str) -> Lease:
        """As the control answers it."""
        return Lease(image, self.epoch, None if self.released else self.holder, self.released, self.prepared)


@attrs.frozen
class Claim:
    """What one connection was opened under: ``epoch`` is None for plain ``IMAGE``, then ``seen`` is the
    image's epoch at that moment (a lease taken and released since fences it all the same)."""

    epoch: int | None
    seen: int = 0


def check_epoch(epoch: int) -> int:
    """``epoch`` if it is one; raises Refused."""
    if not 0 < epoch <= EPOCH_MAX:
        raise Refused(f"epoch {epoch} is not between 1 and {EPOCH_MAX}")
    return epoch


def parse_epoch(text: str) -> int | None:
    """The epoch that ``text`` writes in canonical decimal (no sign, no leading zero), else None."""
    if not text.isascii() or not text.isdigit() or text[0] == "0" or len(text) > 19:
        return None
    epoch = int(text)
    return epoch if epoch <= EPOCH_MAX else None


def _check_request(epoch: int, holder: str) -> None:
    check_epoch(epoch)
    if not holder or len(holder) > HOLDER_CHARS_MAX or not holder.isprintable():
        raise Refused(f"a lease holder is 1 to {HOLDER_CHARS_MAX} printable characters")


def acquire(state: LeaseState, epoch: int, holder: str) -> LeaseState:
    """The state after ``holder`` took ``epoch``; ``state`` itself where it holds exactly that already.

    Raises Refused for every other epoch at or below the current one, whoever asks.
    """
    _check_request(epoch, holder)
    if epoch == state.epoch and holder == state.holder and not state.released:
        return state
    if epoch <= state.epoch:
        raise Refused(
            f"epoch {epoch} is refused: the image is at epoch {state.epoch} ({_whose(state)}); "
            f"acquire with a higher one"
        )
    if epoch == state.prepared and holder != state.prepared_holder:
        raise Refused(f"epoch {epoch} is prepared for {state.prepared_holder}; acquire with a higher one")
    still_ahead = state.prepared is not None and state.prepared > epoch
    return LeaseState(
        epoch=epoch,
        holder=holder,
        prepared=state.prepared if still_ahead else None,
        prepared_holder=state.prepared_holder if still_ahead else None,
    )


def prepare(state: LeaseState, epoch: int, holder: str) -> LeaseState:
    """The state in which ``epoch`` may connect and read. Raises Refused at or below what is known."""
    _check_request(epoch, holder)
    if epoch == state.prepared and holder == state.prepared_holder:
        return state
    if epoch <= state.epoch:
        raise Refused(f"epoch {epoch} cannot be prepared: the image is at epoch {state.epoch}")
    if state.prepared is not None and epoch <= state.prepared:
        raise Refused(f"epoch {epoch} cannot be prepared: {state.prepared} is, for {state.prepared_holder}")
    return attrs.evolve(state, prepared=epoch, prepared_holder=holder)


def release(state: LeaseState, epoch: int, holder: str) -> LeaseState:
    """The state after the holder let go of a held or prepared epoch; releasing twice changes nothing."""
    _check_request(epoch, holder)
    if epoch == state.prepared and holder == state.prepared_holder:
        return attrs.evolve(state, prepared=None, prepared_holder=None)
    if epoch != state.epoch or holder != state.holder:
        raise Refused(
            f"{holder} does not hold epoch {epoch}: the image is at {state.epoch} ({_whose(state)})"
        )
    return state if state.released else attrs.evolve(state, released=True)


def _whose(state: LeaseState) -> str:
    if state.epoch == 0:
        return "never leased"
    return f"released by {state.holder}" if state.released else f"held by {state.holder}"


def admit(state: LeaseState, epoch: int | None) -> Claim:
    """The claim of a connection to ``IMAGE`` (None) or ``IMAGE@epoch``. Raises Refused: a policy answer."""
    if epoch is None:
        if not state.is_free:
            raise Refused(f"the image is under lease: epoch {state.epoch}, {state.holder}")
        return Claim(None, state.epoch)
    if epoch == state.prepared or (epoch == state.epoch and not state.released):
        return Claim(epoch)
    raise Refused(f"epoch {epoch} is not the lease of this image: it is at {state.epoch} ({_whose(state)})")


def check_read(state: LeaseState, claim: Claim) -> None:
    """Raises Fenced unless the claim may read now."""
    if claim.epoch is None:
        if not state.is_free or claim.seen != state.epoch:
            raise Fenced(f"the image was leased since: epoch {state.epoch}")
    elif claim.epoch != state.prepared and (claim.epoch != state.epoch or state.released):
        raise Fenced(f"epoch {claim.epoch} is fenced: the image is at epoch {state.epoch}")


def check_write(state: LeaseState, claim: Claim) -> None:
    """Raises Fenced unless the claim may read now, PermissionError (EPERM) where it is only prepared."""
    check_read(state, claim)
    if claim.epoch is not None and claim.epoch != state.epoch:
        raise PermissionError(errno.EPERM, f"epoch {claim.epoch} is prepared, not acquired")


def encode(state: LeaseState) -> bytes:
    """One JSON line and its CRC-32, so that a person can read it and a damaged one is known as such."""
    return seal(_VERSION, attrs.asdict(state))


def decode(data: bytes) -> LeaseState:
    """Raises Damaged: an image whose epoch is unknown must not be written to."""
    try:
        state = LeaseState(**unseal(_VERSION, data))
        if not _is_well_formed(state):
            raise ValueError("fields")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Damaged(f"the lease file is damaged ({error}): {_REMEDY}") from error
    return state


def _is_well_formed(state: LeaseState) -> bool:
    def is_epoch(value: Any, lowest: int) -> bool:
        return type(value) is int and lowest <= value <= EPOCH_MAX

    def is_holder(value: Any, *, present: bool) -> bool:
        return (type(value) is str and 0 < len(value) <= HOLDER_CHARS_MAX) if present else value is None

    return (
        is_epoch(state.epoch, 0)
        and is_holder(state.holder, present=state.epoch > 0)
        and type(state.released) is bool
        and not (state.released and state.epoch == 0)
        and (state.prepared is None or is_epoch(state.prepared, state.epoch + 1))
        and is_holder(state.prepared_holder, present=state.prepared is not None)
        and type(state.sequence) is int
        and 0 <= state.sequence <= EPOCH_MAX
    )


def persist(state: LeaseState) -> Script[None]:
    """Old or new after a crash, never a mixture, never absent again."""
    yield Replace(LEASE_FILE, encode(state))


def found(me: Daemon, now_ns: int) -> Script[Owner]:
    """What a new image begins with: never leased, and its maker's."""
    yield from persist(LeaseState())
    return (yield from ownership.take(None, me, now_ns))


def load() -> Script[LeaseState]:
    """What is durable. Raises Damaged, also where the file is absent: every image is created with one, and
    taking a lost one for "never leased" would let epochs go down."""
    size = yield Size(LEASE_FILE)
    if size is None:
        raise Damaged(
            "the lease file is missing: if no run can still reach the image, open it with --lost-lease"
        )
    if size > LEASE_FILE_BYTES_MAX:
        raise Damaged(f"the lease file is damaged: {size} bytes long: {_REMEDY}")
    return decode((yield Read(LEASE_FILE, 0, LEASE_FILE_BYTES_MAX)))


Decision = Callable[[LeaseState, int, str], LeaseState]


def change(state: LeaseState, decision: Decision, epoch: int, holder: str) -> Script[LeaseState]:
    """Decide, and make a new state durable before it is returned: nobody hears of it earlier (S1)."""
    new = decision(state, epoch, holder)
    if new is not state:
        new = attrs.evolve(new, sequence=state.sequence + 1)
        yield from persist(new)
    return new


def change_owned(
    owner: Owner, state: LeaseState, decision: Decision, epoch: int, holder: str
) -> Script[tuple[Owner, LeaseState]]:
    """``change`` by the daemon that owns the image. The owner record goes last: so it never knows of a change
    that the lease file may lack, and nobody hears of one by a daemon that has lost the image. Raises Lost."""
    owner = yield from ownership.check(owner)
    new = yield from change(state, decision, epoch, holder)
    if new is not state:
        owner = yield from ownership.note_lease(owner, new.sequence, new.epoch)
    return owner, new


def replace_lost(owner: Owner) -> Script[tuple[Owner, LeaseState]]:
    """A lease in place of one that is lost, damaged or older than it should be: nobody's, at the highest
    epoch that was ever answered. To be done on an operator's word only."""
    epoch = owner.lease_epoch
    holder = _LOST_HOLDER if epoch else None
    state = LeaseState(epoch, holder, released=epoch > 0, sequence=owner.lease_sequence + 1)
    yield from persist(state)
    return (yield from ownership.note_lease(owner, state.sequence, epoch)), state

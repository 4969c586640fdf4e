"""A checkpoint of one VM: the states of its life, its durable record, and what a restart makes of it.

Theory of operation. One record per checkpoint, replaced atomically, speaks for all disks of the VM (B1):

    preparing   AVHDs and maps are being made, then the cut is made in memory. A crash here means that the
                cut never happened: both intervals are joined, the AVHDs merged.
    sealed      the frozen bitmaps and the parents are durable: the frozen view exists, and survives a crash
    ending      the outcome is decided: points are validated, forgotten or left pending; redone after a crash
    merging     the points are settled, AVHDs are still being merged; the outcome "keep" has been answered
    pending     merged; the point's acknowledgement was lost, and the next contact with the target settles it
    (gone)      no record

    preparing --sealed--> sealed --end--> ending --points_settled--> merging --merged--> gone
        \\--end: discard--> ending
    merging, where the outcome is "pending" --merged--> pending --settle--> ending

*Invalid* is a flag beside the state (B2): a write that an AVHD could not take is about to go to the parent,
so nobody may be handed frozen bytes any more. It is one 512-byte record in a file written in full when the
checkpoint began, so that setting it needs no space. Merging starts at once; the outcome is still the
exporter's to say: what was read before the flag was set is good, and the cut in the tracking is untouched.

After a restart nobody holds a checkpoint any more. It stands for ``checkpoint_resume_timeout``, so that a
backup can go on (``diskctl backup --resume``), or the reader of one begun by hand can come back and end it.
Then it is given up and merged: one begun by hand is discarded; of a backup's the point is left *pending*,
since its target may have committed.
"""

import struct
import zlib
from typing import Final, Literal

import attrs

from daemonkit.errors import InvariantBroken
from daemonkit.schema import SchemaError, structure, unstructure
from diskd.core.inventory import (
    CHECKPOINT_PATTERN,
    CONFIG_BYTES_MAX,
    DISKS_MAX,
    NAME_PATTERN,
    POINT_PATTERN,
    REPOSITORY_ID_LENGTH_MAX,
    HeldBy,
    Outcome,
)
from diskd.core.sealed_line import seal, unseal
from diskd.core.steps import Read, Remove, Replace, Script, Size, Sync, Truncate, Write
from diskd.errors import Damaged, Refused

State = Literal["preparing", "sealed", "ending", "merging", "pending", "gone"]
Event = Literal["sealed", "end", "points_settled", "merged", "settle"]

RECORD_FILE: Final = "record"
INVALID_FILE: Final = "invalid"
RECORD_BYTES_MAX: Final = 2 * CONFIG_BYTES_MAX + (64 << 10)  # JSON may escape every byte of the config once
_FLAG_BYTES: Final = 512
_FLAG: Final = struct.Struct(">8s32sI")
_FLAG_MAGIC: Final = b"HFINVAL1"
_VERSION: Final = 1

# The outcome "pending" leaves a record behind; the two others do not.
_TRANSITIONS: Final[dict[tuple[State, Event], State]] = {
    ("preparing", "sealed"): "sealed",
    ("preparing", "end"): "ending",
    ("sealed", "end"): "ending",
    ("ending", "points_settled"): "merging",
    ("merging", "merged"): "gone",
    ("pending", "settle"): "ending",
    # Settled while its AVHDs are still being merged: the target answered quickly.
    ("merging", "settle"): "ending",
}


@attrs.frozen
class RecordDisk:
    """``name`` in the VM's configuration, ``image`` here, and the image's uuid: a namesake is not it."""

    name: str
    image: str
    uuid: str


@attrs.frozen
class Record:
    """What is durable of a checkpoint. ``created_ns`` is wall-clock time: it orders, and is shown."""

    checkpoint: str
    vm: str
    point: str
    held_by: HeldBy
    consistency: str
    created_ns: int
    config: str
    disks: list[RecordDisk]
    state: State = "preparing"
    outcome: Outcome | None = None
    target: str | None = None  # the repository that a backup goes to: only that one can settle the point

    @property
    def is_standing(self) -> bool:
        """The frozen view is, or is about to be, somebody's."""
        return self.state in ("preparing", "sealed")

    @property
    def is_pending(self) -> bool:
        """Its point waits for the target's word (B3)."""
        return self.outcome == "pending" and self.state in ("merging", "pending")

    def waits_for(self, vm: str, target: str) -> bool:
        """Its point waits for this target's word, or for whoever's where that was not recorded."""
        return self.is_pending and self.vm == vm and self.target in (None, target)


def advance(record: Record, event: Event, outcome: Outcome | None = None) -> Record:
    """The record after ``event``. ``outcome`` goes with "end" and "settle". Raises Refused for an end that
    comes too late, InvariantBroken for what is not in the table."""
    if event == "end" and not record.is_standing:
        raise Refused(f"checkpoint {record.checkpoint} has ended already ({record.outcome})")
    if event == "settle" and not record.is_pending:
        raise Refused(f"point {record.point} is not pending")
    state = _TRANSITIONS.get((record.state, event))
    if state is None:
        raise InvariantBroken(f"checkpoint {record.checkpoint}: {event} in state {record.state}")
    if event == "end" and record.state == "preparing" and outcome != "discard":
        raise InvariantBroken(f"checkpoint {record.checkpoint}: only a sealed one can be kept")
    if state == "gone" and record.outcome == "pending":
        state = "pending"
    return attrs.evolve(record, state=state, outcome=outcome or record.outcome)


@attrs.frozen
class Recovery:
    """What a restart does with a record: ``end`` it so (None: leave its state), or keep it ``standing``."""

    end: Outcome | None
    standing: bool


def recover(record: Record, *, invalid: bool) -> Recovery:
    """The decision for one record found at the start."""
    if record.state == "preparing":
        return Recovery("discard", standing=False)
    if record.state != "sealed":
        return Recovery(None, standing=False)
    return Recovery(given_up(record) if invalid else None, standing=not invalid)


def given_up(record: Record) -> Outcome:
    """How a sealed checkpoint ends that nobody came back for: of a backup's point, its target has the last
    word (B3)."""
    return "pending" if record.held_by == "backup" else "discard"


def encode_record(record: Record) -> bytes:
    """One JSON line and its CRC-32."""
    return seal(_VERSION, unstructure(record))


def decode_record(data: bytes) -> Record:
    """Raises Damaged."""
    try:
        record = structure(Record, unseal(_VERSION, data))
        if CHECKPOINT_PATTERN.fullmatch(record.checkpoint) is None or not _is_well_formed(record):
            raise ValueError("fields")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, SchemaError) as error:
        raise Damaged(f"a checkpoint's record is damaged ({error})") from error
    return record


def _is_well_formed(record: Record) -> bool:
    names = [record.vm, *(disk.name for disk in record.disks), *(disk.image for disk in record.disks)]
    return (
        POINT_PATTERN.fullmatch(record.point) is not None
        and all(NAME_PATTERN.fullmatch(name) is not None for name in names)
        and 0 < len(record.disks) <= DISKS_MAX
        and record.state != "gone"
        and (record.outcome is None) == record.is_standing
        and len(record.target or "") <= REPOSITORY_ID_LENGTH_MAX
    )


def reserve() -> Script[None]:
    """Write the flag's space in full, before anything may need it (B2)."""
    yield Truncate(INVALID_FILE, _FLAG_BYTES)
    yield Write(INVALID_FILE, 0, bytes(_FLAG_BYTES))
    yield Sync(INVALID_FILE)


def invalidate(record: Record) -> Script[None]:
    """Durable before the first byte of a fallback write reaches a parent."""
    flag = _FLAG.pack(_FLAG_MAGIC, record.checkpoint.encode(), 0)
    flag = flag[:-4] + struct.pack(">I", zlib.crc32(flag[:-4]))
    yield Write(INVALID_FILE, 0, flag + bytes(_FLAG_BYTES - len(flag)))
    yield Sync(INVALID_FILE)


def persist(record: Record) -> Script[None]:
    """Old or new after a crash. The state "gone" removes it, the record before its flag."""
    if record.state == "gone":
        yield Remove(RECORD_FILE)
        yield Remove(INVALID_FILE)
    else:
        yield Replace(RECORD_FILE, encode_record(record))


def load() -> Script[tuple[Record, bool] | None]:
    """The record and whether it is invalid; None where none was completed or it is gone.

    Anything but untouched zeroes in the flag counts as set: a torn one was on its way. Raises Damaged.
    """
    size = yield Size(RECORD_FILE)
    if size is None:
        return None
    if size > RECORD_BYTES_MAX:
        raise Damaged(f"a checkpoint's record is damaged: {size} bytes long")
    record = decode_record((yield Read(RECORD_FILE, 0, RECORD_BYTES_MAX)))
    flag = (yield Read(INVALID_FILE, 0, _FLAG_BYTES)) if (yield Size(INVALID_FILE)) is not None else b""
    return record, flag != bytes(_FLAG_BYTES)

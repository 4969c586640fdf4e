"""SAN mode: a checkpoint that lasts for seconds, and a backup that reads a snapshot of the volume afterwards.

Theory of operation. While a checkpoint is sealed, the raw files of its disks do not change: they *are* the
frozen view. So whoever can copy the volume in an instant (a storage array, btrfs, reflinks) copies just that:

    begin     the checkpoint, as for any backup: parents durable; AVHDs and maps are fdatasynced too
    creating  the record of the snapshot is durable, then its provider makes it
    standing  it is there, and the checkpoint still was when it was: the frozen view is in it. The checkpoint
              ends at once, its point *pending* (B3): the boundary in the tracking is kept, AVHDs are merged
    releasing whoever read it is done (or it never came about): the point is settled, the snapshot deleted
    (gone)    no record

    creating --created--> standing --release--> releasing --deleted--> gone
    creating --release--> releasing

The record is made before the provider is asked and removed after it has deleted the snapshot, so whatever
happens nothing is left over: at the next start the snapshot of a backup that died with the daemon is deleted,
and its point is settled with its target by id, as ever. One that was begun by hand for a third party stands
until it is ended by hand. A provider that fails leaves the VM and its points as they were.

Commands come from ROOT/san.toml, which only the daemon's own user may write; whoever asks for a backup names
a provider of that file, nothing else.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import attrs

from daemonkit.errors import InvariantBroken, OperatorError
from daemonkit.schema import structure, unstructure
from daemonkit.units import SECOND
from diskd.core.geometry import RAW
from diskd.core.inventory import CHECKPOINT_PATTERN, NAME_PATTERN, POINT_PATTERN
from diskd.core.ports import ChangeReport
from diskd.core.sealed_line import seal, unseal
from diskd.core.steps import Names, Read, Remove, Replace, Script, Size
from diskd.errors import Damaged, Refused

Kind = Literal["command", "btrfs", "reflink"]
HeldBy = Literal["backup", "hand"]
State = Literal["creating", "standing", "releasing", "gone"]
Event = Literal["created", "release", "deleted"]
Outcome = Literal["keep", "discard", "pending"]

CONFIG_FILE: Final = "san.toml"
CONFIG_BYTES_MAX: Final = 64 << 10
PROVIDERS_MAX: Final = 64
# An array takes a snapshot in seconds. Longer than an hour is a provider that hangs, and an AVHD that grows.
TIMEOUT_SECONDS_MAX: Final = 3600
RECORD_SUFFIX: Final = ".san"
RECORD_BYTES_MAX: Final = 64 << 10
RECORDS_MAX: Final = 1024
# No repository has this id: a point that a third party reads is settled by hand, never by a target.
BY_HAND: Final = "by hand"
MAPPING_FORMAT: Final = "holdfast-san-mapping"
MAPPING_VERSION: Final = 1
_VERSION: Final = 1


@attrs.frozen
class Provider:
    """One table of san.toml. ``command``: an absolute path and arguments, for kind "command". ``subvolume``:
    what is snapshotted, for "btrfs". ``directory``: where the snapshots go, for "btrfs" and "reflink"."""

    kind: Kind
    command: list[str] = attrs.field(factory=list)
    subvolume: str | None = None
    directory: str | None = None
    timeout_s: int = 60

    @property
    def timeout_ns(self) -> int:
        """How long it may take."""
        return self.timeout_s * SECOND


@attrs.frozen
class _File:
    providers: dict[str, Provider] = attrs.field(factory=dict)


def parse_providers(text: str) -> dict[str, Provider]:
    """san.toml. Raises Refused with the place."""
    try:
        found = structure(_File, tomllib.loads(text), where=CONFIG_FILE).providers
    except tomllib.TOMLDecodeError as error:
        raise Refused(f"{CONFIG_FILE}: {error}") from error
    except OperatorError as error:
        raise Refused(str(error)) from error
    if len(found) > PROVIDERS_MAX:
        raise Refused(f"{CONFIG_FILE}: more than {PROVIDERS_MAX} providers")
    for name, provider in found.items():
        if not NAME_PATTERN.fullmatch(name):
            raise Refused(f"{CONFIG_FILE}: {name[:80]!r} is not a provider's name")
        if reason := _why_not(provider):
            raise Refused(f"{CONFIG_FILE}: providers.{name}: {reason}")
    return found


def _why_not(provider: Provider) -> str | None:
    wanted = {"command": {"command"}, "btrfs": {"subvolume", "directory"}, "reflink": {"directory"}}
    for key in ("command", "subvolume", "directory"):
        value = getattr(provider, key)
        if bool(value) != (key in wanted[provider.kind]):
            return f"kind {provider.kind!r} {'needs' if not value else 'does not take'} {key}"
        if value and not (value[0] if key == "command" else value).startswith("/"):
            return f"{key} must be an absolute path"
    if not 0 < provider.timeout_s <= TIMEOUT_SECONDS_MAX:
        return f"timeout_s is from 1 to {TIMEOUT_SECONDS_MAX}"
    return None


def choose_provider(providers: Mapping[str, Provider], name: str) -> Provider:
    """Raises Refused with the names that there are."""
    if name not in providers:
        known = ", ".join(sorted(providers)) or "none"
        raise Refused(f"there is no SAN provider {name[:80]!r} in {CONFIG_FILE} (known: {known})")
    return providers[name]


@attrs.frozen
class RecordedDisk:
    """``name`` in the VM's configuration, ``image`` here."""

    name: str
    image: str


@attrs.frozen
class Record:
    """What is durable of a snapshot. ``path``: where the daemon's root is seen in it, once it stands."""

    point: str
    checkpoint: str
    vm: str
    provider: str
    held_by: HeldBy
    disks: list[RecordedDisk]
    state: State = "creating"
    path: str | None = None
    outcome: Outcome | None = None

    @property
    def snapshot(self) -> str:
        """What the provider calls it."""
        return f"holdfast-{self.point}"


_TRANSITIONS: Final[dict[tuple[State, Event], State]] = {
    ("creating", "created"): "standing",
    ("creating", "release"): "releasing",
    ("standing", "release"): "releasing",
    # Deleting failed, or the daemon died: it is done again.
    ("releasing", "release"): "releasing",
    ("releasing", "deleted"): "gone",
}


def advance(
    record: Record, event: Event, *, path: str | None = None, outcome: Outcome | None = None
) -> Record:
    """The record after ``event``. ``path`` goes with "created", ``outcome`` with the first "release". Raises
    InvariantBroken for what is not in the table."""
    state = _TRANSITIONS.get((record.state, event))
    if state is None or (event == "created") != (path is not None):
        raise InvariantBroken(f"snapshot of {record.point}: {event} in state {record.state}")
    if event == "release" and record.outcome is None and outcome is None:
        raise InvariantBroken(f"snapshot of {record.point}: released without an outcome")
    return attrs.evolve(
        record,
        state=state,
        path=path or record.path,
        outcome=record.outcome or outcome if event == "release" else record.outcome,
    )


def recover(record: Record) -> Outcome | None:
    """What a restart releases a snapshot with; None: it stands on.

    A point that a target may have committed stays pending, for that target's word. One that nobody can have
    read yet, or whose reader by hand never heard of it, is discarded.
    """
    if record.state == "releasing":
        return record.outcome
    if record.held_by == "hand":
        return None if record.state == "standing" else "discard"
    return "discard" if record.state == "creating" else "pending"


def record_file(point: str) -> str:
    """The name of its file."""
    return point + RECORD_SUFFIX


def persist(record: Record) -> Script[None]:
    """Old or new after a crash; the state "gone" removes it."""
    if record.state == "gone":
        yield Remove(record_file(record.point))
    else:
        yield Replace(record_file(record.point), seal(_VERSION, unstructure(record)))


def load() -> Script[tuple[list[Record], list[str]]]:
    """All records, and the names of the files that are none."""
    names = yield Names("rp-")
    records: list[Record] = []
    damaged: list[str] = []
    for name in names[:RECORDS_MAX]:
        size = yield Size(name)
        if not name.endswith(RECORD_SUFFIX) or size is None:
            continue
        try:
            record = decode_record((yield Read(name, 0, RECORD_BYTES_MAX)))
            if record_file(record.point) != name:
                raise Damaged(f"{name}: is the record of {record.point}")
        except Damaged:
            damaged.append(name)
        else:
            records.append(record)
    return records, damaged


def decode_record(data: bytes) -> Record:
    """Raises Damaged."""
    try:
        record = structure(Record, unseal(_VERSION, data))
        well_formed = (
            POINT_PATTERN.fullmatch(record.point) is not None
            and CHECKPOINT_PATTERN.fullmatch(record.checkpoint) is not None
            and all(NAME_PATTERN.fullmatch(name) is not None for name in (record.vm, record.provider))
            and all(NAME_PATTERN.fullmatch(disk.image) is not None for disk in record.disks)
            and record.state != "gone"
            and (record.path is not None or record.state != "standing")
            and (record.outcome is not None) == (record.state == "releasing")
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OperatorError) as error:
        raise Damaged(f"a snapshot's record is damaged ({error})") from error
    if not well_formed:
        raise Damaged("a snapshot's record is damaged (fields)")
    return record


def raw_path(image: str) -> str:
    """Where an image's raw file lies below the daemon's root, and so below the snapshot's path."""
    return f"images/{image}/{RAW}"


def create_argv(provider: Provider, snapshot: str, root: str) -> list[str]:
    """What makes a snapshot. A command prints the path at which ``root`` is seen there."""
    if provider.kind == "btrfs":
        assert provider.subvolume is not None
        where = f"{provider.directory}/{snapshot}"
        return ["btrfs", "subvolume", "snapshot", "-r", provider.subvolume, where]
    return [*provider.command, "create", snapshot, root]


def delete_argv(provider: Provider, snapshot: str, root: str) -> list[str]:
    """What deletes one; a command succeeds where there is none (any more)."""
    if provider.kind == "btrfs":
        return ["btrfs", "subvolume", "delete", f"{provider.directory}/{snapshot}"]
    return [*provider.command, "delete", snapshot, root]


def seen_at(provider: Provider, snapshot: str, root: str, said: str) -> str:
    """Where the daemon's root is seen in a snapshot. ``said``: what the command printed. Raises Refused."""
    if provider.kind == "reflink":
        return f"{provider.directory}/{snapshot}"
    if provider.kind == "btrfs":
        assert provider.subvolume is not None
        subvolume = provider.subvolume.rstrip("/")
        if root != subvolume and not root.startswith(subvolume + "/"):
            raise Refused(f"{root} does not lie in the subvolume {subvolume}: correct {CONFIG_FILE}")
        return f"{provider.directory}/{snapshot}{root.removeprefix(subvolume)}"
    lines = said.split("\n")
    path = lines[0].strip()
    if not path.startswith("/") or any(line.strip() for line in lines[1:]):
        raise Refused(f"the provider's create printed {said[:80]!r} instead of one absolute path")
    return path


@attrs.frozen
class MappedDisk:
    """``raw``: the file in the snapshot that is the disk, byte for byte. ``changes``: since these points."""

    name: str
    image: str
    size_bytes: int
    block_bytes: int
    raw: str
    changes: Mapping[str, ChangeReport]


def encode_mapping(record: Record, *, config: str, consistency: str, disks: Sequence[MappedDisk]) -> str:
    """The document for third parties that read the snapshot themselves (docs/formats/san.md)."""
    document: dict[str, Any] = {
        "format": MAPPING_FORMAT,
        "version": MAPPING_VERSION,
        "vm": record.vm,
        "point": record.point,
        "provider": record.provider,
        "snapshot": record.snapshot,
        "path": record.path,
        "consistency": consistency,
        "config": config,
        "disks": [
            {
                "name": disk.name,
                "image": disk.image,
                "size_bytes": disk.size_bytes,
                "block_bytes": disk.block_bytes,
                "raw": disk.raw,
                "changes": {
                    point: {
                        "exact": report.exact,
                        "over_report_bytes": report.over_report_bytes,
                        "extents": [list(extent) for extent in report.extents],
                    }
                    for point, report in disk.changes.items()
                },
            }
            for disk in disks
        ],
    }
    return json.dumps(document)

"""What the repository knows of its points: the manifest of each, and the rules over all of them.

    ROOT/VM/POINT/manifest.json   this module's Manifest, with a digest of itself
                 /vm.toml         the VM's configuration, verbatim
                 /export.index    the export stream without its data: every frame's digest (core/stream.py)
                 /DISK.qcow2      full, or differential with backing file ../BASE/DISK.qcow2

A point exists when its directory has its final name, which is the last thing that happens to it (B5).
Nothing here does I/O: the shell reads bytes and asks.
"""

import datetime as dt
import json
from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeAlias

import attrs
from blake3 import blake3

from daemonkit.errors import OperatorError
from daemonkit.schema import structure, unstructure
from diskd.core.copy_plan import TargetPoint
from diskd.core.stream import DiskHeader, ExportHeader, ExportKind, StreamError, check_header
from diskd.errors import Damaged, Refused

MANIFEST: Final = "manifest.json"
CONFIG: Final = "vm.toml"
INDEX: Final = "export.index"
DISK_SUFFIX: Final = ".qcow2"
FORMAT: Final = "holdfast-manifest"
VERSION: Final = 1
# QEMU opens every file of a chain; longer ones also restore slowly: synthesize a full before.
CHAIN_MAX: Final = 200
INCOMING_PREFIX: Final = ".incoming-"
SYNTHETIC_PREFIX: Final = ".synthetic-"
DISCARDED_PREFIX: Final = ".discarded-"
TEMPORARY_PREFIXES: Final = (INCOMING_PREFIX, SYNTHETIC_PREFIX, DISCARDED_PREFIX)

Points: TypeAlias = Mapping[str, "Manifest"]


@attrs.frozen
class FileDigest:
    """One file of the point: its bytes, as the target wrote them (B4: the target's own checksum)."""

    name: str
    size: int
    blake3: str


@attrs.frozen
class DiskRecord:
    """One disk. ``digest`` covers the headers of its frames in the index, in order, and so its data."""

    name: str
    image: str
    virtual_size: int
    block_size: int
    cluster_size: int
    changed_bytes: int
    data_bytes: int
    exact: bool
    over_report_bytes: int
    digest: str
    file: FileDigest


@attrs.frozen
class Manifest:
    """A committed point. ``export_digest`` is the whole digest of the index; ``source_digest`` the one
    that the source computed, which differs once the point has been made a synthetic full."""

    vm: str
    point: str
    base: str | None
    kind: ExportKind
    consistency: str
    committed_at: str
    synthetic: bool
    source_digest: str
    export_digest: str
    config: FileDigest
    index: FileDigest
    disks: list[DiskRecord]

    @property
    def exact(self) -> bool:
        """True unless the source over-reported some disk's changes."""
        return all(disk.exact for disk in self.disks)

    def disk(self, name: str) -> DiskRecord:
        """Raises Refused where the point has no such disk."""
        for disk in self.disks:
            if disk.name == name:
                return disk
        raise Refused(f"{self.vm}/{self.point} has no disk {name}")


def disk_file(name: str) -> str:
    """The file's name in the point's directory."""
    return name + DISK_SUFFIX


def backing_name(base: str, disk: str) -> str:
    """The backing file as the qcow2 header names it, relative to the point's directory."""
    return f"../{base}/{disk_file(disk)}"


def encode_manifest(manifest: Manifest) -> bytes:
    """JSON for people and programs; the last member is the BLAKE3 of the rest."""
    document = {"format": FORMAT, "version": VERSION, **unstructure(manifest)}
    return (json.dumps({**document, "blake3": _digest(document)}, indent=2) + "\n").encode()


def decode_manifest(data: bytes, *, vm: str, point: str) -> Manifest:
    """The manifest in the directory VM/POINT. Raises Damaged for anything but what was written there."""
    try:
        document = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{vm}/{point}/{MANIFEST}: not JSON") from error
    if not isinstance(document, dict) or document.pop("blake3", None) != _digest(document):
        raise Damaged(f"{vm}/{point}/{MANIFEST}: does not match its own digest")
    if document.pop("format", None) != FORMAT or document.pop("version", None) != VERSION:
        raise Damaged(f"{vm}/{point}/{MANIFEST}: not a manifest of version {VERSION}")
    try:
        manifest = structure(Manifest, document, where=f"{vm}/{point}/{MANIFEST}")
        check_header(header_of(manifest, config=""))
    except (OperatorError, StreamError) as error:
        raise Damaged(str(error)) from error
    expected = {disk.name: disk_file(disk.name) for disk in manifest.disks}
    files = {disk.name: disk.file.name for disk in manifest.disks}
    names = (manifest.config.name, manifest.index.name)
    if (manifest.vm, manifest.point) != (vm, point) or files != expected or names != (CONFIG, INDEX):
        raise Damaged(f"{vm}/{point}/{MANIFEST}: belongs to another point")
    return manifest


def header_of(manifest: Manifest, *, config: str) -> ExportHeader:
    """The export header that such a point came with."""
    disks = [
        DiskHeader(
            disk.name,
            disk.image,
            disk.virtual_size,
            disk.block_size,
            disk.cluster_size,
            disk.changed_bytes,
            disk.exact,
            disk.over_report_bytes,
        )
        for disk in manifest.disks
    ]
    return ExportHeader(
        manifest.vm, manifest.point, manifest.base, manifest.kind, manifest.consistency, config, disks
    )


def _digest(document: Mapping[str, Any]) -> str:
    return blake3(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def chain_of(points: Points, point: str) -> list[Manifest]:
    """The point, its base, and so on down to the full. Raises Refused or Damaged with the missing link."""
    chain: list[Manifest] = []
    current: str | None = point
    while current is not None:
        if current not in points:
            if not chain:
                raise Refused(f"there is no point {point} at the target (or it is damaged: target verify)")
            raise Damaged(f"{chain[-1].vm}/{chain[-1].point}: its base {current} is missing or damaged")
        if len(chain) >= CHAIN_MAX:
            raise Damaged(f"{points[point].vm}/{point}: its chain is longer than {CHAIN_MAX} or circular")
        chain.append(points[current])
        current = points[current].base
    names = [disk.name for disk in chain[0].disks]
    for manifest in chain[1:]:
        missing = sorted(set(names) - {disk.name for disk in manifest.disks})
        if missing:
            raise Damaged(f"{manifest.vm}/{manifest.point}: has no disk {missing[0]}, which {point} needs")
    return chain


def is_restorable(points: Points, point: str) -> bool:
    """Whether its chain is complete, as far as the manifests say."""
    try:
        chain_of(points, point)
    except (Refused, Damaged):
        return False
    return True


def offered(points: Points) -> list[TargetPoint]:
    """What a source may choose as base, oldest commit first."""
    return [
        TargetPoint(manifest.point, {disk.name: disk.image for disk in manifest.disks})
        for manifest in by_commit(points.values())
        if is_restorable(points, manifest.point)
    ]


def commit_time(now: str, points: Points) -> str:
    """When a point is committed that comes after all of ``points``: now (UTC, ISO 8601), but always later
    than the newest of them, so that a clock which was set back cannot reorder a history."""
    newest = max((manifest.committed_at for manifest in points.values()), default="")
    try:
        after = dt.datetime.fromisoformat(newest) + dt.timedelta(microseconds=1) if newest else None
        current = dt.datetime.fromisoformat(now)
        later = current if after is None else max(current, after)
    except (ValueError, TypeError, OverflowError):
        return now  # An older manifest's time cannot be read: nothing to come after.
    return later.isoformat(timespec="microseconds")


def by_commit(manifests: Iterable[Manifest]) -> list[Manifest]:
    """Oldest first; where times are equal a base precedes what needs it."""
    ordered: list[Manifest] = []
    waiting = sorted(manifests, key=lambda manifest: (manifest.committed_at, manifest.point))
    present = {manifest.point for manifest in waiting}
    placed: set[str] = set()
    while waiting:
        for manifest in waiting:
            if manifest.base is None or manifest.base in placed or manifest.base not in present:
                break
        else:
            manifest = waiting[0]
        waiting.remove(manifest)
        placed.add(manifest.point)
        ordered.append(manifest)
    return ordered


def check_incoming(header: ExportHeader, points: Points) -> list[Manifest]:
    """May this export be received? The chain of its base. Raises Refused with the remedy."""
    check_header(header)
    if header.base is None:
        return []
    if header.base not in points:
        raise Refused(f"the target has no point {header.base} of {header.vm}; take a full backup: use --full")
    chain = chain_of(points, header.base)
    if len(chain) >= CHAIN_MAX:
        raise Refused(
            f"the chain below {header.base} has {len(chain)} points; synthesize a full of it first"
            f" (diskctl target synthesize {header.vm} {header.base})"
        )
    images = {known.name: known.image for known in chain[0].disks}
    for disk in header.disks:
        if disk.name not in images:
            raise Refused(f"{header.base} has no disk {disk.name}; take a full backup: use --full")
        if images[disk.name] != disk.image:
            raise Refused(
                f"disk {disk.name} was the image {images[disk.name]} in {header.base}, now it is"
                f" {disk.image}; take a full backup: use --full"
            )
    return chain


def dependants(points: Points, point: str) -> list[str]:
    """The points whose chains go through this one, oldest first: it must outlive them."""
    needing: list[str] = []
    for manifest in by_commit(points.values()):
        if manifest.base is not None and (manifest.base == point or manifest.base in needing):
            needing.append(manifest.point)
    return needing

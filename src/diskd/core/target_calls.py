"""The calls of `diskd target`, and diskd's own export; both daemons and diskctl use the same definitions.

``EXPORT`` and ``RESTORE`` are stream methods (daemonkit.rpc): after the answer the connection carries an
export stream, to the target or from it (docs/formats/export-stream.md). ``AUDIT`` is one too: questions and
answers of core/audit.py. ``AUDIT_RUN`` and ``EXPORT_IMAGE`` are diskd's.
"""

from typing import Final

import attrs

from daemonkit.diskd_api import BackupDisk
from daemonkit.methods import Method
from diskd.core.retention import Keep, Verdict
from diskd.core.stream import ExportKind


@attrs.frozen
class Nothing:
    """No parameters, or no result beyond the fact that it is done."""


@attrs.frozen
class VmName:
    """A VM, or all of them."""

    vm: str | None


@attrs.frozen
class PointName:
    """A VM's point."""

    vm: str
    point: str


@attrs.frozen
class PointFilter:
    """One point, or all points of a VM, or everything."""

    vm: str | None
    point: str | None


@attrs.frozen
class ListedDisk:
    """``file_size`` is what the file takes on the target's disk."""

    name: str
    virtual_size: int
    file_size: int


@attrs.frozen
class ListedPoint:
    """One committed point. ``damaged`` says why it cannot be restored, or is None."""

    vm: str
    point: str
    base: str | None
    kind: ExportKind | None
    synthetic: bool
    consistency: str | None
    exact: bool | None
    committed_at: str | None
    disks: list[ListedDisk]
    damaged: str | None


@attrs.frozen
class ListReport:
    """Oldest first within a VM."""

    points: list[ListedPoint]


@attrs.frozen
class OfferedPoint:
    """A point that can serve as base. ``disks``: of which image each disk was."""

    point: str
    disks: dict[str, str]


@attrs.frozen
class OfferedPoints:
    """``repository``: which one this is, whatever its address. ``known`` counts all points of the VM
    there, the damaged ones included. ``unfinished``: points (and the base of each) that a source may go on
    sending."""

    repository: str
    known: int
    points: list[OfferedPoint]
    unfinished: dict[str, str | None] = attrs.field(factory=dict)


@attrs.frozen
class ExportOptions:
    """``resume``: the source understands ``Have``, and goes on behind what the target has of this point."""

    resume: bool = False


@attrs.frozen
class SettleReport:
    """After this answer the point either is committed or never will be by that stream."""

    committed: bool


@attrs.frozen
class Verified:
    """``problems`` is empty where every byte is what the manifest and the source's digests say."""

    vm: str
    point: str
    bytes_read: int
    problems: list[str]


@attrs.frozen
class VerifyReport:
    """All that was asked for."""

    points: list[Verified]


@attrs.frozen
class SynthesizeReport:
    """``was`` is the base that the point no longer needs, or None if it was a full already. Of
    ``file_bytes``, ``shared_bytes`` take no space of their own while the chain is there (reflinks)."""

    vm: str
    point: str
    was: str | None
    file_bytes: int
    shared_bytes: int


@attrs.frozen
class ServeRequest:
    """A point over read-only NBD at ``nbd`` on the target's host, for as long as the caller stays."""

    vm: str
    point: str
    nbd: str


@attrs.frozen
class PruneRequest:
    """Keep what ``keep`` says of a VM's points; with ``dry_run`` only say what that would do."""

    vm: str
    keep: Keep
    dry_run: bool


@attrs.frozen
class PruneReport:
    """``kept`` oldest first, ``synthesized`` among them; ``removed`` in that order. ``damaged`` points are
    neither counted nor removed. ``verdicts``: every point with its reasons, oldest first."""

    vm: str
    kept: list[str]
    synthesized: list[str]
    removed: list[str]
    removed_bytes: int
    damaged: list[str]
    verdicts: list[Verdict]


@attrs.frozen
class AuditRequest:
    """``disks``: none means those of the target's newest point of the VM. ``point``: the newest that both
    sides hold, where it is None."""

    vm: str
    disks: list[BackupDisk]
    target: str
    point: str | None


@attrs.frozen
class AuditedDisk:
    """``changed_bytes`` are those that the change map names: they differ rightly and were not compared.
    ``places`` ([offset, length]) are the first of those that differ although the map does not name them."""

    name: str
    image: str
    size_bytes: int
    changed_bytes: int
    compared_bytes: int
    exact: bool
    differing_bytes: int
    places: list[list[int]]


@attrs.frozen
class AuditReport:
    """Everything outside the changes since ``point``, compared."""

    vm: str
    point: str
    seconds: float
    disks: list[AuditedDisk]


@attrs.frozen
class ExportRequest:
    """One image of a diskd, in full or since a point, to the caller. ``keep``: leave a reference point.
    ``compress_level``: of zstd; 0 for none."""

    image: str
    since: str | None
    keep: bool = True
    compress_level: int = 0


POINTS_OFFERED: Final = Method("target.points", VmName, OfferedPoints)
SETTLE: Final = Method("target.settle", PointName, SettleReport)
LIST: Final = Method("target.list", VmName, ListReport)
VERIFY: Final = Method("target.verify", PointFilter, VerifyReport)
SYNTHESIZE: Final = Method("target.synthesize", PointName, SynthesizeReport)
PRUNE: Final = Method("target.prune", PruneRequest, PruneReport)
SERVE: Final = Method("target.serve", ServeRequest, Nothing)
AUDIT: Final = Method("target.audit", PointName, Nothing)
EXPORT: Final = Method("target.export", ExportOptions, Nothing)
RESTORE: Final = Method("target.restore", PointName, Nothing)
EXPORT_IMAGE: Final = Method("export.image", ExportRequest, Nothing)
AUDIT_RUN: Final = Method("audit.run", AuditRequest, AuditReport)

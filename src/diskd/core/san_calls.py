"""diskd's calls of SAN mode (core/san.py)."""

from typing import Final, Literal

import attrs

from daemonkit.diskd_api import BackupDisk, BackupReport, BackupRequest
from daemonkit.methods import Method


@attrs.frozen
class SanNothing:
    """No parameters."""


@attrs.frozen
class SanBackup:
    """``backup.run``, read from a snapshot of this provider instead of from a checkpoint that stands."""

    provider: str
    backup: BackupRequest


@attrs.frozen
class SanBegin:
    """A snapshot for a third party. ``since``: the point whose changes are told; None: the newest."""

    provider: str
    vm: str
    disks: list[BackupDisk]
    config: str
    since: str | None


@attrs.frozen
class SanEnd:
    """``keep``: the third party has all it wants, its point becomes valid. The snapshot is deleted."""

    point: str
    outcome: Literal["keep", "discard"]


@attrs.frozen
class SanEnded:
    """Done."""

    point: str


@attrs.frozen
class SanSnapshot:
    """``path``: where diskd's root is seen in it. ``mapping``: the document that tells what is where."""

    vm: str
    point: str
    provider: str
    snapshot: str
    state: str
    held_by: str
    path: str | None
    mapping: str | None


@attrs.frozen
class SanList:
    """Every snapshot that this daemon has a record of."""

    snapshots: list[SanSnapshot]


SAN_BACKUP: Final = Method("san.backup", SanBackup, BackupReport)
SAN_BEGIN: Final = Method("san.begin", SanBegin, SanSnapshot)
SAN_END: Final = Method("san.end", SanEnd, SanEnded)
SAN_LIST: Final = Method("san.list", SanNothing, SanList)

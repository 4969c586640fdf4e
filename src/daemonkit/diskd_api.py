"""The calls of diskd's control that clusterd makes; diskd and diskctl use the same definitions.

Epochs are positive integers; 0 stands for "never leased". Ages and durations are nanoseconds.
"""

from typing import Final, Literal

import attrs

from daemonkit.methods import Method

BackupMode = Literal["auto", "full", "since", "resume"]

# Levels of zstd for what goes over the wire; 0 is none. zstd itself asks for a special word for those above.
COMPRESS_LEVEL_DEFAULT: Final = 3
COMPRESS_LEVEL_MAX: Final = 19


@attrs.frozen
class LeaseRequest:
    """``holder`` is an id of the run, for example ``n1/web``: shown, and compared on equal epochs.

    ``dead_boots``, with lease.acquire: an image that is with another diskd of the same storage is brought
    here first. A living diskd is asked to hand it over, fencing every older epoch there; from a dead one it
    is taken if its host is this one, or was proven dead under one of these boot ids. None: it must be here.
    """

    image: str
    epoch: int
    holder: str
    dead_boots: list[str] | None = None


@attrs.frozen
class ImageName:
    image: str


@attrs.frozen
class Lease:
    """The newest lease of an image. ``released``: nobody holds it now; the epoch stays where it was.

    ``prepared`` is the epoch that may connect and read, but not yet write, or None.
    """

    image: str
    epoch: int
    holder: str | None
    released: bool = False
    prepared: int | None = None


@attrs.frozen
class ImageNames:
    images: list[str]


@attrs.frozen
class Activity:
    """What diskd saw of one image: evidence of life, never decisive. Of an image that another diskd of the
    same storage has, only its lease is known."""

    image: str
    epoch: int
    holder: str | None
    connections: int
    last_io_age_ns: int | None


@attrs.frozen
class ActivityReport:
    """``unknown`` lists the asked names that this diskd does not serve."""

    images: list[Activity]
    unknown: list[str]


@attrs.frozen
class BackupDisk:
    """``name`` is the disk's name in the VM's configuration; ``image`` what this diskd calls it."""

    name: str
    image: str


@attrs.frozen
class BackupRequest:
    """``since`` names the base point where mode is "since". ``config``: the VM file's text, verbatim.
    ``epoch``: of the run whose node asks, or 0: the backup is given up when its disks are leased under a
    newer one, so that nobody who takes the VM over has to wait for it. ``retry_for_ns``: how long a target
    that was lost on the way is tried again. ``allow_crash_consistent``: where a hook of ``config`` fails, the
    backup goes on without. ``compress_level``: of zstd, on the way to the target; 0 for none."""

    vm: str
    disks: list[BackupDisk]
    config: str
    target: str
    mode: BackupMode = "auto"
    since: str | None = None
    epoch: int = 0
    retry_for_ns: int = 0
    allow_crash_consistent: bool = False
    compress_level: int = 0


@attrs.frozen
class BackupDiskReport:
    """``sent_bytes``: the disk's data as it went over the wire, each frame once, compressed where it was.
    What another process had sent before this one resumed it counts at its full length."""

    image: str
    changed_bytes: int
    sent_bytes: int
    exact: bool
    digest: str


@attrs.frozen
class BackupReport:
    vm: str
    point: str
    base: str | None
    kind: Literal["full", "differential"]
    consistency: str
    seconds: float
    disks: list[BackupDiskReport]


@attrs.frozen
class RestoreRequest:
    """Copy a point of ``target`` into new images. ``images``: disk name -> the image's name, for every disk
    of the point. ``dry_run``: only say what the point holds; ``images`` is not looked at then."""

    vm: str
    point: str
    target: str
    images: dict[str, str]
    dry_run: bool = False


@attrs.frozen
class RestoredDisk:
    """``image``: what it was restored into; in a dry run, the image that it was backed up from."""

    name: str
    image: str
    size_bytes: int


@attrs.frozen
class RestoreReport:
    """``config``: the VM file's text, as backed up."""

    vm: str
    point: str
    config: str
    disks: list[RestoredDisk]
    data_bytes: int


@attrs.frozen
class DeleteImage:
    """``dry_run`` only tells what would be removed, and whether it would be refused."""

    image: str
    dry_run: bool = False


@attrs.frozen
class DeleteReport:
    """The files that were (or, dry, would be) removed."""

    paths: list[str]


LEASE_ACQUIRE: Final = Method("lease.acquire", LeaseRequest, Lease)
LEASE_PREPARE: Final = Method("lease.prepare", LeaseRequest, Lease)
LEASE_RELEASE: Final = Method("lease.release", LeaseRequest, Lease)
LEASE_SHOW: Final = Method("lease.show", ImageName, Lease)
IMAGE_ACTIVITY: Final = Method("image.activity", ImageNames, ActivityReport)
BACKUP_RUN: Final = Method("backup.run", BackupRequest, BackupReport)
IMAGE_RESTORE: Final = Method("image.restore", RestoreRequest, RestoreReport)
IMAGE_DELETE: Final = Method("image.delete", DeleteImage, DeleteReport)

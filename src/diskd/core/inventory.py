"""What the image library says about its images, points and checkpoints, and the limits it keeps."""

import re
from typing import Final, Literal

import attrs

from daemonkit.units import MINUTE, SECOND, GiB, KiB, MiB
from diskd.core.space import Reserve
from diskd.errors import Refused

NAME_PATTERN: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)
CHECKPOINT_PATTERN: Final = re.compile(r"cp-[0-9a-f]{16}", re.ASCII)
POINT_PATTERN: Final = re.compile(r"rp-[0-9a-f]{16}", re.ASCII)

# One VM's configuration travels in the checkpoint's record, which is a small file (daemonkit.durable).
CONFIG_BYTES_MAX: Final = 256 * KiB
# QEMU attaches fewer; a bound keeps one checkpoint's hold short.
DISKS_MAX: Final = 64
# A target names its repository so; ours are 32 hex digits.
REPOSITORY_ID_LENGTH_MAX: Final = 64

# With less space free no checkpoint stands: a full file system would hurt every guest.
LOW_DISK_LIMIT: Final = Reserve(percent=1)

Outcome = Literal["keep", "discard", "pending"]
HeldBy = Literal["backup", "hand"]


@attrs.frozen
class LibrarySettings:
    """The settings of DESIGN.md section 7, durations in nanoseconds."""

    tracking_flush_interval_ns: int = 5 * SECOND  # bounds what a power loss over-reports at rest
    checkpoint_resume_timeout_ns: int = 10 * MINUTE  # how long a held checkpoint survives a restart
    max_open_bytes: int = 4 * GiB  # bounds what a power loss over-reports under load
    avhd_limit_bytes: int | None = None  # per disk; None: as much as the file system gives
    merge_batch_bytes: int = 4 * MiB  # every batch costs two syncs; smaller ones while the guest is at work
    low_disk_limit: Reserve | None = LOW_DISK_LIMIT
    hooks_dir: str | None = None  # of the programs that quiesce guests; None: none is run
    hook_timeout_ns: int = 10 * SECOND  # a guest that is frozen for longer notices
    merge_rate: int | None = None  # bytes per second and image; None: what the guest leaves room for
    daemon_name: str | None = None  # of several over one root; None: the host's name
    host_name: str | None = None  # None: the system's
    machine_id_file: str | None = None  # None: the system's
    shared_dir: str | None = None  # where the mapped state lives; None: a directory of ours on tmpfs
    boot_id_file: str | None = None  # tells one boot from another; None: the kernel's


@attrs.frozen
class OwnerInfo:
    """The daemon that an image belongs to. ``control``: where it answers, if that is known."""

    daemon: str
    host: str
    state: Literal["serving", "closed", "released"]
    since_ns: int
    control: str | None


@attrs.frozen
class SpaceInfo:
    """Of the image's file system: what is free, and how little may be while a checkpoint stands. Of its AVHD
    (0 where it has none): how much it holds, and how much it may."""

    free_bytes: int
    low_disk_limit_bytes: int
    avhd_bytes: int
    avhd_limit_bytes: int | None


@attrs.frozen
class ImageInfo:
    """One image as ``image list`` and ``image show`` report it.

    ``state``: "open" (served), "released" (any daemon may open it), "elsewhere" (another daemon's) or
    "damaged"; ``reason`` says why it is not open.
    ``merge_remaining_bytes`` is None while no AVHD is being merged, ``points`` of an image that is not open,
    ``uuid`` and the sizes of one whose ``image.toml`` cannot be read.
    """

    name: str
    uuid: str | None
    size_bytes: int | None
    block_bytes: int | None
    region_bytes: int | None
    allocated_bytes: int
    state: Literal["open", "released", "elsewhere", "damaged"]
    reason: str | None
    epoch: int
    holder: str | None
    connections: int
    checkpoint: str | None
    merge_remaining_bytes: int | None
    points: int | None
    owner: OwnerInfo | None = None
    space: SpaceInfo | None = None


@attrs.frozen
class PointInfo:
    """``point list``: oldest first. ``reason`` says why a point is not valid, else None."""

    point: str
    rct_id: str
    valid: bool
    reason: str | None


@attrs.frozen
class ChangesInfo:
    """``changes --json``, as DESIGN.md section 9 fixes it."""

    image: str
    since: str
    block_size: int
    exact: bool
    over_report_bytes: int
    extents: list[tuple[int, int]]


@attrs.frozen
class CheckpointInfo:
    """``exports``: export name of the frozen view by image. ``state`` as in core.checkpoint."""

    checkpoint: str
    vm: str
    point: str
    state: str
    held_by: HeldBy
    outcome: Outcome | None
    exports: dict[str, str]


def check_name(kind: str, name: str) -> str:
    """``name`` if it may name an image, disk or VM; raises Refused with the rule."""
    if NAME_PATTERN.fullmatch(name) is None:
        raise Refused(
            f"{name!r} cannot name {kind}: use up to 63 of a-z, 0-9, '.', '_', '-', not first one of '._-'"
        )
    return name

"""The calls of diskd's control beyond those that clusterd makes (daemonkit.diskd_api): what diskctl asks.

Reports are the classes of ``core.inventory``, so that the engine and the wire say the same thing.
"""

from typing import Final, Literal

import attrs

from daemonkit.diskd_api import BackupDisk, ImageName, LeaseRequest
from daemonkit.methods import Method
from diskd.core.inventory import ChangesInfo, CheckpointInfo, ImageInfo, PointInfo
from diskd.core.statistics import DaemonVitals, StatsReport, StatsRequest

# An answer is at most 16 MiB; an extent takes up to 19 bytes of it.
CHANGES_EXTENTS_MAX: Final = 800_000


@attrs.frozen
class Nothing:
    """No parameters, or no result beyond the fact that it is done."""


@attrs.frozen
class CreateImage:
    """A new, empty image."""

    image: str
    size_bytes: int


@attrs.frozen
class ResizeImage:
    """An existing image at another size, which is not smaller."""

    image: str
    size_bytes: int


@attrs.frozen
class ImportImage:
    """A new image with a file's content. ``path`` is absolute, on diskd's host."""

    image: str
    path: str


@attrs.frozen
class ReceiveImage:
    """A new image with what the caller sends next (``core.import_stream``)."""

    image: str


@attrs.frozen
class OpenImage:
    """``fenced``: the host that certainly cannot write to the storage any more, where its diskd has not
    released the image. ``lost_lease``: no run can reach the image, whose lease is lost or too old."""

    image: str
    fenced: str | None = None
    lost_lease: bool = False


@attrs.frozen
class HeldImage:
    """The first frame on the stream of ``image.hold``: the frozen view's export name, and where to read it.
    It stands until the caller closes the stream."""

    export: str
    size_bytes: int
    nbd: str | None
    nbd_socket: str | None


@attrs.frozen
class ImageList:
    """Sorted by name."""

    images: list[ImageInfo]


@attrs.frozen
class PointName:
    """One reference point of an image."""

    image: str
    point: str


@attrs.frozen
class PointList:
    """Oldest first."""

    points: list[PointInfo]


@attrs.frozen
class BeginCheckpoint:
    """``config``: the VM file's text, or empty where the VM has none; its ``[hooks]`` quiesce the guest.
    ``allow_crash_consistent``: where a hook fails, the guest's journal will do."""

    vm: str
    disks: list[BackupDisk]
    config: str = ""
    allow_crash_consistent: bool = False


@attrs.frozen
class EndCheckpoint:
    """``keep``: its point becomes valid. ``discard``: as if it had not been tried."""

    checkpoint: str
    outcome: Literal["keep", "discard"]


@attrs.frozen
class CheckpointList:
    """Every checkpoint that has a record."""

    checkpoints: list[CheckpointInfo]


@attrs.frozen
class Copied:
    """Progress of a long call, in bytes."""

    done_bytes: int
    total_bytes: int


@attrs.frozen
class DaemonStatus:
    """``nbd`` and ``nbd_socket`` are what stock clients connect to, or None where there is none. ``closed``:
    how many of the images are not served (released, damaged, another daemon's)."""

    version: str
    pid: int
    root: str
    nbd: str | None
    nbd_socket: str | None
    connections: int
    exports: list[str]
    images: int
    closed: int
    vitals: DaemonVitals


IMAGE_CREATE: Final = Method("image.create", CreateImage, ImageInfo)
IMAGE_IMPORT: Final = Method("image.import", ImportImage, ImageInfo)
IMAGE_RECEIVE: Final = Method("image.receive", ReceiveImage, Nothing)
IMAGE_RESIZE: Final = Method("image.resize", ResizeImage, ImageInfo)
IMAGE_HOLD: Final = Method("image.hold", ImageName, Nothing)
IMAGE_LIST: Final = Method("image.list", Nothing, ImageList)
IMAGE_SHOW: Final = Method("image.show", ImageName, ImageInfo)
IMAGE_RELEASE: Final = Method("image.release", ImageName, ImageInfo)
IMAGE_OPEN: Final = Method("image.open", OpenImage, ImageInfo)
IMAGE_HAND_OVER: Final = Method("image.hand_over", LeaseRequest, Nothing)
POINT_LIST: Final = Method("point.list", ImageName, PointList)
POINT_DELETE: Final = Method("point.delete", PointName, Nothing)
CHANGES: Final = Method("changes", PointName, ChangesInfo)
CHECKPOINT_BEGIN: Final = Method("checkpoint.begin", BeginCheckpoint, CheckpointInfo)
CHECKPOINT_END: Final = Method("checkpoint.end", EndCheckpoint, Nothing)
CHECKPOINT_LIST: Final = Method("checkpoint.list", Nothing, CheckpointList)
IMAGE_STATS: Final = Method("image.stats", StatsRequest, StatsReport)
STATUS: Final = Method("status", Nothing, DaemonStatus)

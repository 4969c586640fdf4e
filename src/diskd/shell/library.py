"""All images under one root: the catalog of exports, leases, checkpoints, points, recovery and merges."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from daemonkit.diskd_api import ActivityReport, BackupDisk, Lease
from diskd.core.inventory import (
    ChangesInfo,
    CheckpointInfo,
    HeldBy,
    ImageInfo,
    LibrarySettings,
    Outcome,
    PointInfo,
)
from diskd.core.ports import Export, FrozenVm
from diskd.errors import Refused

Progress = Callable[[int, int], None]  # bytes done, bytes in total


class Library:
    """Made by ``open_library``. Every refusal is Refused (an OperatorError) with one line that says what to do.

    Implements ports.ExportCatalog: ``names``, ``open``, ``info``.
    """

    # --- exports -----------------------------------------------------------------------------------
    def names(self) -> Sequence[str]:
        """Export names that ``open`` would accept now."""
        raise Refused("not built yet")

    async def open(self, name: str, *, peer: str, drop: Callable[[str], None]) -> Export:
        """ports.ExportCatalog.open: `IMAGE`, `IMAGE@EPOCH`, `IMAGE:CHECKPOINT`."""
        raise Refused("not built yet")

    async def info(self, name: str) -> Export:
        """ports.ExportCatalog.info."""
        raise Refused("not built yet")

    # --- images ------------------------------------------------------------------------------------
    def images(self) -> list[ImageInfo]:
        """Sorted by name; damaged and released ones included."""
        raise Refused("not built yet")

    def image(self, name: str) -> ImageInfo:
        """Raises Refused where there is none of that name."""
        raise Refused("not built yet")

    async def create_image(
        self, name: str, size_bytes: int, *, block_bytes: int = 4096, region_bytes: int = 1 << 20
    ) -> ImageInfo:
        """A new, sparse, empty image."""
        raise Refused("not built yet")

    async def import_image(self, name: str, source: Path, *, progress: Progress | None = None) -> ImageInfo:
        """A new image with the content of a raw file, or of whatever ``qemu-img convert`` reads."""
        raise Refused("not built yet")

    async def delete_image(self, name: str, *, dry_run: bool = False) -> list[str]:
        """The paths that are (or, dry, would be) removed. Refused while the image is in use."""
        raise Refused("not built yet")

    async def release_image(self, name: str) -> ImageInfo:
        """Close it cleanly, so that another daemon can open it with its tracking intact."""
        raise Refused("not built yet")

    async def open_image(self, name: str) -> ImageInfo:
        """Serve a released image again."""
        raise Refused("not built yet")

    def activity(self, images: list[str]) -> ActivityReport:
        """daemonkit.diskd_api.IMAGE_ACTIVITY."""
        raise Refused("not built yet")

    # --- leases (S1) -------------------------------------------------------------------------------
    async def acquire_lease(self, image: str, epoch: int, holder: str) -> Lease:
        """Answers once the epoch is durable and every call of older epochs is finished and dropped."""
        raise Refused("not built yet")

    async def prepare_lease(self, image: str, epoch: int, holder: str) -> Lease:
        """Let ``epoch`` connect and read; its writes get EPERM until it is acquired."""
        raise Refused("not built yet")

    async def release_lease(self, image: str, epoch: int, holder: str) -> Lease:
        """The holder lets go; the epoch stays where it is."""
        raise Refused("not built yet")

    def lease(self, image: str) -> Lease:
        """The newest lease."""
        raise Refused("not built yet")

    # --- points and changes ------------------------------------------------------------------------
    def points(self, image: str) -> list[PointInfo]:
        """Oldest first, invalid and pending ones included."""
        raise Refused("not built yet")

    async def delete_point(self, image: str, point: str) -> None:
        """Join its interval with the next."""
        raise Refused("not built yet")

    def changes(self, image: str, since: str) -> ChangesInfo:
        """The changes since a valid point up to now. Raises NoSuchPoint (T4)."""
        raise Refused("not built yet")

    # --- checkpoints -------------------------------------------------------------------------------
    async def begin_checkpoint(
        self, vm: str, disks: list[BackupDisk], config: str, *, held_by: HeldBy = "backup"
    ) -> FrozenVm:
        """Fork all disks of the VM at one instant (B1); waits for an earlier merge of the same images.

        Refused while a live backup or ``checkpoint begin`` holds a checkpoint of this VM or these images.
        A checkpoint left behind by a crashed backup is abandoned first. If the caller dies without
        ``end``, its owner calls ``FrozenVm.end("discard")`` or ``("pending")``.
        """
        raise Refused("not built yet")

    async def end_checkpoint(self, checkpoint: str, outcome: Outcome) -> None:
        """``diskctl checkpoint end``: FrozenVm.end by id."""
        raise Refused("not built yet")

    def frozen(self, checkpoint: str) -> FrozenVm:
        """A standing checkpoint by id. Raises Refused where there is none."""
        raise Refused("not built yet")

    def checkpoints(self) -> list[CheckpointInfo]:
        """Every checkpoint that has a record, pending ones included."""
        raise Refused("not built yet")


@asynccontextmanager
async def open_library(root: Path, settings: LibrarySettings | None = None) -> AsyncIterator[Library]:
    """The library under ``root`` (made where absent, locked), recovered and merging in the background.

    Leaving the context closes every image cleanly. Raises OperatorError (LockHeldError, Damaged ...).
    """
    raise Refused("not built yet")
    yield Library()  # a generator needs a yield

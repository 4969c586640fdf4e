"""An open image: the device that checks the epoch, holds, marks, and then submits to its layer.

One write, in one step of the loop, without a wait between these:

    check()            the writer's epoch is still the newest (S1), else Fenced
    no hold in force   (a cut is being made, B1), else wait and start over
    tracker.admit()    every region touched is durably open and the blocks are marked (T1),
                       else open the regions (group commit) and start over
    layer.write()      submitted

``layer`` is the raw file, or while a checkpoint stands an overlay; it is chosen in the same step too.
A failed sync is final: the image answers EIO until it is reopened, and its regions stay open.
"""

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final
from uuid import UUID

import attrs
import trio

from daemonkit.units import GiB, SECOND, MiB
from diskd.core.points import Point
from diskd.core.ports import Allocation, ChangeReport, Layer

BLOCK_BYTES: Final = 4096
REGION_BYTES: Final = 1 * MiB


@attrs.frozen
class ImageSettings:
    """What the operator can set for every image (DESIGN.md section 7)."""

    # How long fine marks may live in shared memory only; also the grain of outside-change detection.
    tracking_flush_interval_ns: int = 5 * SECOND
    # Bounds what a power loss can over-report: at it, a first touch waits until a region has closed.
    max_open_bytes: int = 4 * GiB
    # A tmpfs: what survives a daemon and not a boot.
    shared_dir: Path = Path("/dev/shm")  # noqa: S108 - tmpfs is the point: it lives exactly as long as the boot
    boot_id_file: Path = Path("/proc/sys/kernel/random/boot_id")


class Writer:
    """One epoch's access to an image: a Device (ports.Device). Made by ``Image.open_writer``.

    ``check`` raises Fenced; it is called in the step of every submission and after every wait.
    """

    @property
    def size_bytes(self) -> int: ...
    @property
    def is_read_only(self) -> bool: ...
    def read_nowait(self, offset: int, length: int) -> bytes | None: ...
    async def read(self, offset: int, length: int) -> bytes: ...
    def write_nowait(self, offset: int, data: bytes | memoryview) -> bool: ...
    async def write(self, offset: int, data: bytes | memoryview, *, fua: bool = False) -> None: ...
    async def write_zeroes(
        self, offset: int, length: int, *, may_trim: bool = True, fua: bool = False
    ) -> None: ...
    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None: ...
    async def flush(self) -> None: ...
    async def allocation(self, offset: int, length: int) -> list[Allocation]: ...


class Image:
    """Everything about one open image. Use from the loop's thread; ``*_blocking`` from a worker thread."""

    name: str
    uuid: UUID
    directory: Path
    size_bytes: int
    block_bytes: int
    raw: Layer  # the parent file, always (RawLayer; also has read_into_blocking, allocation_blocking)
    layer: Layer  # where I/O goes: ``raw``, or an overlay over it. Assigned under ``held()``.
    failure: str | None  # why everything answers EIO now

    @classmethod
    async def create(
        cls,
        directory: Path,
        size_bytes: int,
        *,
        block_bytes: int = BLOCK_BYTES,
        region_bytes: int = REGION_BYTES,
    ) -> UUID:
        """Make the files of a new, empty image in ``directory`` (created; must not exist). ``image.toml`` is
        written last: without it there is no image."""
        ...

    @classmethod
    async def open(cls, directory: Path, settings: ImageSettings) -> "Image":
        """Lock, recover tracking, and be ready. Raises Refused (in use, no shared memory) or Damaged.

        The image's name is the directory's. ``layer`` is ``raw``: whoever finds a checkpoint replaces it
        before the first writer opens. Start ``run`` in a nursery afterwards.
        """
        ...

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Flush tracking every ``tracking_flush_interval`` until cancelled or closed."""
        ...

    async def close(self) -> None:
        """A clean stop: everything durable, every region closed, the shared bitmap removed (T3)."""
        ...

    def open_writer(self, check: Callable[[], None]) -> Writer:
        """Access under one epoch. ``check`` raises Fenced."""
        ...

    async def drain(self, writer: Writer) -> None:
        """Return when no call of ``writer`` is submitted any more."""
        ...

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """New writes of every writer wait; entered when those submitted are done. Keep it short."""
        yield

    def last_io_ns(self) -> int | None:
        """trio's clock (ns) at the last call of any writer, or None: evidence of life."""
        ...

    async def flush(self) -> None:
        """As a guest's FLUSH: ``layer.flush()``; a failure is final."""
        ...

    async def flush_tracking(self) -> None:
        """Make the active bitmap durable and close what can be closed (also done by ``run``)."""
        ...

    def fail(self, reason: str) -> None:
        """A sync failed: everything answers EIO until the image is reopened."""
        ...

    # Cutting a point. prepare_cut (before the hold), freeze (under the hold, memory only), persist_cut (after
    # the hold), then validate_point or delete_point. A cut that was not persisted never happened.

    async def prepare_cut(self) -> None:
        """Allocate and register the next bitmap. Raises Refused (no shared memory, too many points)."""
        ...

    def freeze(self, point: str) -> None:
        """Under ``held()``, after prepare_cut: the active bitmap becomes the frozen interval before ``point``."""
        ...

    async def cancel_cut(self) -> None:
        """After prepare_cut, frozen or not, persisted or not: as if the cut had not been tried. Idempotent."""
        ...

    async def persist_cut(self) -> None:
        """Make the frozen interval durable, fdatasync the raw file, record ``point`` as pending."""
        ...

    async def validate_point(self, point: str) -> None:
        """pending -> valid, durably. Raises NoSuchPoint."""
        ...

    async def delete_point(self, point: str) -> None:
        """Forget a point in any state, durably; the intervals on both sides join. Unknown is fine.

        This is also drop_cut of a persisted cut."""
        ...

    def points(self) -> list[Point]:
        """All points, oldest first: id, rct_id, state (pending, valid, invalid), reason, size_bytes."""
        ...

    def changes_since(self, point: str, *, until: str | None = None) -> ChangeReport:
        """The changes between two points, or between a point and now; reads side files, any thread.

        Raises NoSuchPoint with the reason and the remedy (T4). ``until`` may be pending, ``point`` must
        be valid."""
        ...

"""`image.restore` on diskd's control: a point of a target becomes new images here (clusterd's `vm restore`).

Every frame is verified before it is written, the whole digest before any image is there (B4): all disks of
the point, or none.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Protocol

import structlog
import trio

from daemonkit.diskd_api import IMAGE_RESTORE, RestoredDisk, RestoreReport, RestoreRequest
from daemonkit.ports import Address
from daemonkit.rpc import Call, Registry
from diskd.core import target_calls as calls
from diskd.core.stream import ExportHeader, Frame, FrameKind, StreamDecoder, StreamError, Trailer, is_point
from diskd.errors import Refused
from diskd.shell.restore import next_event, point_stream
from diskd.shell.writer import Writer

PROGRESS_SECONDS: Final = 0.5

log = structlog.get_logger("restore")


class NewImages(Protocol):
    """The part of shell.library.Library that a restore needs."""

    def new_images(self, sizes: Mapping[str, int]) -> AbstractAsyncContextManager[dict[str, Writer]]: ...


def register_restore(registry: Registry, images: NewImages, *, key: bytes | None = None) -> None:
    """Answer ``image.restore``. ``key`` is the cluster key for the target's listener."""

    async def restore(request: RestoreRequest, call: Call) -> RestoreReport:
        return await restore_images(images, request, key=key, call=call)

    registry.add(IMAGE_RESTORE, restore)


async def restore_images(
    images: NewImages, request: RestoreRequest, *, key: bytes | None, call: Call
) -> RestoreReport:
    """Raises Refused, OperatorError, OSError; then no image of it is left."""
    if not is_point(request.point):
        raise Refused(f"{request.point[:80]!r} is not a point: rp- and 16 hex digits")
    point = calls.PointName(request.vm, request.point)
    async with point_stream(Address.parse(request.target), point, key) as stream:
        decoder = StreamDecoder(zstd=False)
        header = await next_event(decoder, stream)
        if not isinstance(header, ExportHeader) or (header.vm, header.point) != (request.vm, request.point):
            raise StreamError("the target sent something else than was asked for")
        if header.kind != "full":
            raise StreamError("a restore is a full, this is a differential")
        if request.dry_run:
            return _report(header, {disk.name: disk.image for disk in header.disks}, 0)
        names = _names(header, request.images)
        sizes = {names[disk.name]: disk.size_bytes for disk in header.disks}
        async with images.new_images(sizes) as writers:
            in_order = [writers[names[disk.name]] for disk in header.disks]
            done = await _fill(decoder, stream, in_order, call)
    log.info("restore.done", vm=request.vm, point=request.point, images=sorted(sizes), data_bytes=done)
    return _report(header, names, done)


def _names(header: ExportHeader, images: Mapping[str, str]) -> dict[str, str]:
    """Raises Refused unless exactly the disks of the point are named, each image once."""
    disks = sorted(disk.name for disk in header.disks)
    if sorted(images) != disks:
        raise Refused(f"{header.point} has the disks {', '.join(disks)}: name an image for each of them")
    if len(set(images.values())) < len(images):
        raise Refused("two disks cannot be restored into one image")
    return dict(images)


async def _fill(decoder: StreamDecoder, stream: trio.abc.Stream, writers: list[Writer], call: Call) -> int:
    """Write every frame; the payload bytes written. A new image reads as zeroes already."""
    done, report = 0, _Pace(call)
    while isinstance(event := await next_event(decoder, stream), Frame):
        await trio.to_thread.run_sync(event.check)
        if event.header.kind is FrameKind.DATA:
            await writers[event.header.disk].write(event.header.offset, event.data)
            done += len(event.data)
            await report({"step": "restore", "done_bytes": done})
    if not isinstance(event, Trailer):
        raise StreamError("the stream has two headers")
    return done


class _Pace:
    """Progress, twice a second at most."""

    def __init__(self, call: Call, *, now: Callable[[], float] = trio.current_time) -> None:
        self._call = call
        self._now = now
        self._next = now()

    async def __call__(self, value: Any) -> None:
        if self._now() >= self._next:
            self._next = self._now() + PROGRESS_SECONDS
            await self._call.progress(value)


def _report(header: ExportHeader, names: Mapping[str, str], data_bytes: int) -> RestoreReport:
    disks = [RestoredDisk(disk.name, names[disk.name], disk.size_bytes) for disk in header.disks]
    return RestoreReport(header.vm, header.point, header.config, disks, data_bytes)

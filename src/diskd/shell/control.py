"""diskd's control calls, answered by the image library.

What each means is fixed in ``core.calls`` and, where clusterd makes it, in ``daemonkit.diskd_api``.
"""

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import attrs

from daemonkit import diskd_api as api
from daemonkit.rpc import Call, Registry
from diskd.core import calls
from diskd.core.inventory import ChangesInfo, CheckpointInfo, ImageInfo
from diskd.core.statistics import StatsReport, StatsRequest
from diskd.errors import Refused
from diskd.shell.library import Library
from diskd.shell.nbd_server import NbdServer
from diskd.shell.statistics import read_statistics
from diskd.shell.vitals import Vitals


@attrs.frozen
class Listening:
    """Where this daemon is reached, for ``status``."""

    root: Path
    nbd: str | None
    nbd_socket: str | None


def _version() -> str:
    try:
        return version("holdfast")
    except PackageNotFoundError:
        return "unknown"


class Control:
    """One method per call; ``register`` enters them all."""

    def __init__(self, library: Library, server: NbdServer, listening: Listening, vitals: Vitals) -> None:
        self._vitals = vitals
        self._library = library
        self._server = server
        self._listening = listening

    def register(self, registry: Registry) -> None:
        registry.add(api.LEASE_ACQUIRE, self._lease_acquire)
        registry.add(api.LEASE_PREPARE, self._lease_prepare)
        registry.add(api.LEASE_RELEASE, self._lease_release)
        registry.add(api.LEASE_SHOW, self._lease_show)
        registry.add(api.IMAGE_ACTIVITY, self._activity)
        registry.add(calls.IMAGE_CREATE, self._image_create)
        registry.add(calls.IMAGE_RESIZE, self._image_resize)
        registry.add(calls.IMAGE_LIST, self._image_list)
        registry.add(calls.IMAGE_SHOW, self._image_show)
        registry.add(api.IMAGE_DELETE, self._image_delete)
        registry.add(calls.IMAGE_RELEASE, self._image_release)
        registry.add(calls.IMAGE_OPEN, self._image_open)
        registry.add(calls.IMAGE_HAND_OVER, self._image_hand_over)
        registry.add(calls.POINT_LIST, self._point_list)
        registry.add(calls.POINT_DELETE, self._point_delete)
        registry.add(calls.CHANGES, self._changes)
        registry.add(calls.CHECKPOINT_BEGIN, self._checkpoint_begin)
        registry.add(calls.CHECKPOINT_END, self._checkpoint_end)
        registry.add(calls.CHECKPOINT_LIST, self._checkpoint_list)
        registry.add(calls.IMAGE_STATS, self._stats)
        registry.add(calls.STATUS, self._status)

    # --- leases

    async def _lease_acquire(self, params: api.LeaseRequest, _call: Call) -> api.Lease:
        return await self._library.acquire_lease(
            params.image, params.epoch, params.holder, dead_boots=params.dead_boots
        )

    async def _lease_prepare(self, params: api.LeaseRequest, _call: Call) -> api.Lease:
        return await self._library.prepare_lease(params.image, params.epoch, params.holder)

    async def _lease_release(self, params: api.LeaseRequest, _call: Call) -> api.Lease:
        return await self._library.release_lease(params.image, params.epoch, params.holder)

    async def _lease_show(self, params: api.ImageName, _call: Call) -> api.Lease:
        return self._library.lease(params.image)

    async def _activity(self, params: api.ImageNames, _call: Call) -> api.ActivityReport:
        return self._library.activity(params.images)

    # --- images

    async def _image_create(self, params: calls.CreateImage, _call: Call) -> ImageInfo:
        return await self._library.create_image(params.image, params.size_bytes)

    async def _image_resize(self, params: calls.ResizeImage, _call: Call) -> ImageInfo:
        return await self._library.resize_image(params.image, params.size_bytes)

    async def _image_list(self, _params: calls.Nothing, _call: Call) -> calls.ImageList:
        return calls.ImageList(self._library.images())

    async def _image_show(self, params: api.ImageName, _call: Call) -> ImageInfo:
        return self._library.image(params.image)

    async def _image_delete(self, params: api.DeleteImage, _call: Call) -> api.DeleteReport:
        return api.DeleteReport(await self._library.delete_image(params.image, dry_run=params.dry_run))

    async def _image_release(self, params: api.ImageName, _call: Call) -> ImageInfo:
        return await self._library.release_image(params.image)

    async def _image_open(self, params: calls.OpenImage, _call: Call) -> ImageInfo:
        return await self._library.open_image(
            params.image, fenced=params.fenced, lost_lease=params.lost_lease
        )

    async def _image_hand_over(self, params: api.LeaseRequest, _call: Call) -> calls.Nothing:
        await self._library.hand_over(params.image, params.epoch, params.holder)
        return calls.Nothing()

    # --- points, changes, checkpoints

    async def _point_list(self, params: api.ImageName, _call: Call) -> calls.PointList:
        return calls.PointList(self._library.points(params.image))

    async def _point_delete(self, params: calls.PointName, _call: Call) -> calls.Nothing:
        await self._library.delete_point(params.image, params.point)
        return calls.Nothing()

    async def _changes(self, params: calls.PointName, _call: Call) -> ChangesInfo:
        found = await self._library.changes(params.image, params.point)
        if len(found.extents) > calls.CHANGES_EXTENTS_MAX:
            raise Refused(
                f"{params.image} changed in {len(found.extents)} extents, more than one answer holds"
                f" ({calls.CHANGES_EXTENTS_MAX}): begin a checkpoint and read its dirty bitmap over NBD"
            )
        return found

    async def _checkpoint_begin(self, params: calls.BeginCheckpoint, _call: Call) -> CheckpointInfo:
        frozen = await self._library.begin_checkpoint(
            params.vm,
            params.disks,
            params.config,
            held_by="hand",
            allow_crash_consistent=params.allow_crash_consistent,
        )
        for info in self._library.checkpoints():
            if info.checkpoint == frozen.checkpoint:
                return info
        raise Refused(f"checkpoint {frozen.checkpoint} ended as soon as it had begun")

    async def _checkpoint_end(self, params: calls.EndCheckpoint, _call: Call) -> calls.Nothing:
        await self._library.end_checkpoint(params.checkpoint, params.outcome)
        return calls.Nothing()

    async def _checkpoint_list(self, _params: calls.Nothing, _call: Call) -> calls.CheckpointList:
        return calls.CheckpointList(self._library.checkpoints())

    async def _stats(self, params: StatsRequest, _call: Call) -> StatsReport:
        return StatsReport(read_statistics(self._library, self._server, params.images))

    async def _status(self, _params: calls.Nothing, _call: Call) -> calls.DaemonStatus:
        return self.status()

    def status(self) -> calls.DaemonStatus:
        """As ``diskctl status`` shows it."""
        images = self._library.images()
        return calls.DaemonStatus(
            version=_version(),
            pid=os.getpid(),
            root=str(self._listening.root),
            nbd=self._listening.nbd,
            nbd_socket=self._listening.nbd_socket,
            connections=self._server.connections,
            exports=list(self._library.names()),
            images=len(images),
            closed=sum(info.state != "open" for info in images),
            vitals=self._vitals.read(),
        )

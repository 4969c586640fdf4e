"""A VM in memory for the exporter: disks that change, points, checkpoints; the shape of ports.FrozenVm."""

import itertools

from diskd.core.ports import Allocation, ChangeReport
from diskd.errors import NoSuchPoint, Refused

BLOCK = 4096


class MemoryDisk:
    """A live disk. ``holes`` are blocks that were never written or were trimmed."""

    def __init__(self, image, size, *, block=BLOCK):
        self.image, self.block = image, block
        self.data = bytearray(size)
        self.allocated = set()
        self.changed = {}  # point -> blocks changed since it

    def write(self, offset, data):
        self.data[offset : offset + len(data)] = data
        self._mark(offset, len(data), self.allocated.update)

    def trim(self, offset, length):
        assert offset % self.block == 0 == length % self.block, "a part of a block is not trimmed"
        self.data[offset : offset + length] = bytes(length)
        self._mark(offset, length, self.allocated.difference_update)

    def _mark(self, offset, length, note):
        blocks = range(offset // self.block, -(-(offset + length) // self.block))
        note(blocks)
        for changed in self.changed.values():
            changed.update(blocks)


class MemoryFrozenDisk:
    def __init__(self, disk, points):
        self.image, self.block_bytes = disk.image, disk.block
        self._points = points
        self._data = bytes(disk.data)
        self._allocated = set(disk.allocated)
        self._changed = {point: set(blocks) for point, blocks in disk.changed.items()}
        self.fail_reads_at = None
        self.size_bytes = len(self._data)
        self.exact = True

    @property
    def points(self):
        return list(self._points)

    def changes_since(self, point):
        if point not in self._points:
            raise NoSuchPoint(f"{self.image}: no such point {point}; take a full backup")
        extents = []
        for block in sorted(self._changed[point]):
            start = block * self.block_bytes
            length = min(self.block_bytes, self.size_bytes - start)
            if length <= 0:
                continue
            if extents and sum(extents[-1]) == start:
                extents[-1] = (extents[-1][0], extents[-1][1] + length)
            else:
                extents.append((start, length))
        return ChangeReport(extents, self.exact, 0 if self.exact else 1 << 20)

    def allocation_blocking(self, offset, length):
        found, position, end = [], offset, offset + length
        while position < end:
            block = position // self.block_bytes
            stop = min(end, (block + 1) * self.block_bytes)
            kind = "data" if block in self._allocated else "hole"
            found.append(Allocation(position, stop - position, kind))
            position = stop
        return found

    def read_into_blocking(self, offset, buffer):
        if self.fail_reads_at is not None and offset >= self.fail_reads_at:
            raise OSError(5, "the checkpoint is no longer valid")
        buffer[:] = self._data[offset : offset + len(buffer)]


class MemoryFrozenVm:
    def __init__(self, library, vm, config, disks, point, target=None):
        self.target = target
        self.checkpoint, self.vm, self.config, self.point = "cp-" + point[3:], vm, config, point
        self.consistency = "crash"
        self._library = library
        self.disks = {
            name: MemoryFrozenDisk(library.images[image], library.points) for name, image in disks.items()
        }
        self._since = {name: set() for name in disks}
        self._images = disks

    def pending_at(self, target):
        return [point for point, at in self._library.pending.items() if at in (None, target)]

    async def settle(self, point, *, committed):
        del self._library.pending[point]
        if committed:
            self._library.points.append(point)
        else:
            self._library.forget(point)
        self._library.settled.append((point, committed))

    async def suspend(self):
        self._library.ended.append((self.point, "suspend"))
        self._library.standing = self

    async def end(self, outcome):
        self._library.ended.append((self.point, outcome))
        self._library.busy = False
        if outcome == "keep":
            self._library.points.append(self.point)
        elif outcome == "pending":
            self._library.pending[self.point] = self.target
        else:
            self._library.forget(self.point)


class MemoryLibrary:
    """The part of diskd's Library that a backup needs."""

    def __init__(self, **sizes):
        self.images = {name: MemoryDisk(name, size) for name, size in sizes.items()}
        self.points, self.settled, self.ended = [], [], []
        self.pending = {}  # point -> the repository it was sent to
        self.frozen = []
        self.busy = False
        self.before_send = None
        self.standing = None
        self._ids = itertools.count(1)

    async def resume_checkpoint(self, vm):
        if self.standing is None:
            raise Refused(f"no interrupted backup of {vm} stands here")
        found, self.standing = self.standing, None
        return found

    def forget(self, point):
        for disk in self.images.values():
            disk.changed.pop(point, None)

    async def begin_checkpoint(
        self, vm, disks, config, *, target=None, allow_crash_consistent=False, on_merge=None
    ):
        if self.busy:
            raise Refused(f"a checkpoint of {vm} is held by a live backup")
        for disk in disks:
            if disk.image not in self.images:
                raise Refused(f"there is no image {disk.image}")
        self.busy = True
        point = f"rp-{next(self._ids):016x}"
        frozen = MemoryFrozenVm(self, vm, config, {disk.name: disk.image for disk in disks}, point, target)
        for disk in self.images.values():
            disk.changed[point] = set()
        self.frozen.append(frozen)
        if self.before_send is not None:
            self.before_send(frozen)
        return frozen

"""A seeded story of one machine: load from many clients, checkpoints, points; crash; check; and so on.

Each *life* of the daemon has guests that write, zero, trim and flush without pause, and an operator who
begins and ends checkpoints, reads frozen views, deletes points and asks for changes. At a random moment comes
kill -9, in some stories right before a chosen change of a file, and a power loss. Then the next life must
serve at once, and everything that the oracle (oracle.py) knows must hold: T1 to T3, B1, B6, the durability of
FLUSH and FUA.

The plan is the seed's; what the kill meets is the scheduler's, so that one seed is worth playing again.
"""

import contextlib
from collections import Counter
from random import Random
from typing import Final

import trio

from daemonkit.diskd_api import BackupDisk, ImageName
from daemonkit.rpc import CallFailed, CallRefused
from daemonkit.units import MiB
from diskd.core import calls
from holdfast.crash.client import ConnectionLost, connect
from holdfast.crash.journal import SECTOR
from holdfast.crash.load import BUSY, NEVER_FLUSHING, Guests
from holdfast.crash.machine import Machine, machine
from holdfast.crash.oracle import BLOCK, Clock, Image, Point, Violation, check_instant

# In the small ones every block is met again and again, in the large ones many regions for the first time.
_SIZES: Final = (2 * MiB, 9 * MiB, 33 * MiB)
_SIZE_MAX: Final = 40 * MiB
_QUEUE_MAX: Final = 6
_POINTS_MAX: Final = 4
# Shorter than the defaults, so that flushes, closings and merge batches happen within a life.
_SETTINGS: Final = ("merge_batch=64KiB",)
_INTERVALS: Final = ("500ms", "1s", "3s")
# Files at whose changes a daemon that can lose its power dies: half of the lives end so.
_MOMENTS: Final = ("disk.mrt", "disk.mrt", "disk.rct", "disk.raw", "disk.avhd", "disk.map", "points")


class Story:
    """``told`` counts what happened, for the summary."""

    def __init__(self, seed: int, machine: Machine) -> None:
        self.told: Counter[str] = Counter()
        self._seed = seed
        self._rng = Random(seed)
        self._machine = machine
        self._life = 0
        self._clock = Clock()
        self._images: list[Image] = []
        self._checkpoints: dict[str, dict[str, Point]] = {}
        self._beginning: dict[str, Point] = {}
        self._growing: dict[str, int] = {}
        self._acts = 0
        self._guests = Guests(machine, BUSY)
        self.power_lost = False

    # --- the whole

    async def tell(self, lives: int) -> None:
        """Raises Violation."""
        await self._machine.start()
        for number in range(self._rng.choice((1, 1, 2))):
            image = Image(f"disk{number}", self._rng.choice(_SIZES), self._clock)
            await self._machine.call(
                calls.IMAGE_CREATE, calls.CreateImage(image.name, image.sectors * SECTOR)
            )
            self._images.append(image)
        await self._begin(self._rng)
        await self._end_checkpoint(next(iter(self._checkpoints)), keep=True)
        for self._life in range(lives):
            await self._live()
            await self._crash()
            await self._check()
            await self._tidy()
        await self._end()

    async def _live(self) -> None:
        """Load until the kill; what is in flight then stays unanswered."""
        rng = self._rng
        # Either after so many requests, or when the operator has just done something.
        acts = self._acts + rng.choice((1, 2, 4, 1000))
        until = rng.choice((5, 40, 150, 400)) if acts > self._acts + 4 else 1000
        last = rng.choice((0.0, 0.0, 0.05)) * rng.random()
        guests = self._guests = Guests(self._machine, rng.choice((BUSY, BUSY, NEVER_FLUSHING)))
        async with trio.open_nursery() as nursery:
            for image in self._images:
                for number in range(rng.randrange(1, _QUEUE_MAX)):
                    own = Random(f"{self._seed}/{self._life}/{image.name}/{number}")
                    nursery.start_soon(guests.run, image, own)
            nursery.start_soon(self._operator, Random(f"{self._seed}/{self._life}/operator"))
            if self._machine.can_lose_power and rng.random() < 0.5:
                self._machine.let_it_die(rng.choice(_MOMENTS), rng.randrange(rng.choice((3, 12, 40))))
            while guests.acks < until and self._acts < acts and not guests.is_over:
                await guests.wait()
            if guests.is_over:
                self.told["chosen moments"] += 1
            await trio.sleep(last)
            guests.end()
            await self._machine.kill()
        self.told["lives"] += 1

    async def _crash(self) -> None:
        """A power loss or not; perhaps another crash while the first one is being recovered from."""
        rng, machine = self._rng, self._machine
        self.power_lost = False
        while True:
            if machine.can_lose_power and rng.random() < 0.7:
                lost = machine.lose_power(rng)
                self.power_lost = True
                self.told["power losses"] += 1
                self.told["sectors lost"] += lost.sectors
                self.told["names lost"] += lost.names
            if rng.random() < 0.8:
                break
            await machine.start_in_vain(rng)
            self.told["crashes in recovery"] += 1
        await machine.start()

    # --- a life

    async def _operator(self, rng: Random) -> None:
        with contextlib.suppress(CallFailed, ConnectionLost):
            while not self._guests.is_over:
                for _ in range(rng.choice((0, 3, 10, 40))):
                    await self._guests.wait()
                await self._act(rng)
                self._acts += 1

    async def _act(self, rng: Random) -> None:
        if self._guests.is_over:
            return
        if not self._checkpoints:
            choice = rng.choice(("begin", "begin", "begin", "delete", "changes", "grow"))
        else:
            choice = rng.choice(("view", "end", "end", "delete", "changes"))
        image = rng.choice(self._images)
        valid = [point for point in image.points if point.state == "valid"]
        if choice == "begin" and len(valid) < _POINTS_MAX:
            await self._begin(rng)
        elif choice == "view":
            await self._view(*rng.choice(sorted(self._checkpoints.items())))
        elif choice == "end":
            await self._end_checkpoint(rng.choice(sorted(self._checkpoints)), keep=rng.random() < 0.7)
        elif choice == "delete" and valid:
            await self._delete(image, rng.choice(valid))
        elif choice == "changes" and valid:
            await self._ask_changes(image, rng.choice(valid), None)
        elif choice == "grow" and image.sectors * SECTOR < _SIZE_MAX:
            await self._grow(image, image.sectors * SECTOR + rng.choice((BLOCK, MiB)))

    async def _begin(self, rng: Random) -> None:
        disks = [BackupDisk(image.name, image.name) for image in self._images]
        self._beginning = {image.name: image.ask_cut() for image in self._images}
        info = await self._machine.call(calls.CHECKPOINT_BEGIN, calls.BeginCheckpoint("web", disks))
        for image in self._images:
            self._adopt(image, info.point)
            self._beginning[image.name].answered = image.tick()
        self._checkpoints[info.checkpoint], self._beginning = self._beginning, {}
        self.told["checkpoints"] += 1
        if rng.random() < 0.8:
            await self._view(info.checkpoint, self._checkpoints[info.checkpoint])

    def _adopt(self, image: Image, name: str) -> None:
        self._beginning[image.name].name = name

    async def _view(self, checkpoint: str, points: dict[str, Point]) -> None:
        nbd = self._machine.nbd
        windows = []
        for image in self._images:
            point = points[image.name]
            async with connect(nbd.host, nbd.port, f"{image.name}:{checkpoint}") as client:
                windows.append(image.see_frozen(point, await client.read(0, client.size_bytes)))
        check_instant(checkpoint, windows)

    async def _end_checkpoint(self, checkpoint: str, *, keep: bool) -> None:
        points = self._checkpoints[checkpoint]
        for point in points.values():
            point.state = "ending" if keep else "discarding"
        outcome = calls.EndCheckpoint(checkpoint, "keep" if keep else "discard")
        await self._machine.call(calls.CHECKPOINT_END, outcome)
        del self._checkpoints[checkpoint]
        for image in self._images:
            if keep:
                points[image.name].state = "valid"
            else:
                image.points.remove(points[image.name])
        self.told["points kept"] += keep

    async def _delete(self, image: Image, point: Point) -> None:
        assert point.name is not None
        point.state = "deleting"
        try:
            await self._machine.call(calls.POINT_DELETE, calls.PointName(image.name, point.name))
        except CallRefused as error:
            if "which is merging" not in str(error):
                raise
            point.state = "valid"
            return
        image.points.remove(point)
        self.told["points deleted"] += 1

    async def _grow(self, image: Image, size_bytes: int) -> None:
        self._growing[image.name] = size_bytes
        with contextlib.suppress(CallRefused):  # a merge goes on still
            await self._machine.call(calls.IMAGE_RESIZE, calls.ResizeImage(image.name, size_bytes))
            image.grow(size_bytes)
            self.told["resizes"] += 1
        del self._growing[image.name]

    async def _ask_changes(self, image: Image, point: Point, content: bytes | None) -> None:
        """Under load what was acknowledged before the question must be in the answer."""
        assert point.name is not None
        certain = image.certain(point)
        asked = calls.PointName(image.name, point.name)
        found = await self._machine.call(calls.CHANGES, asked)
        image.check_changes(
            point,
            found.extents,
            exact=found.exact,
            over_bytes=found.over_report_bytes,
            content=content,
            certain=certain,
        )
        self.told["answers checked"] += 1

    # --- after a crash

    async def _check(self) -> None:
        infos = (await self._machine.call(calls.IMAGE_LIST, calls.Nothing())).images
        if [info.name for info in infos] != [image.name for image in self._images]:
            raise Violation(f"after a crash these images are there: {[info.name for info in infos]}")
        for info, image in zip(infos, self._images, strict=True):
            if info.state != "open" or info.size_bytes is None:
                raise Violation(f"{info.name} is {info.state} after a crash: {info.reason}")
            if info.size_bytes == self._growing.pop(image.name, None):
                image.grow(info.size_bytes)
            if info.size_bytes != image.sectors * SECTOR:
                raise Violation(f"{info.name} has {info.size_bytes} bytes after a crash")
        await self._check_checkpoints()
        nbd = self._machine.nbd
        for image in self._images:
            async with connect(nbd.host, nbd.port, image.name) as client:
                content = await client.read(0, client.size_bytes)
            image.settle(content, power_lost=self.power_lost)
            await self._check_points(image)
            for point in image.points:
                if point.state == "valid":
                    await self._ask_changes(image, point, content)

    async def _check_checkpoints(self) -> None:
        """A sealed one stands; one that was just beginning or ending is there in full, or not at all."""
        infos = (await self._machine.call(calls.CHECKPOINT_LIST, calls.Nothing())).checkpoints
        sealed = {info.checkpoint: info for info in infos if info.state == "sealed"}
        for checkpoint, points in list(self._checkpoints.items()):
            ended = any(point.state != "cut" for point in points.values())
            if checkpoint not in sealed:
                if not ended:
                    raise Violation(f"checkpoint {checkpoint} was sealed, and is gone after a crash (B1)")
                del self._checkpoints[checkpoint]
            else:
                for point in points.values():
                    point.state = "cut"
        for checkpoint, info in sealed.items():
            if checkpoint in self._checkpoints:
                continue
            if not self._beginning:
                raise Violation(f"checkpoint {checkpoint} had ended, and is back after a crash")
            for image in self._images:
                self._adopt(image, info.point)
            self._checkpoints[checkpoint], self._beginning = self._beginning, {}
        for image in self._images:
            if image.name in self._beginning:
                image.points.remove(self._beginning[image.name])
        self._beginning = {}
        for checkpoint, points in self._checkpoints.items():
            await self._view(checkpoint, points)

    async def _check_points(self, image: Image) -> None:
        infos = (await self._machine.call(calls.POINT_LIST, ImageName(image.name))).points
        found = {info.point: info for info in infos}
        for point in list(image.points):
            assert point.name is not None
            info = found.pop(point.name, None)
            if info is not None and info.valid and point.state in ("valid", "ending", "deleting"):
                point.state = "valid"
            elif point.state == "valid":
                why = info.reason if info else "it is gone"
                raise Violation(
                    f"{image.name}: point {point.name} was valid, and is not after a crash: {why}"
                )
            elif point.state == "ending":
                raise Violation(f"{image.name}: {point.name} is neither kept nor still to be (B1)")
            elif point.state in ("deleting", "discarding"):
                image.points.remove(point)
        if found:
            raise Violation(f"{image.name}: points that nobody knows: {sorted(found)}")

    async def _tidy(self) -> None:
        """Between two lives: what a standing checkpoint becomes; sometimes a clean restart or a hand-over."""
        rng = self._rng
        for checkpoint in sorted(self._checkpoints):
            if rng.random() < 0.5:
                await self._end_checkpoint(checkpoint, keep=rng.random() < 0.7)
        with contextlib.suppress(CallRefused):  # still merging, or part of a checkpoint
            if rng.random() < 0.3:
                for image in self._images:
                    await self._machine.call(calls.IMAGE_RELEASE, ImageName(image.name))
                    await self._machine.call(calls.IMAGE_OPEN, calls.OpenImage(image.name))
                    self.told["hand-overs"] += 1
        if rng.random() < 0.2:
            await self._machine.stop()
            await self._machine.start()
            self.told["clean restarts"] += 1

    async def _end(self) -> None:
        """Everything ends well: merged, stopped, and nothing left over."""
        machine = self._machine
        for checkpoint in sorted(self._checkpoints):
            await self._end_checkpoint(checkpoint, keep=False)
        with trio.fail_after(60):
            while (await machine.call(calls.CHECKPOINT_LIST, calls.Nothing())).checkpoints:  # noqa: ASYNC110 - over there
                await trio.sleep(0.02)
        contents = {}
        for image in self._images:
            async with connect(machine.nbd.host, machine.nbd.port, image.name) as client:
                contents[image.name] = await client.read(0, client.size_bytes)
        await machine.stop()
        for image in self._images:
            directory = machine.root / "images" / image.name
            if (directory / "disk.raw").read_bytes() != contents[image.name]:
                raise Violation(f"{image.name}: after a clean stop disk.raw is not what was served (B6)")
            left = sorted(path.name for path in directory.iterdir() if path.name.startswith("."))
            left += ["checkpoint"] if (directory / "checkpoint").exists() else []
            if left:
                raise Violation(f"{image.name}: left over: {left}")
        if left := machine.shared_left():
            raise Violation(f"left over in shared memory: {left}")


async def play(seed: int, lives: int, *, can_lose_power: bool) -> Counter[str]:
    """One story. Raises Violation with the seed's first find."""
    rng = Random(f"machine {seed}")
    settings = (*_SETTINGS, f"tracking_flush_interval={rng.choice(_INTERVALS)}")
    async with machine(rng, can_lose_power=can_lose_power, settings=settings) as made:
        story = Story(seed, made)
        await story.tell(lives)
        return story.told

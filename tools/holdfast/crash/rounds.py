"""Seeded rounds of backups under load, disturbed: what is committed must be restorable, whatever happened.

In each round guests write (qemu-io among them) while one thing is done: a backup (some are tried again, or
gone on with later), a prune, a synthetic full, a restore, an audit, a resize, a point deleted, a restart.
Often something goes wrong at a random moment: the link is cut or reset, the target, diskd or whoever asked is
killed, the disk of either is full, the target's power fails. Then all is mended and checked:

    every point that was committed and not pruned is there, clean to qemu-img, and holds what it held
    a new one is the image at one instant while its backup ran, on all disks (B1)
    an undisturbed backup succeeds, and is a differential wherever both sides have a point in common (B3)
    a restore is what its point holds, or nothing; an audit finds no difference
    the images themselves hold what was acknowledged (B2: the guests never notice, but for a full disk)

In the end nothing is left over on either side.
"""

import shutil
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random
from typing import Final, TypeVar

import attrs
import numpy as np
import trio

from daemonkit.diskd_api import BACKUP_RUN, BackupDisk, BackupReport, BackupRequest, ImageName
from daemonkit.ports import Address
from daemonkit.rpc import CallFailed, CallRefused
from daemonkit.units import SECOND, MiB
from diskd.core import calls, target_calls
from diskd.core.retention import Keep
from holdfast.crash.client import connect
from holdfast.crash.journal import SECTOR
from holdfast.crash.load import BUSY, Guests, free_range
from holdfast.crash.machine import Machine, machine
from holdfast.crash.oracle import BLOCK, Clock, Image, Numbers, Point, Violation, check_instant
from holdfast.crash.process import DISKCTL
from holdfast.crash.repository import VM, Target
from holdfast.crash.small_disk import SmallDisk

R = TypeVar("R")

_SIZES: Final = (2 * MiB, 9 * MiB)
_SIZE_MAX: Final = 24 * MiB
_SETTINGS: Final = ("merge_batch=64KiB", "tracking_flush_interval=1s")
_FAULTS: Final = ("cut", "reset", "target", "target", "diskd", "client", "full", "source full")
_ACTIONS: Final = (
    *("backup",) * 5,
    *("full", "resume", "prune", "synthesize", "restore", "audit", "grow", "delete", "restart"),
)
_RETRY_SECONDS: Final = 2
_SOURCE_DISK: Final = "size=256m"
# What an operation says of a checkpoint that a full disk has invalidated, and whose end is not recorded yet.
_SPOILT: Final = ("is no longer good", "is held by a backup that runs")


@attrs.define(eq=False)
class Attempt:
    """One backup that was asked for, with the cut that it made or might have made of each image."""

    points: dict[str, Point]


class Rounds:
    """``told`` counts what happened."""

    def __init__(
        self, seed: int, machine: Machine, target: Target, source_disk: SmallDisk, *, may_overflow: bool
    ) -> None:
        self.told: Counter[str] = Counter()
        self._seed = seed
        self._rng = Random(seed)
        self._machine = machine
        self._target = target
        self._source_disk = source_disk
        self._clock = Clock()
        self._images: list[Image] = []
        self._guests = Guests(machine, BUSY)
        self._attempts: list[Attempt] = []
        self._committed: dict[str, dict[str, Numbers]] = {}
        self._may_overflow = may_overflow  # the guests may write more than an AVHD takes: B2
        self._may_go: set[str] = set()  # what a prune of this round may have removed
        self._is_disturbed = False
        self._is_interrupted = False
        # A full disk may have invalidated the checkpoint that was left (B2).
        self._may_be_spoilt = False

    async def tell(self, rounds: int) -> None:
        """Raises Violation."""
        await self._machine.start()
        await self._target.start()
        for number in range(self._rng.choice((1, 2))):
            image = Image(f"disk{number}", self._rng.choice(_SIZES), self._clock)
            size = image.sectors * SECTOR
            await self._machine.call(calls.IMAGE_CREATE, calls.CreateImage(image.name, size))
            self._images.append(image)
        for number in range(rounds):
            await self._round(number)
            await self._mend()
            await self._check()
            self.told["rounds"] += 1
        await self._end()

    # --- one round

    async def _round(self, number: int) -> None:
        rng = self._rng
        action = "backup" if number == 0 else rng.choice(_ACTIONS)
        if self._is_interrupted and rng.random() < 0.6:
            action = "resume"
        self._is_interrupted = False
        fault = rng.choice(_FAULTS) if rng.random() < 0.5 else None
        self._is_disturbed = fault is not None or self._may_overflow
        guests = self._guests = Guests(self._machine, BUSY)
        asking = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            for image in self._images:
                for guest in range(rng.randrange(1, 4)):
                    own = Random(f"{self._seed}/{number}/{image.name}/{guest}")
                    nursery.start_soon(guests.run, image, own)
            nursery.start_soon(self._qemu_io, rng.choice(self._images), Random(f"{self._seed}/{number}/io"))
            while guests.acks < 20:
                await guests.wait()
            with asking:
                if fault is not None:
                    nursery.start_soon(self._disturb, fault, rng.random(), asking)
                await self._do(action, rng)
            if asking.cancelled_caught:
                self._is_interrupted = action in ("backup", "full")
            guests.end()
        self.told[action] += 1
        if fault is not None:
            self.told[f"fault: {fault}"] += 1

    async def _disturb(self, fault: str, moment: float, asking: trio.CancelScope) -> None:
        """At a moment that the seed and the scheduler choose together."""
        await trio.sleep(0.3 * moment * moment)
        match fault:
            case "cut":
                await self._target.cut()
                await trio.sleep(0.2 + moment / 2)
                await self._target.heal()
            case "reset":
                await self._target.reset()
            case "target":
                if self._target.is_running:
                    await self._target.kill()
                    if self._target.can_lose_power:
                        self._target.lose_power(self._rng)
                        self.told["power losses"] += 1
            case "diskd":
                self._guests.end()
                if self._machine.is_running:
                    await self._machine.kill()
            case "client":
                asking.cancel(reason="whoever asked is killed")
            case "full":
                if self._target.disk.is_small:
                    self._target.disk.fill(int(moment * 300_000))
            case "source full":
                if self._source_disk.is_small:
                    self._guests.may_fail = self._may_be_spoilt = True
                    self._source_disk.fill(int(moment * 300_000))

    async def _do(self, action: str, rng: Random) -> None:
        """Failures are allowed where the round is disturbed, and only there."""
        acts: dict[str, Callable[[Random], Awaitable[None]]] = {
            "backup": self._backup,
            "full": self._backup_full,
            "resume": self._resume,
            "restore": self._restore,
            "audit": self._audit,
            "prune": self._prune,
            "synthesize": self._synthesize,
            "grow": self._grow,
            "delete": self._delete,
            "restart": self._restart,
        }
        try:
            await acts[action](rng)
        except (CallRefused, CallFailed) as error:
            self.told["failed actions"] += 1
            self._is_interrupted = action in ("backup", "full")
            is_spoilt = self._may_be_spoilt and any(text in str(error) for text in _SPOILT)
            if not (self._is_disturbed or is_spoilt):
                raise Violation(f"{action}: {error} (nothing had been disturbed)") from error

    async def _backup(self, _rng: Random) -> None:
        common = await self._common_points()
        listed = set(await self._listed())
        report = await self._run_backup_or_be_refused()
        if isinstance(report, CallRefused):
            if "--full" not in str(report) or not listed or common:
                raise report
            await self._run_backup("full")
            return
        expected = "differential" if listed else "full"
        if report.kind != expected:
            raise Violation(f"a {report.kind} where {expected} was due; in common: {sorted(common)} (B3)")

    async def _run_backup_or_be_refused(self) -> BackupReport | CallRefused:
        try:
            return await self._run_backup("auto")
        except CallRefused as error:
            return error

    async def _backup_full(self, _rng: Random) -> None:
        report = await self._run_backup("full")
        if report.kind != "full":
            raise Violation(f"a {report.kind} where a full was asked for")

    async def _resume(self, _rng: Random) -> None:
        """Go on with whatever stands; most often nothing does."""
        request = BackupRequest(VM, [], "", str(self._target.link), mode="resume")
        try:
            report = await self._machine.call(BACKUP_RUN, request)
        except CallRefused as error:
            if "no interrupted backup" not in str(error):
                raise
            return
        if report.point not in self._committed:
            await self._adopt(report.point, self._attempts)
        self.told["resumed"] += 1

    async def _run_backup(self, mode: str) -> BackupReport:
        disks = [BackupDisk(image.name, image.name) for image in self._images]
        attempt = Attempt({image.name: image.ask_cut() for image in self._images})
        self._attempts.append(attempt)
        retry_for = self._rng.choice((0, _RETRY_SECONDS)) * SECOND
        request = BackupRequest(VM, disks, "", str(self._target.link), mode=mode, retry_for_ns=retry_for)  # type: ignore[arg-type] # one of its modes
        report = await self._machine.call(BACKUP_RUN, request)
        self._answer(attempt)
        await self._adopt(report.point, [attempt])
        self.told["committed"] += 1
        self._may_be_spoilt = False
        return report

    def _answer(self, attempt: Attempt) -> None:
        for image in self._images:
            attempt.points[image.name].answered = image.tick()

    async def _prune(self, rng: Random) -> None:
        keep = Keep(last=rng.randrange(1, 4))
        request = target_calls.PruneRequest(VM, keep, dry_run=False)
        if not self._committed:
            return
        self._may_go = set(list(await self._listed())[: -keep.last])
        report = await self._target.call(target_calls.PRUNE, request)
        if len(report.kept) != min(keep.last, len(self._committed)):
            raise Violation(f"prune kept {report.kept} of {sorted(self._committed)}, {keep.last} were due")

    async def _synthesize(self, rng: Random) -> None:
        if self._committed:
            point = rng.choice(sorted(self._committed))
            await self._target.call(target_calls.SYNTHESIZE, target_calls.PointName(VM, point))

    async def _restore(self, rng: Random) -> None:
        if self._committed:
            name = rng.choice(sorted(self._committed))
            await self._restore_point(name, "raw" if rng.random() < 0.5 else "qcow2", self._target.link)

    async def _restore_point(self, name: str, disk_format: str, address: Address) -> None:
        """Whole and right, or nothing."""
        directory = self._machine.directory / "restored"
        to = ("--to", str(directory), "--format", disk_format, "--target", str(address))
        try:
            done = await trio.run_process(
                [*DISKCTL, "target", "restore", VM, name, *to],
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
            if done.returncode == 0:
                for image in self._images:
                    file = directory / f"{image.name}.{disk_format}"
                    self._check_content(name, image.name, await self._target.convert(file, disk_format))
                self.told["restored"] += 1
                return
            left = [path.name for path in directory.glob("[!.]*")]
            lines = done.stderr.decode().splitlines()
            if done.returncode != 1 or left or len(lines) != 1:
                raise Violation(f"restore: exit code {done.returncode}, {lines}, it left {left}")
            raise CallFailed(lines[0])
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    async def _audit(self, _rng: Random) -> None:
        """What is not known to have changed is what the target would restore."""
        if not await self._common_points():
            return
        disks = [BackupDisk(image.name, image.name) for image in self._images]
        request = target_calls.AuditRequest(VM, disks, str(self._target.link), None)
        for audited in (await self._machine.call(target_calls.AUDIT_RUN, request)).disks:
            if audited.differing_bytes:
                raise Violation(f"the audit finds changes that nobody marked: {audited} (T2)")
        self.told["audited"] += 1

    async def _grow(self, rng: Random) -> None:
        image = rng.choice(self._images)
        size = image.sectors * SECTOR + rng.choice((BLOCK, MiB))
        if size > _SIZE_MAX:
            return
        try:
            await self._machine.call(calls.IMAGE_RESIZE, calls.ResizeImage(image.name, size))
        except CallRefused:
            return  # a checkpoint or its merge is under way still
        image.grow(size)

    async def _delete(self, rng: Random) -> None:
        image = rng.choice(self._images)
        infos = (await self._machine.call(calls.POINT_LIST, ImageName(image.name))).points
        if len(infos) > 1:
            point = rng.choice(infos).point
            try:
                await self._machine.call(calls.POINT_DELETE, calls.PointName(image.name, point))
            except CallRefused as error:
                if "belongs to checkpoint" not in str(error):
                    raise

    async def _restart(self, rng: Random) -> None:
        if rng.random() < 0.5:
            if self._target.is_running:
                await self._target.stop()
        else:
            self._guests.end()
            if self._machine.is_running:
                await self._machine.stop()

    async def _qemu_io(self, image: Image, rng: Random) -> None:
        """A few writes and zeroes by somebody else's program, in one go."""
        work = self._machine.directory / f"qemu-io.{image.name}"
        argv = ["qemu-io", "-f", "raw"]
        writes = []
        for number in range(rng.randrange(1, 6)):
            first, end = free_range(image, image.sectors, rng)
            kind = rng.choice(("write", "write", "write -z", "discard"))
            write = image.send(first, end, is_zero=kind != "write", is_fua=False)
            writes.append(write)
            pattern = Path(f"{work}.{number}")
            pattern.write_bytes(write.data())  # noqa: ASYNC240 - a few KiB, and nobody is served here
            source = f" -s {pattern}" if kind == "write" else ""
            argv += ["-c", f"{kind}{source} {first * SECTOR} {(end - first) * SECTOR}"]
        nbd = self._machine.nbd
        done = await trio.run_process(
            [*argv, f"nbd://{nbd.host}:{nbd.port}/{image.name}"],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
        said = done.stdout.decode() + done.stderr.decode()
        if done.returncode == 0:
            for write in writes:
                image.ack(write)
        elif not (self._guests.is_over or (self._guests.may_fail and "No space left" in said)):
            raise Violation(f"qemu-io: {said[-1000:]}")

    # --- afterwards

    async def _mend(self) -> None:
        target, machine = self._target, self._machine
        await target.heal()
        target.disk.empty()
        self._source_disk.empty()
        if not target.is_running:
            await target.start()
        if not machine.is_running:
            await machine.start()
        infos = (await machine.call(calls.IMAGE_LIST, calls.Nothing())).images
        for info, image in zip(infos, self._images, strict=True):
            if info.state != "open" or info.size_bytes is None:
                raise Violation(f"{info.name} is {info.state}: {info.reason}")
            if info.size_bytes > image.sectors * SECTOR:
                image.grow(info.size_bytes)  # its answer was lost

    async def _listed(self) -> dict[str, target_calls.ListedPoint]:
        report = await self._target.call(target_calls.LIST, target_calls.VmName(VM))
        return {point.point: point for point in report.points}

    async def _common_points(self) -> set[str]:
        """Valid at the source, on every image, and there at the target."""
        common = set(self._committed)
        for image in self._images:
            infos = (await self._machine.call(calls.POINT_LIST, ImageName(image.name))).points
            common &= {info.point for info in infos if info.valid}
        return common

    async def _check(self) -> None:
        nbd = self._machine.nbd
        for image in self._images:
            async with connect(nbd.host, nbd.port, image.name) as client:
                image.settle(await client.read(0, client.size_bytes), power_lost=False)
        listed = await self._listed()
        for name, point in listed.items():
            if point.damaged is not None:
                raise Violation(f"{name} is damaged: {point.damaged} (B5)")
            if name not in self._committed:
                await self._adopt(name, self._attempts)
                self.told["committed, answer lost"] += 1
        for name in sorted(set(self._committed) - set(listed)):
            if name not in self._may_go:
                raise Violation(f"{name} was committed, and is gone (B5)")
            del self._committed[name]
            self.told["pruned"] += 1
        self._may_go = set()
        if self._committed:
            await self._verify(self._rng.choice(sorted(self._committed)))

    async def _adopt(self, name: str, attempts: list[Attempt]) -> None:
        """A committed point: it must be what one of these cuts may have shown."""
        problem: Violation | None = None
        for attempt in reversed(attempts):
            try:
                windows = []
                for image in self._images:
                    point = attempt.points[image.name]
                    point.name, point.content = name, None
                    windows.append(image.see_frozen(point, await self._target.content(name, image.name)))
                check_instant(name, windows)
            except Violation as error:
                problem = problem or error
                continue
            found = {image.name: attempt.points[image.name].content for image in self._images}
            self._committed[name] = {
                image: content for image, content in found.items() if content is not None
            }
            self._attempts = [other for other in self._attempts if other is not attempt]
            for image in self._images:
                image.points.remove(attempt.points[image.name])
            return
        raise problem or Violation(f"{name} was committed, and nobody asked for it")

    async def _verify(self, name: str) -> None:
        """It holds what it held."""
        for image in self._committed[name]:
            self._check_content(name, image, await self._target.content(name, image))

    def _check_content(self, name: str, image: str, data: bytes) -> None:
        found = np.frombuffer(data, np.uint64)[:: SECTOR // 8]
        if not np.array_equal(found, self._committed[name][image]):
            raise Violation(f"{name} {image} is not what it was (B5)")

    async def _end(self) -> None:
        """One more backup, everything verified, nothing left over."""
        self._is_disturbed = False
        await self._backup(self._rng)
        for number, name in enumerate(sorted(self._committed)):
            await self._verify(name)
            await self._restore_point(name, "qcow2" if number % 2 else "raw", self._target.link)
        everything = target_calls.PointFilter(None, None)
        for verified in (await self._target.call(target_calls.VERIFY, everything)).points:
            if verified.problems:
                raise Violation(f"verify: {verified.point}: {verified.problems[0]}")
        with trio.fail_after(60):
            while (await self._machine.call(calls.CHECKPOINT_LIST, calls.Nothing())).checkpoints:  # noqa: ASYNC110 - over there
                await trio.sleep(0.02)
        await self._machine.stop()
        await self._target.stop()
        left = self._target.left_over() + self._machine.shared_left()
        for image in self._images:
            directory = self._machine.root / "images" / image.name
            left += [
                path.name for path in directory.iterdir() if path.name[0] == "." or path.name == "checkpoint"
            ]
        if left:
            raise Violation(f"left over: {left}")


async def play(seed: int, rounds: int) -> Counter[str]:
    """One story of rounds. Raises Violation with its first find."""
    if not all(shutil.which(program) for program in ("qemu-img", "qemu-io")):
        return Counter({"stories skipped for want of qemu-utils": 1})
    rng = Random(f"machine {seed}")
    may_overflow = rng.random() < 0.25
    settings = (*_SETTINGS, "avhd_limit=1MiB") if may_overflow else _SETTINGS
    async with machine(rng, can_lose_power=False, settings=settings) as made:
        source_disk = SmallDisk(made.root, _SOURCE_DISK)
        target = Target(made.directory, can_lose_power=rng.random() < 0.5)
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(target.serve_link)
                story = Rounds(seed, made, target, source_disk, may_overflow=may_overflow)
                await story.tell(rounds)
                nursery.cancel_scope.cancel(reason="told")
        finally:
            with trio.CancelScope(shield=True):
                await target.close()
                await made.close()
                await source_disk.close()
        return story.told

"""SAN mode carried out (core/san.py): checkpoint, snapshot, end of the checkpoint; then the snapshot is read.

For a backup, ``SanSource`` stands where the library stands otherwise: what it calls a checkpoint is the
snapshot, and the checkpoint under it has long ended when the export begins. So everything that is known of a
backup (which base, what is sent, what a lost acknowledgement means) holds here unchanged.

For a third party, ``san.begin`` leaves the snapshot and a document that tells what is where; ``san.end`` says
what became of it.
"""

import contextlib
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

import attrs
import structlog
import trio

from daemonkit.diskd_api import BackupDisk, BackupReport, Lease
from daemonkit.durable import replace_file, sync_directory
from daemonkit.errors import HoldfastError
from daemonkit.rpc import Call, Registry
from diskd.core import san
from diskd.core import san_calls as calls
from diskd.core.ports import ChangeReport, FrozenDisk, FrozenVm, OnMerge
from diskd.core.san import Outcome, Record, RecordedDisk
from diskd.errors import Refused
from diskd.shell.backup import run_backup
from diskd.shell.files import Files
from diskd.shell.library import Library
from diskd.shell.raw_layer import RawLayer
from diskd.shell.san_providers import Snapshots, read_providers

# What follows a cancelled backup: two small syncs, and a provider that may take its time.
_CLEAN_UP_SECONDS: Final = 3600.0
MAPPING_SUFFIX: Final = ".json"

log = structlog.get_logger("san")


@attrs.frozen
class _Wanted:
    """What a snapshot is asked of."""

    provider: str
    vm: str
    disks: list[BackupDisk]
    config: str
    allow_crash_consistent: bool = False


class San:
    """All snapshots of one daemon. Records lie in ROOT/san/DAEMON."""

    def __init__(self, library: Library, root: Path) -> None:
        self.library = library
        self._root = root.absolute()
        self._directory = self._root / "san" / library.daemon_name
        self._files: Files | None = None
        self.records: dict[str, Record] = {}
        # One at a time releases a snapshot: its reader, a retry, and whoever ends it by hand may all try.
        self._turns: dict[str, trio.Lock] = {}
        self._running: trio.Nursery | None = None
        # Begun by hand, and whoever began it has not been told of it: nobody else ends it meanwhile.
        self.being_made: set[str] = set()

    async def recover(self) -> None:
        """Take up what an earlier run left: called once, when the library is open. Points are settled here,
        which asks no provider anything; ``run`` deletes the snapshots."""

        def load() -> tuple[list[Record], list[str]]:
            if not self._directory.is_dir():
                return [], []
            self._files = Files(self._directory)
            return self._files.run_blocking(san.load())

        records, damaged = await trio.to_thread.run_sync(load)
        for name in damaged:
            log.error("san.record_damaged", path=str(self._directory / name))
        self.records = {record.point: record for record in records}
        for record in records:
            outcome = san.recover(record)
            if outcome is None:
                self._reserve(record)
            else:
                await self.settle_quietly(record.point, outcome)

    async def run(self) -> None:
        """Delete snapshots beside everything else, those that an earlier run left first: a provider may take
        an hour for each, and neither guests nor a backup that is done wait for that. What cannot be deleted
        is tried again at the next backup of this kind and at the next start."""
        async with trio.open_nursery() as nursery:
            self._running = nursery
            try:
                for record in self.records.values():
                    self._delete_soon(record)
                await trio.sleep_forever()
            finally:
                self._running = None

    def _delete_soon(self, record: Record) -> None:
        """Where nothing runs (yet, or any more), the next ``run`` does it."""
        if self._running is not None and record.state == "releasing":
            self._running.start_soon(self.release_quietly, record.point, "discard")

    async def snapshot(
        self, wanted: "_Wanted", held_by: san.HeldBy, target: str, on_merge: OnMerge | None = None
    ) -> "SnapshotVm":
        """Freeze, snapshot, end the checkpoint. Raises Refused or OSError; then all is as it was before."""
        snapshots = self._provider(wanted.provider)
        await self._retry_deletions()
        frozen = await self.library.begin_checkpoint(
            wanted.vm,
            wanted.disks,
            wanted.config,
            target=target,
            allow_crash_consistent=wanted.allow_crash_consistent,
            on_merge=on_merge,
        )
        described = [RecordedDisk(disk.name, disk.image) for disk in wanted.disks]
        record = Record(frozen.point, frozen.checkpoint, wanted.vm, wanted.provider, held_by, described)
        opened: dict[str, SnapshotDisk] = {}
        if held_by == "hand":
            self.being_made.add(record.point)
        try:
            await self._persist(record)
            for disk in wanted.disks:
                await self.library.flush_image(disk.image)
            path = await snapshots.create(record.snapshot, [disk.image for disk in wanted.disks])
            for name, live in frozen.disks.items():
                # In this order: only what stood until after the snapshot is in it as it was frozen.
                file = await trio.to_thread.run_sync(_open_raw, Path(path), live.image, live.size_bytes)
                opened[name] = SnapshotDisk(live, file)
                await trio.to_thread.run_sync(live.allocation_blocking, 0, 1)
            record = await self._advance(record, "created", path=path)
            self._reserve(record)
            await frozen.end("pending")
        except BaseException:
            for opened_disk in opened.values():
                opened_disk.close()
            with trio.move_on_after(_CLEAN_UP_SECONDS, shield=True):
                with contextlib.suppress(HoldfastError, OSError):
                    await frozen.end("discard")
                await self.release_quietly(record.point, "discard")
            self.being_made.discard(record.point)
            raise
        log.info("san.snapshot", vm=record.vm, point=record.point, provider=record.provider, path=path)
        return SnapshotVm(self, record, frozen, opened)

    async def release(self, point: str, outcome: Outcome) -> None:
        """Settle its point (unless ``pending``), then delete the snapshot. Raises Refused where the provider
        fails: then the point is settled, and the deletion is tried again later."""
        if point not in self.records:
            raise Refused(f"there is no snapshot of point {point}")
        async with self._turns.setdefault(point, trio.Lock()):
            record = self.records.get(point)
            if record is None:  # whoever was first has done all of it
                return
            record = await self._settle(record, outcome)
            await self._provider(record.provider).delete(record.snapshot)
            with contextlib.suppress(FileNotFoundError):
                self.mapping_path(point).unlink()
            await self._advance(record, "deleted")
        log.info("san.released", vm=record.vm, point=point, outcome=record.outcome)

    async def settle_quietly(self, point: str, outcome: Outcome) -> None:
        """The first half of ``release``; ``run`` does the second. What fails is told in the log."""
        if point not in self.records:
            return
        try:
            async with self._turns.setdefault(point, trio.Lock()):
                if point in self.records:
                    await self._settle(self.records[point], outcome)
        except (HoldfastError, OSError) as error:
            log.warning("san.left_over", point=point, reason=str(error))
        if point in self.records:
            self._delete_soon(self.records[point])

    async def _settle(self, record: Record, outcome: Outcome) -> Record:
        """The durable word that it goes, then its point. Once more does no harm. Raises as above."""
        if record.state != "releasing":
            record = await self._advance(record, "release", outcome=outcome)
        assert record.outcome is not None
        for info in self.library.checkpoints():
            # Where it has no record any more, its target or a hand settled it: that is what holds.
            if info.checkpoint == record.checkpoint:
                stands = info.state in ("sealed", "invalid")
                if stands or (info.outcome == "pending" and record.outcome != "pending"):
                    await self.library.end_checkpoint(record.checkpoint, record.outcome)
        if self.library.reserved.get(record.vm) == _reservation(record):  # not that of a later snapshot
            del self.library.reserved[record.vm]
        return record

    def mapping_path(self, point: str) -> Path:
        """The document for third parties."""
        return self._directory / (point + MAPPING_SUFFIX)

    async def write_mapping(self, vm: "SnapshotVm", since: str | None) -> None:
        """What is where in the snapshot, and what changed. Raises Refused (NoSuchPoint), OSError."""

        def write() -> None:
            disks = [vm.mapped(name, since) for name in vm.disks]
            text = san.encode_mapping(vm.record, config=vm.config, consistency=vm.consistency, disks=disks)
            replace_file(self.mapping_path(vm.point), text.encode())

        await trio.to_thread.run_sync(write)

    # --- records -------------------------------------------------------------------------------------

    def _provider(self, name: str) -> Snapshots:
        return Snapshots(name, san.choose_provider(read_providers(self._root), name), self._root)

    def _reserve(self, record: Record) -> None:
        self.library.reserved[record.vm] = _reservation(record)

    async def _persist(self, record: Record) -> None:
        if self._files is None:
            await trio.to_thread.run_sync(self._make_directory)
            self._files = Files(self._directory)
        with trio.CancelScope(shield=True):  # one small file: a half-told change is worse than the wait
            await self._files.run(san.persist(record))
        if record.state == "gone":
            self.records.pop(record.point, None)
            self._turns.pop(record.point, None)
        else:
            self.records[record.point] = record

    def _make_directory(self) -> None:
        for path in (self._directory.parent, self._directory):
            path.mkdir(exist_ok=True)
            sync_directory(path.parent)

    async def _advance(
        self, record: Record, event: san.Event, *, path: str | None = None, outcome: Outcome | None = None
    ) -> Record:
        new = san.advance(record, event, path=path, outcome=outcome)
        await self._persist(new)
        return new

    async def release_quietly(self, point: str, outcome: Outcome) -> None:
        """As ``release``; what fails is told in the log, and done again later."""
        if point in self.records:
            try:
                await self.release(point, outcome)
            except (HoldfastError, OSError) as error:
                log.warning("san.left_over", point=point, reason=str(error))

    async def _retry_deletions(self) -> None:
        for record in list(self.records.values()):
            if record.state == "releasing":
                await self.release_quietly(record.point, "discard")


def _reservation(record: Record) -> str:
    """What another backup of the VM is refused with; no two snapshots have the same."""
    what = "is read by a third party" if record.held_by == "hand" else "is being backed up"
    return f"the snapshot of {record.vm} as of {record.point} {what} (diskctl san list tells more)"


def _open_raw(path: Path, image: str, size_bytes: int) -> "_SnapshotFile":
    where = path / san.raw_path(image)
    try:
        file = _SnapshotFile(os.open(where, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise Refused(f"the snapshot lacks {where}: {error.strerror}; correct {san.CONFIG_FILE}") from error
    if (found := os.lseek(file.number, 0, os.SEEK_END)) != size_bytes:
        file.close()
        raise Refused(f"{where} in the snapshot is {found} bytes long instead of {size_bytes}")
    return file


class _SnapshotFile:
    """raw_layer.RawFiles, read-only."""

    def __init__(self, number: int) -> None:
        self.number = number

    def descriptor(self, name: str) -> int:
        return self.number

    def sync(self, name: str) -> None:
        """Nothing is written."""

    def close(self) -> None:
        os.close(self.number)


class SnapshotDisk:
    """ports.FrozenDisk: the content from the snapshot, the changes from the tracking."""

    def __init__(self, frozen: FrozenDisk, file: _SnapshotFile) -> None:
        self.image = frozen.image
        self.size_bytes = frozen.size_bytes
        self.block_bytes = frozen.block_bytes
        self._frozen = frozen
        self._file = file
        self._layer = RawLayer(file, frozen.size_bytes, lambda: None)
        self.allocation_blocking = self._layer.allocation_blocking
        self.read_into_blocking = self._layer.read_into_blocking

    @property
    def points(self) -> list[str]:
        return self._frozen.points

    def changes_since(self, point: str) -> ChangeReport:
        return self._frozen.changes_since(point)

    def close(self) -> None:
        self._file.close()


class SnapshotVm:
    """ports.FrozenVm: ``end`` settles the point and has the snapshot deleted."""

    def __init__(
        self, owner: San, record: Record, frozen: FrozenVm, disks: Mapping[str, SnapshotDisk]
    ) -> None:
        self._owner = owner
        self._frozen = frozen
        self._disks = disks
        self.record = record
        self.checkpoint = record.checkpoint
        self.vm = record.vm
        self.point = record.point
        self.config = frozen.config
        self.consistency = frozen.consistency
        self.target = frozen.target

    @property
    def disks(self) -> dict[str, FrozenDisk]:
        return dict(self._disks)

    def pending_at(self, target: str) -> list[str]:
        return [point for point in self._frozen.pending_at(target) if point != self.point]

    async def settle(self, point: str, *, committed: bool) -> None:
        await self._frozen.settle(point, committed=committed)

    async def end(self, outcome: Outcome) -> None:
        """The point is settled when this returns. The snapshot is deleted afterwards: a backup that its
        target has committed has not failed because a provider takes its time."""
        self.close()
        await self._owner.settle_quietly(self.point, outcome)

    async def suspend(self) -> None:
        """A snapshot is not gone on with: whether the target has it, its word will tell (B3)."""
        await self.end("pending")

    def close(self) -> None:
        """Let go of the files."""
        for disk in self._disks.values():
            disk.close()

    def mapped(self, name: str, since: str | None) -> san.MappedDisk:
        """For the document; blocking. Raises NoSuchPoint."""
        disk = self._disks[name]
        assert self.record.path is not None
        raw = f"{self.record.path}/{san.raw_path(disk.image)}"
        changes = {since: disk.changes_since(since)} if since else {}
        return san.MappedDisk(name, disk.image, disk.size_bytes, disk.block_bytes, raw, changes)

    def newest_point(self) -> str | None:
        """The newest that is valid for all disks."""
        for point in reversed(next(iter(self._disks.values())).points):
            if all(point in disk.points for disk in self._disks.values()):
                return point
        return None


@attrs.frozen(eq=False)
class SanSource:
    """backup.CheckpointSource over snapshots of one provider."""

    san: San
    provider: str

    async def begin_checkpoint(
        self,
        vm: str,
        disks: list[BackupDisk],
        config: str,
        *,
        target: str | None = None,
        allow_crash_consistent: bool = False,
        on_merge: OnMerge | None = None,
    ) -> FrozenVm:
        wanted = _Wanted(self.provider, vm, disks, config, allow_crash_consistent)
        return await self.san.snapshot(wanted, "backup", target or san.BY_HAND, on_merge)

    async def resume_checkpoint(self, vm: str) -> FrozenVm:
        await trio.lowlevel.checkpoint()
        raise Refused(f"a backup of {vm} from a snapshot cannot be resumed; run it again without --resume")

    def lease(self, image: str) -> Lease:
        return self.san.library.lease(image)


def register_san(registry: Registry, owner: San, *, key: bytes | None = None) -> None:
    """Answer the calls of core/san_calls.py. ``key`` is the cluster key for the target's listener."""

    async def backup(request: calls.SanBackup, call: Call) -> BackupReport:
        source = SanSource(owner, request.provider)
        return await run_backup(source, request.backup, report=call.progress, key=key)

    registry.add(calls.SAN_BACKUP, backup)
    registry.add(calls.SAN_BEGIN, _begin(owner))
    registry.add(calls.SAN_END, _end(owner))
    registry.add(calls.SAN_LIST, _list(owner))


def _begin(owner: San) -> Callable[[calls.SanBegin, Call], Awaitable[calls.SanSnapshot]]:
    async def begin(request: calls.SanBegin, _call: Call) -> calls.SanSnapshot:
        wanted = _Wanted(request.provider, request.vm, request.disks, request.config)
        made = await owner.snapshot(wanted, "hand", san.BY_HAND)
        try:
            await owner.write_mapping(made, request.since or made.newest_point())
        except BaseException:
            with trio.move_on_after(_CLEAN_UP_SECONDS, shield=True):
                await made.end("discard")
            raise
        finally:
            owner.being_made.discard(made.point)
        made.close()
        return _described(owner, made.record)

    return begin


def _end(owner: San) -> Callable[[calls.SanEnd, Call], Awaitable[calls.SanEnded]]:
    async def end(request: calls.SanEnd, _call: Call) -> calls.SanEnded:
        record = owner.records.get(request.point)
        if record is not None and record.held_by == "backup" and record.state != "releasing":
            raise Refused(f"{request.point} is being backed up; its snapshot goes when that has ended")
        if request.point in owner.being_made:
            raise Refused(f"the snapshot of {request.point} is still being made; end it when that is done")
        await owner.release(request.point, request.outcome)
        return calls.SanEnded(request.point)

    return end


def _list(owner: San) -> Callable[[calls.SanNothing, Call], Awaitable[calls.SanList]]:
    async def listed(_request: calls.SanNothing, _call: Call) -> calls.SanList:
        await trio.lowlevel.checkpoint()
        return calls.SanList([_described(owner, record) for record in owner.records.values()])

    return listed


def _described(owner: San, record: Record) -> calls.SanSnapshot:
    by_hand = record.held_by == "hand" and record.state == "standing"
    mapping = str(owner.mapping_path(record.point)) if by_hand else None
    return calls.SanSnapshot(
        record.vm,
        record.point,
        record.provider,
        record.snapshot,
        record.state,
        record.held_by,
        record.path,
        mapping,
    )

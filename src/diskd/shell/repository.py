"""The repository of `diskd target`: VM files in directories, and a lock on the root.

Committed points are directories whose name is a point's id. What has another name is either in the
making, or was being removed when the process ended; both are cleaned up when the repository is opened.
All functions block and may be called from worker threads; the short lock covers only what changes
which files a point's name leads to.
"""

import contextlib
import datetime as dt
import errno
import os
import re
import secrets
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import attrs
import structlog

from daemonkit.durable import lock_file, read_small_file, replace_file
from daemonkit.errors import OperatorError
from daemonkit.units import MiB
from diskd.core.catalog import (
    DISCARDED_PREFIX,
    INCOMING_PREFIX,
    INDEX,
    MANIFEST,
    SYNTHETIC_PREFIX,
    TEMPORARY_PREFIXES,
    Manifest,
    by_commit,
    chain_of,
    check_incoming,
    commit_time,
    decode_manifest,
    dependants,
    is_restorable,
)
from diskd.core.inventory import NAME_PATTERN
from diskd.core.partial import opening_digest
from diskd.core.qcow2 import FULL_CLUSTER_BYTES
from diskd.core.retention import Keep, plan_prune
from diskd.core.stream import (
    ExportHeader,
    Frame,
    FrameHeader,
    FrameKind,
    StreamEncoder,
    StreamError,
    is_point,
)
from diskd.core.target_calls import ListedDisk, ListedPoint, PruneReport, SynthesizeReport, Verified
from diskd.errors import Damaged, Refused
from diskd.shell.chain_view import OpenPoint, frames_of_view, open_point
from diskd.shell.incoming import PROGRESS, Incoming, Unusable, index_header, unfinished
from diskd.shell.repository_files import RepositoryFiles
from diskd.shell.sharing import Sharing
from diskd.shell.verify import check_files, verify_point
from diskd.shell.work import Poll, begin, count

LOCK: Final = ".lock"
IDENTITY: Final = ".id"
_IDENTITY: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)
MANIFEST_BYTES_MAX: Final = 1 * MiB
# A sealed checkpoint may stand for a day at most (checkpoint_resume_timeout), and only as long is it of use.
UNFINISHED_SECONDS_MAX: Final = 24 * 3600.0

log = structlog.get_logger("repository")


@attrs.frozen
class VmPoints:
    """The points of one VM as their manifests say; ``damaged`` are directories without a good manifest."""

    points: dict[str, Manifest]
    damaged: dict[str, str]


class Gone(Refused):
    """The point was there a moment ago."""


class Repository:
    """Made by ``open_repository``."""

    def __init__(self, root: Path, identity: str, files: RepositoryFiles) -> None:
        self.root = root
        self.identity: Final = identity
        self._files = files
        self._names = threading.RLock()

    def clean_up(self, now: float, only: str | None = None) -> list[str]:
        """Remove what no commit ever named, but for what a source may still go on with; ``only`` of one VM.
        ``now``: in seconds, as files' times are. Nobody else may write points of it meanwhile. The paths,
        for the log."""
        removed = []
        for vm in self.vms() if only is None else [only]:
            paths = sorted((self.root / vm).iterdir())
            found = [p for p in paths if p.name.startswith(TEMPORARY_PREFIXES) and not _may_go_on(p, now)]
            if found:
                # What is left of an exchange of names goes only when a power loss cannot take that back.
                self._files.sync_directory(self.root / vm)
            for path in found:
                self._files.remove_tree(path)
                removed.append(f"{vm}/{path.name}")
        return removed

    def vms(self) -> list[str]:
        """The directories that are named as a VM may be."""
        return sorted(
            path.name for path in self.root.iterdir() if path.is_dir() and NAME_PATTERN.fullmatch(path.name)
        )

    def load(self, vm: str) -> VmPoints:
        """The manifests of a VM; an unknown VM has none."""
        points: dict[str, Manifest] = {}
        damaged: dict[str, str] = {}
        directory = self._directory(vm)
        with self._names:
            names = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
            for name in names:
                if not is_point(name):
                    continue
                try:
                    data = read_small_file(directory / name / MANIFEST, size_bytes_max=MANIFEST_BYTES_MAX)
                    points[name] = decode_manifest(data, vm=vm, point=name)
                except OSError as error:
                    damaged[name] = f"{vm}/{name}/{MANIFEST}: {error.strerror}"
                except OperatorError as error:
                    damaged[name] = str(error)
        return VmPoints(points, damaged)

    def listing(self, vm: str | None) -> list[ListedPoint]:
        """Every point with what is known of it, oldest first within a VM."""
        listed: list[ListedPoint] = []
        for name in self.vms() if vm is None else [vm]:
            loaded = self.load(name)
            listed += [self._listed(manifest, loaded) for manifest in by_commit(loaded.points.values())]
            listed += [
                ListedPoint(name, point, None, None, False, None, None, None, [], reason)
                for point, reason in sorted(loaded.damaged.items())
            ]
        return listed

    def _listed(self, manifest: Manifest, loaded: VmPoints) -> ListedPoint:
        damaged = None
        try:
            chain_of(loaded.points, manifest.point)
        except OperatorError as error:
            damaged = str(error)
        return ListedPoint(
            vm=manifest.vm,
            point=manifest.point,
            base=manifest.base,
            kind=manifest.kind,
            synthetic=manifest.synthetic,
            consistency=manifest.consistency,
            exact=manifest.exact,
            committed_at=manifest.committed_at,
            disks=[ListedDisk(disk.name, disk.virtual_size, disk.file.size) for disk in manifest.disks],
            damaged=damaged,
        )

    @contextmanager
    def open(self, vm: str, point: str) -> Iterator[OpenPoint]:
        """A point with its chain. Raises Refused for one that is not there, Damaged."""
        with self._names:
            loaded = self.load(vm)
            if point in loaded.damaged:
                raise Damaged(loaded.damaged[point])
            opened = open_point(self._directory(vm), chain_of(loaded.points, point))
            result = opened.__enter__()
        try:
            yield result
        finally:
            opened.__exit__(None, None, None)

    def receive(self, header: ExportHeader, opening: bytes, *, resume: bool = False) -> Incoming | Manifest:
        """Begin a new point, or with ``resume`` go on with an unfinished one where it is of the same plan; or
        the manifest of that point where it is committed already (idempotent). Removes what other backups of
        this VM left unfinished. Raises Refused, Damaged, OSError.
        """
        directory = self._directory(header.vm)
        loaded = self.load(header.vm)
        if header.point in loaded.points:
            return loaded.points[header.point]
        if header.point in loaded.damaged:
            raise Damaged(f"{loaded.damaged[header.point]}; remove it by hand, or take another backup")
        chain = check_incoming(header, loaded.points)
        if not directory.is_dir():
            self._files.make_directory(directory)
        temporary = directory / f"{INCOMING_PREFIX}{header.point}"
        for path in directory.glob(f"{INCOMING_PREFIX}*"):
            if path != temporary:
                self._files.remove_tree(path)
        found = unfinished(temporary) if resume else None
        if found is not None and found[1].opening_digest != opening_digest(opening):
            raise Refused(
                f"{header.vm}/{header.point}: what the target has of it was sent by another plan; back up"
                " again without --resume"
            )
        try:
            if found is not None:
                try:
                    return Incoming(self._files, directory, temporary, header, opening, chain, resume=found)
                except Unusable as error:
                    log.warning("export.restarted", vm=header.vm, point=header.point, reason=str(error))
            if temporary.exists():
                self._files.remove_tree(temporary)
            return Incoming(self._files, directory, temporary, header, opening, chain)
        except Damaged as error:
            raise Damaged(f"the base cannot be built on: {error}; take a full backup: use --full") from error

    def forget(self, vm: str, point: str) -> None:
        """Whatever is unfinished of this point will never be committed."""
        path = self._directory(vm) / f"{INCOMING_PREFIX}{point}"
        if path.exists():
            self._files.remove_tree(path)

    def unfinished_points(self, vm: str) -> dict[str, str | None]:
        """The points of a VM that a resuming source may go on with, and the base of each."""
        found: dict[str, str | None] = {}
        for path in self._directory(vm).glob(f"{INCOMING_PREFIX}*/{PROGRESS}"):
            with contextlib.suppress(OSError, StreamError):
                header = index_header(path.with_name(INDEX))
                found[header.point] = header.base
        return found

    def verify(self, vm: str, point: str, poll: Poll, *, damaged: Collection[str] = ()) -> Verified:
        """Everything of one point re-read and compared. ``damaged``: the points of this VM that are known to
        be, so that one which builds on them is not called good. Raises Gone for a point that is not there."""
        loaded = self.load(vm)
        if point in loaded.damaged:
            return Verified(vm, point, 0, [loaded.damaged[point]])
        if point not in loaded.points:
            raise Gone(f"the target has no point {point} of {vm} any more")
        try:
            chain = chain_of(loaded.points, point)
        except Damaged as error:
            return Verified(vm, point, 0, [str(error)])
        total, problems = verify_point(self._directory(vm), chain, poll=poll)
        now = self.load(vm).points
        if any(now.get(link.point) != link for link in (chain if problems else chain[:1])):
            # A synthetic full took its place (or its base's) in the middle, or it was pruned: look again.
            return self.verify(vm, point, poll, damaged=damaged)
        if len(chain) > 1 and chain[1].point in damaged:
            problems.append(f"{vm}/{point}: it builds on {chain[1].point}, which is damaged")
        return Verified(vm, point, total, problems)

    def commit_time(self, vm: str) -> str:
        """For the manifest of a point that is committed now."""
        return commit_time(dt.datetime.now(dt.UTC).isoformat(), self.load(vm).points)

    def points_of(self, vm: str | None, point: str | None) -> list[tuple[str, str]]:
        """(VM, point) of all that match, damaged ones included, a base before what builds on it; of one point
        its whole chain. Raises Refused where nothing does."""
        found = []
        for name in self.vms() if vm is None else [vm]:
            loaded = self.load(name)
            if point is None:
                ordered = [manifest.point for manifest in by_commit(loaded.points.values())]
                found += [(name, p) for p in [*ordered, *sorted(loaded.damaged)]]
            elif is_restorable(loaded.points, point):
                found += [(name, link.point) for link in reversed(chain_of(loaded.points, point))]
            elif point in loaded.points or point in loaded.damaged:
                found.append((name, point))
        if not found and vm is not None:
            raise Refused(
                f"the target has no point {point} of {vm}" if point else f"the target has no VM {vm}"
            )
        return found

    def data_bytes(self, points: Iterable[tuple[str, str]]) -> int:
        """How many bytes of disks these (VM, point) hold themselves, as far as manifests can be read."""
        wanted = set(points)
        loaded = {vm: self.load(vm).points for vm in {vm for vm, _ in wanted}}
        good = [loaded[vm][point] for vm, point in wanted if point in loaded[vm]]
        return sum(disk.data_bytes for manifest in good for disk in manifest.disks)

    def synthesize(self, vm: str, point: str, poll: Poll) -> SynthesizeReport:
        """Make a point a full of its own. The new files are verified before they take the old ones' place.

        Raises Refused, Damaged, OSError; then everything is as before, or both sets of files are there.
        """
        loaded = self.load(vm)
        if point not in loaded.points:
            raise Refused(f"the target has no good point {point} of {vm}")
        manifest = loaded.points[point]
        if manifest.base is None:
            return SynthesizeReport(vm, point, None, sum(disk.file.size for disk in manifest.disks), 0)
        directory = self._directory(vm)
        temporary = directory / f"{SYNTHETIC_PREFIX}{point}"
        if temporary.exists():
            self._files.sync_directory(directory)
            self._files.remove_tree(temporary)
        begin(poll, "synthesize", point, None)
        copied = 0
        with self.open(vm, point) as opened:
            header, frames = full_of(opened)
            encoder = StreamEncoder(header)
            sharing = Sharing(self._files, opened, os.statvfs(directory).f_bsize)
            incoming = Incoming(
                self._files, directory, temporary, header, encoder.opening, [], share_into=sharing.into
            )
            is_durable = True
            try:
                for disk, offset, data in frames:
                    poll()
                    packed = encoder.frame(FrameKind.DATA, disk, offset, len(data), data)
                    incoming.frame(Frame(FrameHeader.unpack(packed), data))
                    count(poll, len(data))
                    copied += len(data)
                begin(poll, "verify", point, copied)
                new = incoming.commit(
                    encoder.summary(),
                    source_digest=manifest.source_digest,
                    committed_at=manifest.committed_at,
                    poll=poll,
                )
                with self._names:
                    self._files.exchange(temporary, directory / point)
                    is_durable = False
                    self._files.sync_directory(directory)
                    is_durable = True
            finally:
                # Before the exchange this removes the unfinished full, after it the old files; but not where
                # a power loss may bring those back: they stay until a clean-up has synced the directory.
                if is_durable:
                    incoming.discard()
        size = sum(disk.file.size for disk in new.disks)
        return SynthesizeReport(vm, point, manifest.base, size, sharing.bytes)

    def prune(self, vm: str, keep: Keep, poll: Poll, *, dry_run: bool) -> PruneReport:
        """Make fulls of what is kept but builds on what is not, verify what is kept, then remove the rest,
        bases last.

        Raises Refused, Damaged, OSError: what has been done until then stands, and every chain is whole.
        """
        loaded = self.load(vm)
        if not loaded.points and not loaded.damaged:
            raise Refused(f"the target has no VM {vm}")
        plan = plan_prune(loaded.points, keep, self.unfinished_points(vm), self._bases_of(vm, loaded.damaged))
        sizes = [disk.file.size for point in plan.remove for disk in loaded.points[point].disks]
        if plan.remove and not dry_run:
            for point in plan.synthesize:
                self._make_full(vm, point, poll)
            self._check_kept(vm, plan.wanted, poll)
            for point in plan.remove:
                begin(poll, "remove", point, None)
                poll()
                self._remove(vm, point)
        broken = [point for point in plan.keep if point not in plan.wanted]
        damaged = sorted([p for p in broken if not is_restorable(loaded.points, p)] + [*loaded.damaged])
        return PruneReport(vm, plan.keep, plan.synthesize, plan.remove, sum(sizes), damaged, plan.verdicts)

    def _make_full(self, vm: str, point: str, poll: Poll) -> None:
        try:
            self.synthesize(vm, point, poll)
        except Damaged as error:
            raise _prune_stopped(vm, str(error)) from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                error.errno,
                f"{error.strerror}: {vm}/{point} cannot be made a full; nothing was removed: make room, or"
                " keep more points, so that what it builds on stays",
            ) from error

    def _check_kept(self, vm: str, wanted: list[str], poll: Poll) -> None:
        """Every file of what is to be kept is still what was committed, down to the last bit. Raises Damaged.

        All of it was compared with the source's digests before it was committed, so the target's own are
        enough here: each file is read once, from end to end.
        """
        loaded = self.load(vm)
        needed = {link.point for point in wanted for link in chain_of(loaded.points, point)}
        for point in sorted(needed):
            manifest = loaded.points[point]
            files = (manifest.config, manifest.index, *(disk.file for disk in manifest.disks))
            begin(poll, "check", point, sum(file.size for file in files))
            _, problems = check_files(self._directory(vm) / point, manifest, poll)
            if problems:
                raise _prune_stopped(vm, problems[0])

    def _bases_of(self, vm: str, points: Iterable[str]) -> dict[str, str | None]:
        """What points without a good manifest build on, as far as their indexes tell."""
        found: dict[str, str | None] = {}
        for point in points:
            found[point] = None
            with contextlib.suppress(OSError, StreamError):
                found[point] = index_header(self._directory(vm) / point / INDEX).base
        return found

    def _remove(self, vm: str, point: str) -> None:
        """Readers that have its files open go on with them."""
        directory = self._directory(vm)
        temporary = directory / f"{DISCARDED_PREFIX}{point}"
        with self._names:
            if needing := dependants(self.load(vm).points, point):
                raise Refused(f"{vm}/{point} is needed by {needing[0]}")
            self._files.retire(directory / point, temporary)
        self._files.remove_tree(temporary)
        log.info("point.removed", vm=vm, point=point)

    def _directory(self, vm: str) -> Path:
        if not NAME_PATTERN.fullmatch(vm):
            raise Refused(f"{vm[:80]!r} is not a VM's name")
        return self.root / vm


def _prune_stopped(vm: str, problem: str) -> Damaged:
    return Damaged(
        f"{problem}; nothing was removed: an older point may be what is left of it (diskctl target verify"
        f" {vm} tells more)"
    )


def _may_go_on(path: Path, now: float) -> bool:
    """An unfinished point with a record that is not older than any source would wait."""
    if not path.name.startswith(INCOMING_PREFIX):
        return False
    try:
        return now - (path / PROGRESS).stat().st_mtime < UNFINISHED_SECONDS_MAX
    except OSError:
        return False


def full_of(opened: OpenPoint) -> tuple[ExportHeader, Iterator[tuple[int, int, bytes]]]:
    """An open point as a full export: its header, and (disk, offset, data) in order, verified as read."""
    manifest = opened.manifest
    disks = [attrs.evolve(disk, cluster_bytes=FULL_CLUSTER_BYTES) for disk in opened.index.header.disks]
    header = attrs.evolve(
        opened.index.header, base=None, kind="full", config=opened.config, disks=disks, point=manifest.point
    )

    def frames() -> Iterator[tuple[int, int, bytes]]:
        for number, disk in enumerate(header.disks):
            for offset, data in frames_of_view(opened.views[disk.name], disk.size_bytes):
                yield number, offset, data

    return header, frames()


def _identity(root: Path) -> str:
    """The repository's own name, made at its first start: sources remember which target knows of a point."""
    path = root / IDENTITY
    found = read_small_file(path).decode("ascii", "replace") if path.exists() else ""
    if not _IDENTITY.fullmatch(found):
        if found:
            log.warning("repository.identity_replaced", path=str(path))
        found = secrets.token_hex(16)
        replace_file(path, found.encode())
    return found


@contextmanager
def open_repository(root: Path, files: RepositoryFiles | None = None) -> Iterator[Repository]:
    """The repository under ``root``, locked and cleaned up. Raises OperatorError, LockHeldError."""
    if not root.is_dir():
        raise OperatorError(f"{root}: no such directory; create it, or give another --root")
    try:
        lock = lock_file(root / LOCK)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise OperatorError(f"{root}: cannot be written: {error.strerror}") from error
        raise
    try:
        repository = Repository(root, _identity(root), files or RepositoryFiles())
        for path in repository.clean_up(time.time()):
            log.info("repository.leftover_removed", path=path)
        yield repository
    finally:
        os.close(lock)

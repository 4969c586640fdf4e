"""Making and opening the files of an image: everything here is for a worker thread."""

import contextlib
import os
import secrets
from pathlib import Path
from uuid import UUID, uuid4

import attrs

from daemonkit import durable
from daemonkit.errors import OperatorError, words_of
from daemonkit.units import format_size
from diskd.core import avhd, interval, mrt, recovery, resize
from diskd.core.extents import PageMap
from diskd.core.geometry import IMAGE_TOML, RAW, Identity, decode_identity, encode_identity
from diskd.core.points import Catalogue, Segment
from diskd.core.recovery import Recovered
from diskd.core.steps import Script, Sync, Truncate
from diskd.errors import Damaged, Refused
from diskd.shell import live_map, qemu_locks
from diskd.shell.files import Files
from diskd.shell.image_settings import ImageSettings
from diskd.shell.raw_layer import now_ns
from diskd.shell.shared_memory import SharedDirectory


@attrs.frozen(eq=False)
class OpenFiles:
    """What ``open_blocking`` hands over: locked, recovered, and whoever gets it closes it."""

    directory: Path
    identity: Identity
    settings: ImageSettings
    files: Files
    shared: SharedDirectory
    recovered: Recovered


def settled_facts(files: Files) -> mrt.RawFacts:
    """What the raw file looks like, durably: fdatasync alone may lose the times that recovery compares."""
    descriptor = files.descriptor(RAW)
    os.fsync(descriptor)
    status = os.fstat(descriptor)
    return mrt.RawFacts(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def create_blocking(directory: Path, identity: Identity) -> None:
    """Raises OSError, FileExistsError where the directory is there already."""
    directory.mkdir()
    adopt_blocking(directory, identity)


def adopt_blocking(directory: Path, identity: Identity) -> None:
    """Make an image of a directory in which there is its raw file, or nothing. Raises OSError."""
    files = Files(directory)
    try:
        files.run_blocking(_create_raw(identity.geometry.size_bytes))
        files.run_blocking(recovery.create(identity, uuid4(), settled_facts(files)))
        durable.replace_file(directory / IMAGE_TOML, encode_identity(identity))
        durable.sync_directory(directory.parent)
    finally:
        files.close()


def _create_raw(size_bytes: int) -> Script[None]:
    yield Truncate(RAW, size_bytes)
    yield Sync(RAW)


def open_blocking(directory: Path, settings: ImageSettings) -> OpenFiles:
    """Raises Refused or Damaged."""
    name = directory.name
    try:
        data = durable.read_small_file(directory / IMAGE_TOML)
        identity = decode_identity(data, where=f"{name}: {IMAGE_TOML}")
        boot_id = UUID(settings.boot_id_file.read_text().strip())
    except FileNotFoundError as error:
        raise Refused(f"{name}: no image there ({error.filename} is missing)") from error
    except ValueError as error:
        raise Refused(f"{settings.boot_id_file}: not a boot id") from error
    settings.check(identity.geometry)
    with contextlib.ExitStack() as undo:
        files = Files(directory)
        undo.callback(files.close)
        shared = SharedDirectory(settings.shared_dir, identity.uuid)
        undo.callback(shared.close)
        try:
            _lock_raw(name, files)
            # A crashed daemon may have renamed and not come to this; recovery relies on what it reads.
            durable.sync_directory(directory)
            identity = _finish_resize(identity, settings, files)
            recovered = _recover(directory, identity, settings, files, shared, boot_id)
        except OSError as error:
            where = error.filename or directory
            raise Refused(f"{name}: cannot be opened: {where}: {error.strerror or error}") from error
        undo.pop_all()
    return OpenFiles(directory, identity, settings, files, shared, recovered)


def _lock_raw(name: str, files: Files) -> None:
    try:
        descriptor = files.descriptor(RAW)
    except FileNotFoundError as error:
        raise Damaged(f"{name}: {RAW} is missing; restore it from a backup") from error
    qemu_locks.lock(descriptor, name)


def _finish_resize(identity: Identity, settings: ImageSettings, files: Files) -> Identity:
    script = resize.resume(
        identity,
        settled_facts(files),
        mrt_changed_ns=_changed_ns(files.directory / mrt.FILE),
        now_ns=now_ns(),
        interval_ns=settings.tracking_flush_interval_ns,
    )
    return files.run_blocking(script)


def _changed_ns(path: Path) -> int:
    try:
        return path.stat().st_ctime_ns
    except FileNotFoundError:
        return 0


def _recover(
    directory: Path,
    identity: Identity,
    settings: ImageSettings,
    files: Files,
    shared: SharedDirectory,
    boot_id: UUID,
) -> Recovered:
    facts = settled_facts(files)
    size_bytes = identity.geometry.size_bytes
    if facts.size_bytes != size_bytes:
        raise Damaged(
            f"{directory.name}: {RAW} has {format_size(facts.size_bytes)}, {IMAGE_TOML} says"
            f" {format_size(size_bytes)}; restore it from a backup"
        )
    around = recovery.Surroundings(
        memory=shared,
        boot_id=boot_id,
        raw=facts,
        mrt_changed_ns=_changed_ns(directory / mrt.FILE),
        now_ns=now_ns(),
        interval_ns=settings.tracking_flush_interval_ns,
        fresh_nonce=secrets.token_bytes(16),
        fresh_generation=uuid4(),
    )
    recovered = files.run_blocking(recovery.recover(identity, around))
    shared.remove_others(recovered.area.nonce)
    _remove_orphans(directory, recovered.catalogue)
    if not (directory / avhd.HEAD_FILE).exists():
        live_map.forget_others(settings.shared_dir, identity.uuid, None)
    return recovered


def read_interval_blocking(
    directory: Path, identity: Identity, generation: UUID, segment: Segment
) -> PageMap:
    """The changes of one closed interval. Raises Damaged, also where its file cannot be read."""
    path = directory / interval.file_name(segment.interval)
    try:
        data = durable.read_small_file(path, size_bytes_max=interval.size_bytes_max(identity))
    except FileNotFoundError as error:
        raise Damaged(f"{path.name} is missing") from error
    except (OSError, OperatorError) as error:
        raise Damaged(f"{path.name} cannot be read: {words_of(error)}") from error
    return interval.decode(identity, generation, segment, data)


def _remove_orphans(directory: Path, catalogue: Catalogue) -> None:
    """Interval files that no catalogue knows any more, and halves of small files."""
    known = {segment.interval for segment in catalogue.segments}
    for path in directory.iterdir():
        number = interval.parse_file_name(path.name)
        if number is not None and number not in known:
            path.unlink()
    remove_halves(directory)


def remove_halves(directory: Path) -> None:
    """The new content of small files that a killed daemon had not yet renamed to them. What cannot be removed
    stays: it is no reason to refuse an image."""
    for path in directory.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()

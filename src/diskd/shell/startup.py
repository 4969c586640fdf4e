"""Gathers what core/startup.py judges: the root's file system, shared memory, the clock, limits. Blocking."""

import contextlib
import os
import resource
import time
from pathlib import Path
from typing import Final

import structlog

from daemonkit import durable
from daemonkit.errors import HoldfastError
from diskd.core.geometry import IMAGE_TOML, RAW, decode_identity
from diskd.core.startup import Facts, file_system_of, judge, newest
from diskd.shell.files import write_zeroes, zeroes_fast

_PROBE_BYTES: Final = 1 << 20

log = structlog.get_logger("startup")


def check_surroundings(root: Path, shared_dir: Path) -> None:
    """Raises Refused for what cannot be served; logs what will hurt."""
    for warned in judge(gather(root, shared_dir)):
        log.warning(f"startup.{warned.check}", reason=warned.text)


def gather(root: Path, shared_dir: Path) -> Facts:
    """The facts, as of now. Raises nothing: what cannot be found out is left out."""
    mounts = ""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        mounts = Path("/proc/self/mountinfo").read_text()
    write_error, makes_holes, punches = _probe(root)
    bitmaps, times = _images(root / "images")
    shared = os.statvfs(shared_dir) if shared_dir.is_dir() else None
    return Facts(
        root=str(root),
        file_system=file_system_of(mounts, str(root.resolve())),
        write_error=write_error,
        makes_holes=makes_holes,
        punches_holes=punches,
        shared_dir=str(shared_dir),
        shared_file_system=file_system_of(mounts, str(shared_dir.resolve())),
        shared_bytes=shared.f_blocks * shared.f_frsize if shared is not None else 0,
        bitmap_bytes=bitmaps,
        newest_ns=newest(times),
        now_ns=time.time_ns(),
        files_max=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )


def _probe(root: Path) -> tuple[str | None, bool | None, bool | None]:
    """Why nothing can be written, whether files can be sparse, whether holes can be punched."""
    path = root / f".probe-{os.getpid()}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        return error.strerror, None, None
    try:
        os.ftruncate(descriptor, _PROBE_BYTES)
        makes_holes = os.fstat(descriptor).st_blocks * 512 < _PROBE_BYTES
        write_zeroes(descriptor, 0, 4096)
        return None, makes_holes, zeroes_fast(descriptor)
    except OSError as error:
        return error.strerror, None, None
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


def _images(directory: Path) -> tuple[int, list[int]]:
    bitmaps, times = 0, []
    with contextlib.suppress(OSError):
        for path in directory.iterdir():
            with contextlib.suppress(OSError, HoldfastError):
                bitmaps += decode_identity(durable.read_small_file(path / IMAGE_TOML)).geometry.bitmap_bytes
                times.append((path / RAW).stat().st_mtime_ns)
    return bitmaps, times

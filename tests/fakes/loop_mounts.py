"""Real file systems in tests: btrfs, xfs or ext4 in a file, on a loop device, or a skip that says why.

Needs root and the kernel's loop device; no network and nothing outside the test's own directory is touched.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# xfs refuses less than 300 MiB; the files are sparse, so that this costs nothing.
SIZES = {"btrfs": 256 << 20, "xfs": 320 << 20, "ext4": 32 << 20}
_MAKE = {
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "ext4": ["mkfs.ext4", "-q", "-F", "-m", "0"],
}
_PACKAGES = {"btrfs": "btrfs-progs", "xfs": "xfsprogs", "ext4": "e2fsprogs"}
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _run(argv: list[str]) -> str | None:
    """What it said, where it failed."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    return None if done.returncode == 0 else " ".join((done.stdout + done.stderr).split()) or "failed"


@contextlib.contextmanager
def loop_mount(kind: str, *, size: int | None = None) -> Iterator[Path]:
    """Where a fresh file system of this kind is mounted; skips the test, saying why, where that cannot be."""
    if os.geteuid() != 0:
        pytest.skip(f"mounting {kind} on a loop device needs root")
    make = shutil.which(_MAKE[kind][0], path=_PATH)
    if make is None:
        pytest.skip(f"{_MAKE[kind][0]} is not installed (Debian package {_PACKAGES[kind]})")
    # Not under pytest's directory: what a killed run leaves mounted would fail the next runs' tidying there.
    directory = Path(tempfile.mkdtemp(prefix="holdfast-loop-"))
    try:
        backing, where = directory / f"{kind}.disk", directory / kind
        backing.touch()
        os.truncate(backing, size or SIZES[kind])
        where.mkdir()
        if said := _run([make, *_MAKE[kind][1:], str(backing)]):
            pytest.fail(f"mkfs for {kind}: {said}")
        if said := _run(["mount", "-o", "loop", str(backing), str(where)]):
            pytest.skip(f"{kind} cannot be mounted on a loop device here: {said}")
        try:
            yield where
        finally:
            # Lazily: what a crash on purpose has left open must not fail the test.
            said = _run(["umount", "--lazy", str(where)])
            assert said is None, said
    finally:
        shutil.rmtree(directory, ignore_errors=True)

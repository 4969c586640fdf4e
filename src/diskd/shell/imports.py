"""Brings the content of a disk image file into a new image: sparse, in chunks, with progress.

Raw files are copied as they are; what another format's signature names goes through ``qemu-img convert``
first. The format is never guessed from a name, and a raw file that merely starts like another format cannot
be told apart: its owner converts it.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from diskd.core.ports import Device
from diskd.errors import Refused

Progress = Callable[[int, int], None]  # bytes done, bytes in total

_CHUNK_BYTES: Final = 1 << 20
_SECTOR_BYTES: Final = 512
_SIGNATURES: Final = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"QED\0", "qed"),
)


def detect_format(source: Path) -> str:
    """By signature. Raises Refused where the file cannot be read."""
    try:
        with source.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise Refused(f"{source}: {error.strerror}") from error
    for offset, magic, name in _SIGNATURES:
        if start[offset : offset + len(magic)] == magic:
            return name
    return "raw"


def size_of(source: Path) -> int:
    """The size that an image of this raw file gets: whole sectors. Raises Refused."""
    try:
        with source.open("rb") as file:
            size = os.lseek(file.fileno(), 0, os.SEEK_END)
    except OSError as error:
        raise Refused(f"{source}: {error.strerror}") from error
    if size == 0:
        raise Refused(f"{source}: the file is empty")
    return -(-size // _SECTOR_BYTES) * _SECTOR_BYTES


async def convert(source: Path, name: str, raw: Path) -> None:
    """``source``, of format ``name``, as the raw file ``raw``. Raises Refused."""
    program = shutil.which("qemu-img")
    if program is None:
        raise Refused(f"{source} is {name}: importing that needs qemu-img (Debian: apt install qemu-utils)")
    done = await trio.run_process(
        [program, "convert", "-f", name, "-O", "raw", str(source), str(raw)],
        stdin=subprocess.DEVNULL,
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise Refused(f"qemu-img could not convert {source}: {lines[-1] if lines else done.returncode}")


async def copy_in(source: Path, device: Device, progress: Progress | None) -> None:
    """Write everything of the raw file that is not zero, then flush. Raises OSError."""
    descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        offset = 0
        while offset < device.size_bytes:
            start, data = await trio.to_thread.run_sync(_next_data, descriptor, offset)
            if data is None:
                break
            if data.count(0) != len(data):
                await device.write(start, data)
            offset = start + len(data)
            if progress is not None:
                progress(offset, device.size_bytes)
        await device.flush()
    finally:
        os.close(descriptor)
    if progress is not None:
        progress(device.size_bytes, device.size_bytes)


def _next_data(descriptor: int, offset: int) -> tuple[int, bytes | None]:
    """The next chunk that is not a hole, at its offset; padded to a whole sector at the file's end."""
    try:
        start = os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError:
        return offset, None  # ENXIO: only a hole is left
    start = start // _SECTOR_BYTES * _SECTOR_BYTES
    length = _CHUNK_BYTES - start % _CHUNK_BYTES
    data = os.pread(descriptor, length, start)
    return start, data + bytes(-len(data) % _SECTOR_BYTES) if data else None

"""The VM's `system` disk: an ext4 file system made from real files, changed as a guest would change it.

No kernel here can mount an NBD export, so the demo plays the guest's file system driver: `debugfs -w`
changes a private copy, and exactly the blocks that differ are written through NBD to the image. The copy
is at the same time the independent truth that every restored backup is compared with.
"""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import attrs

from holdfast.demo.stage import DemoFailed
from holdfast.guest.nbd import NbdClient

BLOCK_BYTES = 4096
SYSTEM_BYTES = 64 << 20
_COPY_BYTES = 1 << 20


def find(program: str) -> str | None:
    """Debian keeps e2fsprogs in /usr/sbin, which is not on every user's PATH."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def has_e2fsprogs() -> bool:
    return all(find(program) for program in ("mke2fs", "debugfs", "e2fsck"))


def _run(*argv: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)


def make_system(path: Path, files: Path) -> None:
    """A disk image at ``path``: ext4 with ``files`` in it; plain bytes where e2fsprogs is missing."""
    with path.open("wb") as image:
        image.truncate(SYSTEM_BYTES)
    if has_e2fsprogs():
        argv = [find("mke2fs") or "", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=0,nodiscard"]
        done = _run(*argv, "-d", str(files), str(path))
        if done.returncode:
            raise DemoFailed(f"mke2fs failed: {done.stderr.strip()}")
        return
    with path.open("r+b") as image:
        for number, source in enumerate(sorted(p for p in files.rglob("*") if p.is_file())):
            image.seek(number * (1 << 20))
            image.write(source.read_bytes()[: 1 << 20])


def change(path: Path, number: int) -> None:
    """Change the file system in ``path``: new files come, an old one goes."""
    if not has_e2fsprogs():
        with path.open("r+b") as image:
            image.seek((32 << 20) + number * (1 << 20))
            image.write(_content(number))
        return
    source = path.with_suffix(".incoming")
    source.write_bytes(_content(number))
    script = f"write {source} /var/change-{number}.bin\n"
    if number > 1:
        script += f"rm /var/change-{number - 1}.bin\n"
    done = _run(find("debugfs") or "", "-w", "-f", "-", str(path), stdin=script)
    source.unlink()
    if done.returncode:
        raise DemoFailed(f"debugfs failed: {done.stderr.strip()}")


def _content(number: int) -> bytes:
    """300 KB that compress badly and differ for every change."""
    block = hashlib.blake2b(str(number).encode()).digest()
    return b"".join(hashlib.blake2b(block + index.to_bytes(4, "big")).digest() for index in range(4700))


def is_clean(path: Path) -> bool | None:
    """What `e2fsck -fn` says of a restored disk; None where it is not installed."""
    if not has_e2fsprogs():
        return None
    return _run(find("e2fsck") or "", "-fn", str(path)).returncode == 0


def changed_blocks(old: Path, new: Path) -> list[int]:
    """Numbers of the blocks in which two files of one size differ."""
    blocks = []
    with old.open("rb") as one, new.open("rb") as two:
        number = 0
        while (left := one.read(BLOCK_BYTES)) and (right := two.read(BLOCK_BYTES)):
            if left != right:
                blocks.append(number)
            number += 1
    return blocks


def write_through(uri: str, path: Path, blocks: list[int]) -> None:
    """Write the given blocks of ``path`` to the NBD export, and flush."""
    with path.open("rb") as file, NbdClient(uri) as client:
        for number in blocks:
            file.seek(number * BLOCK_BYTES)
            client.write(number * BLOCK_BYTES, file.read(BLOCK_BYTES))
        client.flush()


def copy_out(uri: str, path: Path) -> None:
    """The whole content of an NBD export, as a file."""
    with path.open("wb") as file, NbdClient(uri) as client:
        for offset in range(0, client.size_bytes, _COPY_BYTES):
            file.write(client.read(offset, min(_COPY_BYTES, client.size_bytes - offset)))


def digest(path: Path) -> str:
    state = hashlib.blake2b()
    with path.open("rb") as file:
        while chunk := file.read(_COPY_BYTES):
            state.update(chunk)
    return state.hexdigest()


def first_difference(one: Path, two: Path) -> str | None:
    """None where two files are equal byte for byte, else where they first differ."""
    if one.stat().st_size != two.stat().st_size:
        return f"sizes {one.stat().st_size} and {two.stat().st_size}"
    if digest(one) == digest(two):
        return None
    blocks = changed_blocks(one, two)
    return f"{len(blocks)} blocks differ, the first at byte {blocks[0] * BLOCK_BYTES}"


@attrs.frozen
class Truth:
    """Copies of both disks as they were at the instant of a point, taken without our backup code."""

    point: str
    disks: dict[str, Path]

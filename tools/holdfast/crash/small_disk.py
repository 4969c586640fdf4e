"""A small file system that can be filled, where root may mount one."""

import contextlib
import shutil
import subprocess
from pathlib import Path

import trio


class SmallDisk:
    """A tmpfs over an empty directory, with one file that takes what room is not to be had."""

    def __init__(self, directory: Path, options: str) -> None:
        """``options``: of mount(8), such as "size=400m"."""
        self._directory = directory
        self._filler = directory / "filler"
        mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
        self.is_small = subprocess.run(mount, capture_output=True, check=False).returncode == 0

    def fill(self, room_bytes: int) -> None:
        """All but so many bytes of it."""
        free = shutil.disk_usage(self._directory).free
        with self._filler.open("wb") as file, contextlib.suppress(OSError):
            file.truncate(0)
            left = free - room_bytes
            while left > 0:
                left -= file.write(bytes(min(left, 1 << 20)))

    def empty(self) -> None:
        self._filler.unlink(missing_ok=True)

    async def close(self) -> None:
        if self.is_small:
            await trio.run_process(["umount", "--lazy", str(self._directory)])

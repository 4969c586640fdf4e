"""Any raw file as a device and as the only export: for `diskd nbd --raw`, and as the benchmark's control.

Nothing is tracked, nobody is fenced: the file is served as it is, under QEMU's own locks.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from diskd.core.ports import Allocation, Export
from diskd.errors import NoSuchExport, Refused
from diskd.shell import qemu_locks
from diskd.shell.raw_layer import RawLayer


class OpenFile:
    """One open file, as a raw layer wants it. Raises Refused where it cannot be served."""

    def __init__(self, path: Path) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise Refused(f"{path}: {error.strerror}") from error
        try:
            qemu_locks.lock(self._descriptor, str(path))
            self.size_bytes = os.lseek(self._descriptor, 0, os.SEEK_END)
        except BaseException:
            self.close()
            raise

    def descriptor(self, name: str) -> int:
        """The file's, whatever the name."""
        return self._descriptor

    def sync(self, name: str) -> None:
        """fdatasync."""
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


class RawFile:
    """ports.Device straight over a raw layer."""

    is_read_only = False

    def __init__(self, file: OpenFile) -> None:
        self._layer = RawLayer(file, file.size_bytes, lambda: None)
        self.size_bytes = file.size_bytes
        # Nothing to do before or after these: they are the layer's own.
        self.zeroes_fast = self._layer.zeroes_fast
        self.read_nowait = self._layer.read_nowait
        self.read_into_nowait = self._layer.read_into_nowait
        self.write_nowait = self._layer.write_nowait
        self.read_in_place = self._layer.read_into_nowait
        self.write_in_place = self._layer.write_nowait

    def begin_in_place(self) -> bool:
        return True

    async def read(self, offset: int, length: int) -> bytes:
        return await self._layer.read(offset, length)

    async def write(self, offset: int, data: bytes | memoryview, *, fua: bool = False) -> None:
        await self._layer.write(offset, data)
        if fua:
            await self.flush()

    async def write_zeroes(
        self, offset: int, length: int, *, may_trim: bool = True, fua: bool = False
    ) -> None:
        await self._layer.write_zeroes(offset, length, may_trim=may_trim)
        if fua:
            await self.flush()

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        await self.write_zeroes(offset, length, fua=fua)

    async def flush(self) -> None:
        await self._layer.flush()

    async def allocation(self, offset: int, length: int) -> list[Allocation]:
        return await self._layer.allocation(offset, length)


class RawFileCatalog:
    """ports.ExportCatalog with one device: the default export, under the empty name."""

    def __init__(self, device: RawFile) -> None:
        self._export = Export(device, True, {}, lambda: None, fast_zero=device.zeroes_fast)

    def names(self) -> Sequence[str]:
        return [""]

    async def open(self, name: str, *, peer: str, drop: Callable[[str], None]) -> Export:
        return await self.info(name)

    async def info(self, name: str) -> Export:
        if name:
            raise NoSuchExport(
                f"there is no export {name[:200]!r}: the file is the default export, without a name"
            )
        return self._export

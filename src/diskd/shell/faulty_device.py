"""A device that fails and waits on command, over any other device: how tests and the lab plan bad storage.

``fail`` decides per operation: it is given the operation's name, offset and length and answers an errno
or None. While the gate is closed every operation waits; the non-blocking forms then say that they would.
"""

import os
from collections.abc import Callable
from typing import TypeAlias

import trio

from diskd.core.ports import Allocation, Device

Fail: TypeAlias = Callable[[str, int, int], int | None]


def _never(_operation: str, _offset: int, _length: int) -> int | None:
    return None


class FaultyDevice:
    """``inner`` with faults. Waiting operations can be counted, and let go, from the outside."""

    def __init__(self, inner: Device, *, fail: Fail = _never) -> None:
        self._inner = inner
        self.fail = fail
        self.waiting = 0
        self._gate = trio.Event()
        self._gate.set()

    @property
    def size_bytes(self) -> int:
        return self._inner.size_bytes

    @property
    def is_read_only(self) -> bool:
        return self._inner.is_read_only

    def close_gate(self) -> None:
        """From now on operations wait."""
        self._gate = trio.Event()

    def open_gate(self) -> None:
        self._gate.set()

    def _check(self, operation: str, offset: int, length: int) -> None:
        code = self.fail(operation, offset, length)
        if code is not None:
            raise OSError(code, os.strerror(code))

    async def _pass(self, operation: str, offset: int, length: int) -> None:
        self.waiting += 1
        try:
            await self._gate.wait()
        finally:
            self.waiting -= 1
        self._check(operation, offset, length)

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        if not self._gate.is_set():
            return None
        self._check("read", offset, length)
        return self._inner.read_nowait(offset, length)

    async def read(self, offset: int, length: int) -> bytes:
        await self._pass("read", offset, length)
        return await self._inner.read(offset, length)

    def write_nowait(self, offset: int, data: bytes | memoryview) -> bool:
        if not self._gate.is_set():
            return False
        self._check("write", offset, len(data))
        return self._inner.write_nowait(offset, data)

    async def write(self, offset: int, data: bytes | memoryview, *, fua: bool = False) -> None:
        await self._pass("write", offset, len(data))
        await self._inner.write(offset, data, fua=fua)

    async def write_zeroes(
        self, offset: int, length: int, *, may_trim: bool = True, fua: bool = False
    ) -> None:
        await self._pass("write_zeroes", offset, length)
        await self._inner.write_zeroes(offset, length, may_trim=may_trim, fua=fua)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        await self._pass("trim", offset, length)
        await self._inner.trim(offset, length, fua=fua)

    async def flush(self) -> None:
        await self._pass("flush", 0, 0)
        await self._inner.flush()

    async def allocation(self, offset: int, length: int) -> list[Allocation]:
        await self._pass("allocation", offset, length)
        return await self._inner.allocation(offset, length)

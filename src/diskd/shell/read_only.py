"""The writing half of a device that is only read: refused, in one place, for all of them."""

import errno


class NoWrites:
    """What ports.Device (and ports.InPlace) has for writing. ``what`` is named in the refusal."""

    def __init__(self, what: str) -> None:
        self._what = what

    def _refusal(self) -> OSError:
        return PermissionError(errno.EPERM, f"{self._what} is read-only")

    def write_in_place(self, offset: int, data: memoryview) -> bool:
        raise self._refusal()

    def write_nowait(self, offset: int, data: bytes | memoryview) -> bool:
        raise self._refusal()

    async def write(self, offset: int, data: bytes | memoryview, *, fua: bool = False) -> None:
        raise self._refusal()

    async def write_zeroes(
        self, offset: int, length: int, *, may_trim: bool = True, fua: bool = False
    ) -> None:
        raise self._refusal()

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        raise self._refusal()

    async def flush(self) -> None:
        """Nothing was written, so there is nothing to make durable."""

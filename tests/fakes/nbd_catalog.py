"""A catalog of exports made by hand, for tests of the NBD server without images."""

from collections.abc import Awaitable, Callable, Sequence

import trio

from diskd.core.ports import ChangeReport, Device, Export
from diskd.errors import NoSuchExport, Refused


class FakeCatalog:
    """``devices`` by export name; ``points`` (of every export) by point id; ``refused`` names by reason."""

    def __init__(self, devices: dict[str, Device], *, multi_conn: bool = True) -> None:
        self.devices = devices
        self.points: dict[str, ChangeReport] = {}
        self.refused: dict[str, str] = {}
        self.drops: list[Callable[[str], None]] = []
        self.open_count = 0
        self.reports = 0
        self.multi_conn = multi_conn

    def names(self) -> Sequence[str]:
        return sorted(set(self.devices) - set(self.refused))

    def _answer(self, report: ChangeReport) -> Callable[[], Awaitable[ChangeReport]]:
        async def answer() -> ChangeReport:
            await trio.lowlevel.checkpoint()
            self.reports += 1
            return report

        return answer

    def _export(self, name: str, close: Callable[[], None]) -> Export:
        if name in self.refused:
            raise Refused(self.refused[name])
        if name not in self.devices:
            raise NoSuchExport(f"there is no export {name!r}")
        contexts = {point: self._answer(report) for point, report in self.points.items()}
        return Export(self.devices[name], self.multi_conn, contexts, close)

    async def open(self, name: str, *, peer: str, drop: Callable[[str], None]) -> Export:
        assert peer
        export = self._export(name, self._close)
        self.drops.append(drop)
        self.open_count += 1
        return export

    def _close(self) -> None:
        self.open_count -= 1

    async def info(self, name: str) -> Export:
        return self._export(name, lambda: None)

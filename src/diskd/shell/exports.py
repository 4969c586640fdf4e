"""The catalog of export names (DESIGN.md section 7): `IMAGE`, `IMAGE@EPOCH`, `IMAGE:CHECKPOINT`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import structlog
import trio

from daemonkit.units import MINUTE, SECOND
from diskd.core import lease
from diskd.core.ports import Export
from diskd.core.seldom import Seldom
from diskd.errors import NoSuchExport, Refused
from diskd.shell.checkpoints import Checkpoints
from diskd.shell.frozen import FrozenDevice, contexts
from diskd.shell.open_image import OpenImage

log = structlog.get_logger()

_REFUSAL_SAID_NS: Final = MINUTE
_NAME_CHARS_MAX: Final = 80


class Exports:
    """Implements ports.ExportCatalog over the images that are open: ``names``, ``open``, ``info``."""

    def __init__(self, images: Mapping[str, OpenImage], checkpoints: Checkpoints) -> None:
        self._images = images
        self._checkpoints = checkpoints
        self._refusals = Seldom(_REFUSAL_SAID_NS)

    def names(self) -> Sequence[str]:
        """Export names that ``open`` would accept now."""
        found: list[str] = []
        for name in sorted(self._images):
            found += self._images[name].export_names()
            found += self._checkpoints.exports(name)
        return found

    async def open(self, name: str, *, peer: str, drop: Callable[[str], None]) -> Export:
        """ports.ExportCatalog.open: `IMAGE`, `IMAGE@EPOCH`, `IMAGE:CHECKPOINT`."""
        try:
            image, epoch, checkpoint = self._parse(name)
            if checkpoint is not None:
                return self._frozen_export(image, checkpoint)
            export = await image.open_session(epoch, drop)
        except Refused as error:
            self._say_refused(name, peer, str(error))
            raise
        log.info("export.opened", export=name, peer=peer)
        return export

    def _say_refused(self, name: str, peer: str, reason: str) -> None:
        """A fenced run's client knocks again and again, as long as nobody stops it."""
        silenced = self._refusals.ask(name[:_NAME_CHARS_MAX], int(trio.current_time() * SECOND))
        if silenced is not None:
            shown = name[:_NAME_CHARS_MAX]
            log.info("export.refused", export=shown, peer=peer, reason=reason, silenced=silenced)

    async def info(self, name: str) -> Export:
        """ports.ExportCatalog.info."""
        image, epoch, checkpoint = self._parse(name)
        return image.info(epoch) if checkpoint is None else self._frozen_export(image, checkpoint)

    def _parse(self, name: str) -> tuple[OpenImage, int | None, str | None]:
        """Raises NoSuchExport."""
        base, colon, checkpoint = name.partition(":")
        base, at, digits = base.partition("@")
        epoch = lease.parse_epoch(digits) if at else None
        image = self._images.get(base)
        if image is None or (at and (colon or epoch is None)):
            raise NoSuchExport(f"there is no export {name[:200]!r}")
        return image, epoch, checkpoint if colon else None

    def _frozen_export(self, image: OpenImage, checkpoint: str) -> Export:
        try:
            disk = self._checkpoints.frozen_disk(image.name, checkpoint)
        except Refused as error:
            raise NoSuchExport(str(error)) from error
        return Export(FrozenDevice(disk), True, contexts(disk), lambda: None, disk.block_bytes)

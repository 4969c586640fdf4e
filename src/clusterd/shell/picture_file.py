"""The file of the store's last good picture: written in the background, newest only, waited for by nobody."""

from pathlib import Path

import structlog
import trio

from clusterd.core.picture import PICTURE_BYTES_MAX, Picture, decode_picture, encode_picture
from daemonkit.durable import read_small_file, replace_file
from daemonkit.errors import OperatorError

log = structlog.get_logger("picture")


def read_picture(path: Path) -> Picture | None:
    """What is there, None where it is absent or does not read: a node can do without, a recovery of the
    store then has to do with the other nodes'."""
    try:
        return decode_picture(read_small_file(path, size_bytes_max=PICTURE_BYTES_MAX))
    except FileNotFoundError:
        return None
    except (OSError, OperatorError) as error:
        log.warning("picture.unreadable", path=str(path), reason=str(error))
        return None


class PictureFile:
    """``keep`` from anywhere in this trio run; ``run`` is the task that writes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unwritten: Picture | None = None
        self._wanted = trio.Event()
        self._limiter = trio.CapacityLimiter(1)

    def keep(self, picture: Picture) -> None:
        self._unwritten = picture
        self._wanted.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            picture, self._unwritten = self._unwritten, None
            if picture is not None:
                await trio.to_thread.run_sync(self._write, picture, limiter=self._limiter)

    def _write(self, picture: Picture) -> None:
        try:
            replace_file(self._path, encode_picture(picture))
        except OSError as error:
            log.warning("picture.not_kept", path=str(self._path), reason=error.strerror)

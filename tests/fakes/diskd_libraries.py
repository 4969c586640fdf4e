"""Several image libraries over one root in one process: each as a daemon of its own, on hosts of its own.

Open-file-description locks keep descriptors apart, not processes, so that they conflict as between daemons.
"""

import contextlib
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import trio
from diskd_process import new_shared_dir

from daemonkit.units import KiB
from diskd.core.inventory import LibrarySettings
from diskd.shell.image import ImageSettings
from diskd.shell.library import Library, open_library


class Hosts:
    """Settings of a daemon by its name and its host's."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self._directory = directory
        self._shared: dict[str, Path] = {}

    def settings(self, daemon: str, host: str, **changes: Any) -> LibrarySettings:
        if host not in self._shared:
            self._shared[host] = new_shared_dir()
            number = len(self._shared)
            (self._directory / f"{host}.boot").write_text(f"00000000-0000-4000-8000-{number:012x}\n")
            (self._directory / f"{host}.machine").write_text(f"{number:032x}\n")
        return LibrarySettings(
            daemon_name=daemon,
            host_name=host,
            boot_id_file=str(self._directory / f"{host}.boot"),
            machine_id_file=str(self._directory / f"{host}.machine"),
            shared_dir=str(self._shared[host]),
            merge_batch_bytes=64 * KiB,
            **changes,
        )

    @contextlib.asynccontextmanager
    async def serving(self, daemon: str, host: str = "host1", **changes: Any) -> AsyncIterator[Library]:
        async with open_library(self.root, self.settings(daemon, host, **changes)) as library:
            yield library

    @contextlib.asynccontextmanager
    async def doomed(self, daemon: str, host: str = "host1", **changes: Any) -> AsyncIterator[Library]:
        """It ends as a killed process does: nothing is closed, flushed or recorded."""
        settings = self.settings(daemon, host, **changes)
        assert settings.shared_dir is not None
        assert settings.boot_id_file is not None
        for path in (self.root, *(self.root / name for name in ("images", "checkpoints", "daemons"))):
            path.mkdir(exist_ok=True)
        image_settings = ImageSettings(
            shared_dir=Path(settings.shared_dir), boot_id_file=Path(settings.boot_id_file)
        )
        async with trio.open_nursery() as nursery:
            library = Library(self.root, settings, image_settings, nursery_that_outlives_calls=nursery)
            await library.start()
            yield library
            nursery.cancel_scope.cancel(reason="killed")
        for image in library._images.values():
            image.abandon()
        library._lives._recovery.close()
        library._checkpoints.close()

    def close(self) -> None:
        for path in self._shared.values():
            shutil.rmtree(path)


@contextlib.contextmanager
def hosts(directory: Path) -> Iterator[Hosts]:
    made = Hosts(directory)
    try:
        yield made
    finally:
        made.close()

"""Readings of what diskd counts, for ``diskctl show`` and for the metrics endpoint."""

from daemonkit.errors import HoldfastError
from diskd.core.statistics import ClientStats, ImageStats
from diskd.shell.library import Library
from diskd.shell.nbd_server import NbdServer


def read_statistics(library: Library, server: NbdServer, names: list[str]) -> list[ImageStats]:
    """Of these images, or of all. Raises Refused for a name that is none's."""
    clients = server.clients()
    return [_one(library, name, clients) for name in names or [info.name for info in library.images()]]


def _one(library: Library, name: str, clients: list[ClientStats]) -> ImageStats:
    info = library.image(name)
    image = library.opened(name)
    if image is None:
        return ImageStats(info, None, None, None, None, None, None, [])
    tracker = image.image.tracker
    mine = [client for client in clients if client.export.partition(":")[0].partition("@")[0] == name]
    return ImageStats(
        image=info,
        lease=library.lease(name),
        points=library.points(name),
        io=image.image.counts,
        open_regions=tracker.open_count,
        open_bytes=tracker.open_bytes,
        max_open_bytes=image.image.settings.max_open_bytes,
        clients=mine,
    )


def read_all(library: Library, server: NbdServer) -> list[ImageStats]:
    """Of all images; one that goes away meanwhile is left out."""
    found = []
    for info in library.images():
        try:
            found += read_statistics(library, server, [info.name])
        except HoldfastError:
            continue
    return found

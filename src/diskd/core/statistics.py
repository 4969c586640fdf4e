"""What diskd counts, and what it says of itself: per image, per client, for the whole daemon.

Counting costs a request an addition or two to plain integers; whoever wants rates takes two readings. Counts
begin at zero when an image is opened.
"""

import attrs

from daemonkit.diskd_api import Lease
from diskd.core.inventory import ImageInfo, PointInfo


@attrs.define
class IoCounts:
    """Of one open image, over all its connections; the data that merges and exports move is not in it.

    ``errors``: requests that failed, those of fenced epochs included. ``flush_ns``: the time that guests
    waited in flushes, added up. ``regions_opened``: first touches, that is, regions opened in the MRT;
    ``marks``: the durable writes that this and the closing of regions took.
    """

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0
    zeroes: int = 0
    zeroed_bytes: int = 0
    trims: int = 0
    trimmed_bytes: int = 0
    flushes: int = 0
    flush_ns: int = 0
    errors: int = 0
    regions_opened: int = 0
    marks: int = 0


@attrs.frozen
class ClientStats:
    """One NBD connection. ``age_ns``: since it opened its export."""

    peer: str
    export: str
    requests: int
    age_ns: int


@attrs.frozen
class ImageStats:
    """Everything about one image. What only an open one has is None for the others."""

    image: ImageInfo
    lease: Lease | None
    points: list[PointInfo] | None
    io: IoCounts | None
    open_regions: int | None
    open_bytes: int | None
    max_open_bytes: int | None
    clients: list[ClientStats]


@attrs.frozen
class StatsRequest:
    """``images``: these; none named: all."""

    images: list[str]


@attrs.frozen
class StatsReport:
    """Sorted by name."""

    images: list[ImageStats]


@attrs.frozen
class DaemonVitals:
    """``loop_lag_ns``: the longest that the event loop was late within the last minute. ``threads``: of the
    process, idle ones included."""

    uptime_ns: int
    loop_lag_ns: int
    threads: int
    resident_bytes: int
    open_files: int
    files_max: int

"""What the operator can set for every image (DESIGN.md section 7, Settings)."""

from pathlib import Path

import attrs

from daemonkit.units import SECOND, GiB, format_size
from diskd.core.geometry import Geometry
from diskd.core.tracker import MARK_AHEAD_BYTES_MAX, REQUEST_BYTES_MAX
from diskd.errors import Refused


@attrs.frozen
class ImageSettings:
    """Defaults carry their reason."""

    # How long fine marks may live in shared memory only; also the grain of outside-change detection.
    tracking_flush_interval_ns: int = 5 * SECOND
    # Bounds what a power loss can over-report: at it, a first touch waits until a region has closed.
    max_open_bytes: int = 4 * GiB
    # A tmpfs: what survives a daemon and not a boot.
    shared_dir: Path = Path("/dev/shm")  # noqa: S108 - tmpfs is the point: it lives exactly as long as the boot
    boot_id_file: Path = Path("/proc/sys/kernel/random/boot_id")
    # Bounds what one sequential stream has open ahead of itself, on top of what it wrote.
    mark_ahead_bytes_max: int = MARK_AHEAD_BYTES_MAX

    def check(self, geometry: Geometry) -> None:
        """Raises Refused for what cannot work with an image."""
        # Two of the largest requests, and the regions that their ends share with neighbours.
        least = 2 * (REQUEST_BYTES_MAX + 2 * geometry.region_bytes)
        if self.max_open_bytes < least:
            raise Refused(f"max_open_bytes {format_size(self.max_open_bytes)}: at least {format_size(least)}")
        if self.tracking_flush_interval_ns <= 0:
            raise Refused("tracking_flush_interval: must be positive")

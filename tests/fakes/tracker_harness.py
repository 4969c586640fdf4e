"""A tracker in memory, of a new image without files."""

from uuid import UUID

from diskd.core.geometry import Geometry, Identity
from diskd.core.mrt import NO_NONCE, Header, RawFacts
from diskd.core.points import empty
from diskd.core.rct import empty_root
from diskd.core.recovery import Recovered
from diskd.core.shared import SharedArea
from diskd.core.tracker import Tracker

MiB = 1 << 20
REGIONS = 1000
NOBODY = UUID(int=0)


def tracker(*, max_open: int, ahead: int, size_bytes: int = REGIONS * MiB) -> Tracker:
    """With regions of 1 MiB; ``max_open`` and ``ahead`` in regions."""
    identity = Identity(UUID(int=7), Geometry.check(size_bytes, 4096, MiB))
    geometry = identity.geometry
    view = memoryview(bytearray(4096 + geometry.bitmap_bytes))
    facts = RawFacts(size_bytes, 0, 0, 1)
    header = Header(False, NOBODY, NOBODY, NO_NONCE, NO_NONCE, 1, 1, 0, facts)
    recovered = Recovered(
        "clean", None, SharedArea(view, NO_NONCE, 1), empty_root(identity, NOBODY, sequence=1, interval=1),
        header, empty(NOBODY), bytearray(geometry.region_count), bytearray(geometry.page_count),
    )  # fmt: skip
    return Tracker(identity, recovered, max_open_bytes=max_open * MiB, mark_ahead_bytes_max=ahead * MiB)

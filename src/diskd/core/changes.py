"""What has changed since a point, from the pages of all intervals since then."""

from collections.abc import Mapping

from diskd.core.extents import extents
from diskd.core.geometry import Geometry
from diskd.core.points import Span
from diskd.core.ports import ChangeReport


def report(
    geometry: Geometry, span: Span, pages: Mapping[int, bytes], *, active_over_report_bytes: int
) -> ChangeReport:
    """The answer to "changes since": what lies beyond the image's size at the point counts as changed."""
    size_bytes = geometry.size_bytes if span.end_bytes is None else span.end_bytes
    found = extents(pages, geometry.block_bytes, size_bytes)
    old_end = span.base.size_bytes // geometry.block_bytes * geometry.block_bytes
    if span.base.size_bytes < size_bytes:
        found = [(offset, min(length, old_end - offset)) for offset, length in found if offset < old_end]
        if found and sum(found[-1]) == old_end:
            old_end = found.pop()[0]
        found.append((old_end, size_bytes - old_end))
    over = sum(segment.over_report_bytes for segment in span.segments)
    if span.with_active:
        over += active_over_report_bytes
    over = min(over, sum(length for _, length in found))
    return ChangeReport(found, exact=over == 0, over_report_bytes=over)

"""Of which point a raw file is that exports are applied to: what its mark says, and what may be applied.

An export cannot be seen to fit a raw file by looking at the bytes: it holds what changed, not what was there.
So ``diskctl apply`` marks the files that it makes with the point that they are of. While a differential is
being applied the mark names both points, so that the same export, and no other, may be applied again after a
kill.
"""

from diskd.core.stream import ExportHeader
from diskd.errors import Refused

MARK_BYTES_MAX = 64


def done(header: ExportHeader) -> str:
    """The mark of a file that this export has made, or changed, completely."""
    return header.point


def under_way(header: ExportHeader) -> str:
    """The mark of a file that this differential is being applied to."""
    return f"{header.base}>{header.point}"


def check_base(mark: str | None, header: ExportHeader, *, trust: bool) -> None:
    """Raises Refused unless the differential builds on what the file is; ``trust``: the operator knows better
    than the mark, or than its absence."""
    if trust or mark in (header.base, under_way(header)):
        return
    if mark is None:
        raise Refused(
            f"nothing says that this file is the disk as of {header.base}, which the export builds on; if it"
            " is, use --trust-base"
        )
    if mark == header.point:
        raise Refused(f"this file is as of {header.point} already")
    if ">" in mark:
        base, _, point = mark.partition(">")
        raise Refused(
            f"applying {point} to this file was not completed: apply that export again first (it is neither"
            f" as of {base} nor of {point})"
        )
    raise Refused(
        f"this file is as of {mark}, but the export builds on {header.base}: apply those between first"
    )

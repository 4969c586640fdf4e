"""What an overlay is told by the operator, and what it asks of the layer below it."""

from contextlib import AbstractContextManager
from typing import Protocol

import attrs

from diskd.core.ports import Layer
from diskd.core.space import Reserve


class Parent(Layer, Protocol):
    """The frozen layer: the raw file."""

    def note_change(self) -> None: ...
    def by_thread(self) -> AbstractContextManager[None]:
        """While it lasts nothing is done in place: somebody does what makes the file's other I/O wait."""
        ...


@attrs.frozen
class OverlaySettings:
    """``avhd_limit_bytes``: how much one AVHD may hold; None is as much as the file system gives.
    ``merge_rate``: the most bytes a second that a merge moves; None is what the guest leaves room for.
    ``low_disk_limit``: a merge gives back space as it goes where less than that would be left."""

    merge_batch_bytes: int
    avhd_limit_bytes: int | None
    merge_rate: int | None = None
    low_disk_limit: Reserve | None = None

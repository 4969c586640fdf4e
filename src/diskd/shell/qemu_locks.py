"""QEMU's own byte locks on a raw file, so that stock qemu tools refuse to touch one that is served.

QEMU (block/file-posix.c) takes shared OFD locks on byte 100 + N for every permission N that it uses, and on
byte 200 + N for every permission that it does not share: N = 0 consistent read, 1 write, 2 write unchanged,
3 resize. Then it looks for a conflict with somebody else's bytes. We use all four, and share neither write
nor resize with anybody.
"""

from typing import Final

from diskd.errors import Refused
from diskd.shell import kernel_lock

_USED: Final = (100, 101, 102, 103)
_NOT_SHARED: Final = (201, 203)
# A conflict: somebody does not share what we use, or uses what we do not share.
_CONFLICTS: Final = (200, 201, 202, 203, 101, 103)


def lock(descriptor: int, name: str) -> None:
    """Hold the locks until the descriptor is closed. Raises Refused where another process conflicts."""
    for byte in (*_USED, *_NOT_SHARED):
        if not kernel_lock.take(descriptor, byte, shared=True):
            raise _in_use(name)
    for byte in _CONFLICTS:
        if not kernel_lock.is_free(descriptor, byte):
            raise _in_use(name)


def _in_use(name: str) -> Refused:
    return Refused(f"{name}: disk.raw is in use by another program (qemu, or another diskd): stop that first")

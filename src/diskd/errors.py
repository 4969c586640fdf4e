"""diskd's own errors; the taxonomy is daemonkit.errors'."""

import errno

from daemonkit.errors import OperatorError


class Refused(OperatorError):
    """A request that cannot be done now; the message says what to do."""


class NoSuchPoint(Refused):
    """T4: a point that is unknown, foreign or no longer valid; the remedy is a full backup."""


class NoSuchExport(Refused):
    """No image, epoch or checkpoint answers to this export name."""


class Damaged(Refused):
    """A side file or repository file does not read back as it was written."""


class Fenced(OSError):
    """S1: I/O under an epoch that is no longer the newest. Maps to ESHUTDOWN on the wire."""

    def __init__(self, reason: str) -> None:
        super().__init__(errno.ESHUTDOWN, reason)

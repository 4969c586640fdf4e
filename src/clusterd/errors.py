"""clusterd's own errors; the taxonomy is daemonkit.errors'."""

from daemonkit.errors import OperatorError


class Refused(OperatorError):
    """A request that cannot be done now; the message says what to do."""


class Unanswered(Refused):
    """Nobody can tell whether what was asked for was done."""


class StoreUnknown(OperatorError):
    """The store gave no usable answer; a write may have happened or not (S3, S6): keep every VM."""

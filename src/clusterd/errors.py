"""clusterd's own errors; the taxonomy is daemonkit.errors'."""

from daemonkit.errors import OperatorError


class Refused(OperatorError):
    """A request that cannot be done now; the message says what to do."""


class StoreUnknown(OperatorError):
    """The store gave no usable answer. The outcome of a write is unknown (S3, S6): keep every VM, start none."""

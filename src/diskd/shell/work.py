"""How far a long job in a worker thread is: the thread counts, and somebody on the loop tells its caller.

A ``Work`` is handed down in the place of the bare ``poll`` that such a job calls now and then, and which
raises once the job is to end. Whoever has nothing to tell hands down the bare function.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import attrs

Poll: TypeAlias = Callable[[], None]


@attrs.define(eq=False)
class Work:
    """``done_bytes`` of ``total_bytes`` (None where that is not known) of this step are done."""

    poll: Poll
    vm: str | None
    step: str = ""
    point: str | None = None
    done_bytes: int = 0
    total_bytes: int | None = None

    def __call__(self) -> None:
        """Raises what ``poll`` raises."""
        self.poll()

    def report(self) -> dict[str, Any]:
        """For the caller."""
        return {
            "step": self.step,
            "vm": self.vm,
            "point": self.point,
            "done_bytes": self.done_bytes,
            "total_bytes": self.total_bytes,
        }


def begin(poll: Poll, step: str, point: str | None, total_bytes: int | None) -> None:
    """The job goes on with something else."""
    if isinstance(poll, Work):
        poll.step, poll.point, poll.done_bytes, poll.total_bytes = step, point, 0, total_bytes


def count(poll: Poll, size_bytes: int) -> None:
    """So many more bytes of the step are done."""
    if isinstance(poll, Work):
        poll.done_bytes += size_bytes

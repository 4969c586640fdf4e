"""The simulated links between nodes, store and diskd: directed, with delay, loss and cuts."""

import random

import attrs

from daemonkit.units import MICROSECOND

DELAY_NS_MIN = 200 * MICROSECOND
DELAY_NS_SPREAD = 800 * MICROSECOND


@attrs.define
class SimNetwork:
    """A cut is silence in one direction. ``loss`` and ``extra`` apply to both directions of a pair."""

    randomness: random.Random
    cuts: set[tuple[str, str]] = attrs.field(factory=set)
    loss: dict[tuple[str, str], float] = attrs.field(factory=dict)
    extra: dict[tuple[str, str], int] = attrs.field(factory=dict)

    def loses(self, a: str, b: str) -> bool:
        """Whether a message from a to b, sent now, never arrives."""
        if (a, b) in self.cuts:
            return True
        lost = self.loss.get((a, b), 0.0)
        return bool(lost) and self.randomness.random() < lost

    def delay(self, a: str, b: str) -> int | None:
        """How long a message from a to b takes now; None: it is lost."""
        if self.loses(a, b):
            return None
        spread = int(self.randomness.random() * DELAY_NS_SPREAD)
        return DELAY_NS_MIN + spread + self.extra.get((a, b), 0)

    def is_open(self, a: str, b: str) -> bool:
        """Whether a request can go there and its answer back."""
        return not self.loses(a, b) and not self.loses(b, a)

    def cut(self, a: str, b: str, *, one_way: bool = False) -> None:
        self.cuts.add((a, b))
        if not one_way:
            self.cuts.add((b, a))

    def heal(self, a: str | None = None, b: str | None = None) -> None:
        """One pair, or everything."""
        if a is None or b is None:
            self.cuts.clear()
            self.loss.clear()
            self.extra.clear()
            return
        for pair in ((a, b), (b, a)):
            self.cuts.discard(pair)
            self.loss.pop(pair, None)
            self.extra.pop(pair, None)

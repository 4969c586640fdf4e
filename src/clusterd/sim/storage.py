"""The simulated diskd: leases with epochs per image, and a journal of what was acknowledged to whom.

It refuses I/O of any but the newest epoch (S1), so a checker can say afterwards whether two owners ever
wrote at once. Epochs that went down, or a write that slipped through, raise at once.
"""

import itertools

import attrs

from daemonkit.errors import InvariantBroken


@attrs.frozen
class Record:
    """One acknowledged write."""

    at: int
    epoch: int
    node: str


@attrs.define
class SimImage:
    epoch: int = 0
    holder: str | None = None
    last_io: int | None = None
    journal: list[Record] = attrs.field(factory=list)
    at: str | None = None  # whose diskd has it, where every host has its own


@attrs.frozen
class JournalReport:
    """As ``lab guest check`` reports it."""

    records: int
    lost: int
    overlaps: int
    owners: tuple[tuple[int, str], ...]
    longest_gap_ns: int


@attrs.define
class SimStorage:
    images: dict[str, SimImage] = attrs.field(factory=dict)
    is_up: bool = True
    per_host: bool = False  # one diskd on each host, over storage that all of them reach

    def image(self, name: str) -> SimImage:
        return self.images.setdefault(name, SimImage())

    def acquire(self, name: str, epoch: int, holder: str) -> tuple[bool, int]:
        """Whether the lease was granted, and the newest epoch."""
        image = self.image(name)
        if epoch < image.epoch or (epoch == image.epoch and holder != image.holder):
            return False, image.epoch
        image.epoch, image.holder = epoch, holder
        return True, epoch

    def write(self, name: str, epoch: int, node: str, now: int) -> bool:
        """One journal record; False: fenced."""
        image = self.image(name)
        if epoch != image.epoch:
            return False
        if image.journal and image.journal[-1].epoch > epoch:
            raise InvariantBroken(f"S1: {name} took a write of epoch {epoch} after a newer one")
        image.journal.append(Record(now, epoch, node))
        image.last_io = now
        return True

    def report(self, name: str, acknowledged: int) -> JournalReport:
        """What the independent checker would say of this journal. ``acknowledged``: what the guests counted
        themselves."""
        journal = self.image(name).journal
        overlaps = sum(1 for a, b in itertools.pairwise(journal) if b.epoch < a.epoch)
        gaps = [b.at - a.at for a, b in itertools.pairwise(journal)]
        owners = tuple(dict.fromkeys((record.epoch, record.node) for record in journal))
        return JournalReport(
            len(journal), max(0, acknowledged - len(journal)), overlaps, owners, max(gaps, default=0)
        )

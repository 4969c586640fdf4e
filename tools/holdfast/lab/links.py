"""The links of a lab and their faults: pure state, and the control calls that change it.

A link is directed: A→B and B→A fail apart. Its ends are the nodes n1, n2 …, and store, diskd, target.
A *cut* is silence: datagrams vanish, streams stall without FIN or RST, new connections are accepted
and then silent. Heartbeats travel on named networks, which can be cut one by one; a cut without a network
is a cut of everything between the two. An end without power is silent on all of its links, whatever
is healed meanwhile: its host is off.
"""

from typing import Final

import attrs

from daemonkit.errors import OperatorError
from daemonkit.methods import Method

STORE: Final = "store"
DISKD: Final = "diskd"
TARGET: Final = "target"
STORAGE: Final = (DISKD, TARGET)
DELAY_NS_MAX: Final = 60_000_000_000
LINKS_PER_CALL_MAX: Final = 8192


@attrs.frozen(order=True)
class Link:
    source: str
    destination: str

    @property
    def reverse(self) -> "Link":
        return Link(self.destination, self.source)

    def __str__(self) -> str:
        return f"{self.source}→{self.destination}"


@attrs.frozen
class Fault:
    """What is wrong with a link; the default is nothing. ``networks``: those cut one by one."""

    is_cut: bool = False
    networks: list[str] = attrs.field(factory=list)
    delay_ns: int = 0
    loss: float = 0.0


@attrs.frozen
class LinkChange:
    """Set what is not None on every link named. ``network`` narrows a cut to one network."""

    links: list[Link]
    network: str | None = None
    is_cut: bool | None = None
    delay_ns: int | None = None
    loss: float | None = None


@attrs.frozen
class LinkNames:
    """Links to heal or to reset; None means all."""

    links: list[Link] | None


@attrs.frozen
class Power:
    end: str
    is_on: bool


@attrs.frozen
class LinkState:
    link: Link
    fault: Fault


@attrs.frozen
class LinkReport:
    """Only links with a fault are listed. ``off``: ends without power."""

    faults: list[LinkState]
    off: list[str]
    streams: int
    datagrams_passed: int
    datagrams_dropped: int


LINKS_SET: Final = Method("links.set", LinkChange, LinkReport)
LINKS_HEAL: Final = Method("links.heal", LinkNames, LinkReport)
LINKS_RESET: Final = Method("links.reset", LinkNames, LinkReport)
LINKS_POWER: Final = Method("links.power", Power, LinkReport)
LINKS_SHOW: Final = Method("links.show", LinkNames, LinkReport)


class LinkTable:
    """The faults of every link between the ends it knows."""

    def __init__(self, ends: list[str]) -> None:
        self._ends = frozenset(ends)
        self._faults: dict[Link, Fault] = {}
        self._off: set[str] = set()

    def is_open(self, link: Link, network: str | None) -> bool:
        """Whether anything passes now. ``network`` is None for streams."""
        if link.source in self._off or link.destination in self._off:
            return False
        fault = self._faults.get(link)
        return fault is None or not (fault.is_cut or network in fault.networks)

    def fault(self, link: Link) -> Fault:
        return self._faults.get(link, Fault())

    def change(self, change: LinkChange) -> None:
        """Raises OperatorError, before anything is changed, for unknown ends and impossible values."""
        self.check(change.links)
        if change.delay_ns is not None and not 0 <= change.delay_ns <= DELAY_NS_MAX:
            raise OperatorError(f"a delay is at most {DELAY_NS_MAX // 1_000_000_000} s")
        if change.loss is not None and not 0.0 <= change.loss <= 1.0:
            raise OperatorError("a loss is a share between 0 and 1")
        for link in change.links:
            self._store(link, _changed(self.fault(link), change))

    def heal(self, links: list[Link] | None) -> None:
        """Forget the faults of these links, or all; power stays as it is. Raises OperatorError."""
        self.check(links or [])
        for link in list(self._faults) if links is None else links:
            self._store(link, Fault())

    def power(self, end: str, *, is_on: bool) -> None:
        """Raises OperatorError for an unknown end."""
        self._check_end(end)
        (self._off.discard if is_on else self._off.add)(end)

    def faults(self) -> list[LinkState]:
        return [LinkState(link, fault) for link, fault in sorted(self._faults.items(), key=lambda i: i[0])]

    def off(self) -> list[str]:
        return sorted(self._off)

    def check(self, links: list[Link]) -> None:
        """Raises OperatorError for a link that no lab of these ends has."""
        if len(links) > LINKS_PER_CALL_MAX:
            raise OperatorError(f"at most {LINKS_PER_CALL_MAX} links in one call")
        for link in links:
            self._check_end(link.source)
            self._check_end(link.destination)
            if link.source == link.destination:
                raise OperatorError(f"a link has two ends, {link.source!r} is given twice")

    def _check_end(self, end: str) -> None:
        if end not in self._ends:
            raise OperatorError(
                f"no end of a link is called {end!r} (there are {', '.join(sorted(self._ends))})"
            )

    def _store(self, link: Link, fault: Fault) -> None:
        if fault == Fault():
            self._faults.pop(link, None)
        else:
            self._faults[link] = fault


def _changed(fault: Fault, change: LinkChange) -> Fault:
    if change.is_cut is not None and change.network is None:
        fault = attrs.evolve(fault, is_cut=change.is_cut, networks=[])
    elif change.is_cut is not None and change.network is not None:
        others = [name for name in fault.networks if name != change.network]
        fault = attrs.evolve(fault, networks=sorted([*others, change.network]) if change.is_cut else others)
    if change.delay_ns is not None:
        fault = attrs.evolve(fault, delay_ns=change.delay_ns)
    if change.loss is not None:
        fault = attrs.evolve(fault, loss=change.loss)
    return fault


def both_ways(a: str, b: str) -> list[Link]:
    return [Link(a, b), Link(b, a)]


def links_of(end: str, ends: list[str], *, without: tuple[str, ...] = ()) -> list[Link]:
    """Every link of ``end``, in both directions, but those to the ends in ``without``."""
    others = [other for other in ends if other != end and other not in without]
    return [link for other in others for link in both_ways(end, other)]

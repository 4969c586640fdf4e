"""The mass-failure brake against a naive model that remembers every loss and counts all subsets."""

import itertools
from fractions import Fraction

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterd.core.brake import Losses, judged, struck
from clusterd.core.properties import Properties
from clusterd.core.records import BrakedNode, BrakeRecord

T = 10  # the isolation time
NAMES = ("a", "b", "c", "d", "e")
SHARES = ("0", "0.3", "0.4", "0.5", "0.6", "0.8", "1")


def properties(share: str, hold: int | None) -> Properties:
    return Properties(
        heartbeat_interval_ns=1,
        heartbeat_threshold=T,
        mass_failure_brake=float(share),
        mass_failure_hold_ns=hold,
    )


def is_enough(count: int, members: int, share: str) -> bool:
    return count >= 2 and Fraction(count) >= Fraction(share) * members


def naive_struck(ages: dict[str, int], counted: set[str], share: str) -> set[str]:
    """Every set of nodes that were lost within one isolation time of each other, big enough as it stands."""
    found: set[str] = set()
    there = [name for name, age in ages.items() if age >= 0]
    for size in range(2, len(there) + 1):
        for group in itertools.combinations(there, size):
            spread = max(ages[name] for name in group) - min(ages[name] for name in group)
            if spread <= T and is_enough(len(counted & set(group)), len(counted), share):
                found |= set(group)
    return found


@given(
    st.dictionaries(st.sampled_from(NAMES), st.integers(-5, 40)),
    st.sets(st.sampled_from(NAMES)),
    st.sampled_from(SHARES),
)
def test_who_was_lost_in_a_mass_failure(ages: dict[str, int], counted: set[str], share: str) -> None:
    assert struck(Losses(ages, counted), properties(share, None)) == naive_struck(ages, counted, share)


@attrs.define
class Model:
    """One life of a cluster, in ticks: since when each node is lost, since when held, what became of it."""

    share: str
    hold: int | None
    now: int = 0
    lost_at: dict[str, int] = attrs.field(factory=dict)
    held_at: dict[str, int] = attrs.field(factory=dict)
    word: dict[str, str] = attrs.field(factory=dict)
    proven: set[str] = attrs.field(factory=set)
    enough_since: int | None = None

    def away(self) -> int:
        return sum(1 for word in self.word.values() if word != "spared")

    def is_still_mass(self) -> bool:
        return is_enough(self.away(), len(NAMES), self.share)

    def tick(self) -> None:
        """The rules of DESIGN section 6, one after the other, as they are written there."""
        for name in [name for name in self.word if name not in self.lost_at]:  # it is back
            del self.word[name]
        ages = {name: self.now - at for name, at in self.lost_at.items()}
        for name in naive_struck(ages, set(NAMES), self.share):
            if self.word.get(name, "spared") == "spared":
                self.word[name], self.held_at[name] = "held", self.now
        for name, word in self.word.items():
            if word == "held" and name in self.proven:
                self.word[name] = "proven"
            elif word == "held" and self.hold is not None and self.now - self.held_at[name] >= self.hold:
                self.word[name] = "expired"
        long = self.enough_since is not None and self.now - self.enough_since >= T
        if long and not self.is_still_mass():
            self.word = {name: "spared" if word == "held" else word for name, word in self.word.items()}
        if "held" in self.word.values():
            for name in self.lost_at:
                self.word.setdefault(name, "spared")
        if "held" not in self.word.values() or self.is_still_mass():
            self.enough_since = None
        elif self.enough_since is None:
            self.enough_since = self.now


steps = st.lists(
    st.tuples(
        st.sampled_from(["lose", "lose", "lose", "return", "release", "prove", "wait", "wait"]),
        st.sampled_from(NAMES[1:]),
        st.integers(0, 12),
    ),
    max_size=40,
)


@settings(max_examples=300)
@given(steps, st.sampled_from(SHARES), st.none() | st.integers(1, 30))
def test_every_history_comes_to_what_the_model_says(
    history: list[tuple[str, str, int]], share: str, hold: int | None
) -> None:
    model, record = Model(share, hold), BrakeRecord()
    for what, name, gap in history:
        before, model.now = model.now, model.now + gap
        enough_for = None if model.enough_since is None else model.now - model.enough_since
        if what == "lose":
            model.lost_at.setdefault(name, model.now)
        elif what == "return":
            model.lost_at.pop(name, None)
            model.proven.discard(name)
        elif what == "prove" and name in model.lost_at:
            model.proven.add(name)
        elif what == "release" and model.word.get(name) == "held":
            model.word[name] = "released"
            record = BrakeRecord({**record.nodes, name: attrs.evolve(record.nodes[name], state="released")})
        aged = {
            node: attrs.evolve(braked, elapsed_ns=braked.elapsed_ns + model.now - before)
            for node, braked in record.nodes.items()
        }
        model.tick()
        ages = {node: model.now - at for node, at in model.lost_at.items()}
        losses = Losses(ages, NAMES, proven=model.proven)
        record = judged(BrakeRecord(aged), losses, properties(share, hold), enough_for)
        assert {node: braked.state for node, braked in record.nodes.items()} == model.word


@given(st.sets(st.sampled_from(NAMES[1:]), min_size=1), st.integers(0, 100), st.integers(0, 100))
def test_an_older_elapsed_part_only_lengthens_a_hold(names: set[str], written: int, lag: int) -> None:
    """What a new leader reads is at most the truth, so it holds whatever is to be held, or more."""
    limited = properties("0", 50)
    losses = Losses(dict.fromkeys(NAMES[1:], 0), NAMES)
    true = BrakeRecord({name: BrakedNode("held", written + lag) for name in sorted(names)})
    read = BrakeRecord({name: BrakedNode("held", written) for name in sorted(names)})
    assert set(judged(true, losses, limited).held()) <= set(judged(read, losses, limited).held())

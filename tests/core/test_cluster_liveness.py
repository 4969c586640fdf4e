"""Contact: by direct and relayed evidence, with the rule about those who do not hear us."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from clusterd.core.liveness import Contacts
from clusterd.core.messages import Heartbeat, Row, peer_id
from daemonkit.units import MILLISECOND, SECOND

BEAT = 100 * MILLISECOND
ISOLATION = SECOND
NAMES = ("a", "b", "c")


class Mesh:
    """Detectors of a few nodes, beating in step; ``cuts`` are directed pairs."""

    def __init__(self, *names: str) -> None:
        self.nodes = {name: Contacts.of(name, 1, names, ISOLATION) for name in names}
        self.cuts: set[tuple[str, str]] = set()
        self.now = 0

    def beat(self, times: int = 1) -> None:
        for _ in range(times):
            self.now += BEAT
            sent = {name: node.beat(self.now, hears_leader=False) for name, node in self.nodes.items()}
            for sender, heartbeat in sent.items():
                for name, node in self.nodes.items():
                    if name != sender and (sender, name) not in self.cuts:
                        node.heard(heartbeat, "x", self.now)
            for node in self.nodes.values():
                node.evaluate(self.now, losses=True)

    def contact(self, a: str, b: str) -> bool:
        return self.nodes[a].peers[b].in_contact


def everybody(mesh: Mesh) -> set[tuple[str, str]]:
    return {(a, b) for a in mesh.nodes for b in mesh.nodes if a != b and mesh.contact(a, b)}


ALL = {(a, b) for a in NAMES for b in NAMES if a != b}


def test_contact_takes_an_exchange_and_ends_after_the_isolation_time() -> None:
    mesh = Mesh("a", "b")
    mesh.beat()
    assert not everybody(mesh)  # heard, but not yet known to be heard
    mesh.beat()
    assert everybody(mesh) == {("a", "b"), ("b", "a")}
    mesh.cuts |= {("a", "b"), ("b", "a")}
    mesh.beat(8)
    assert everybody(mesh)
    mesh.beat(2)
    assert not everybody(mesh)


def test_one_cut_link_or_one_direction_isolates_nobody() -> None:
    for cuts in ({("a", "b")}, {("a", "b"), ("b", "a")}):
        mesh = Mesh(*NAMES)
        mesh.beat(3)
        mesh.cuts |= cuts
        mesh.beat(50)
        assert everybody(mesh) == ALL


TICK = 10 * MILLISECOND


def fine(mesh: Mesh, ticks: int) -> dict[tuple[str, str], list[int]]:
    """Every node beats at a phase of its own and judges every ten milliseconds; when contact was lost."""
    lost: dict[tuple[str, str], list[int]] = {}
    for _ in range(ticks):
        mesh.now += TICK
        for phase, (sender, node) in enumerate(mesh.nodes.items()):
            if (mesh.now - phase * 3 * TICK) % BEAT == 0:
                heartbeat = node.beat(mesh.now, hears_leader=False)
                for name, other in mesh.nodes.items():
                    if name != sender and (sender, name) not in mesh.cuts:
                        other.heard(heartbeat, "x", mesh.now)
        for name, node in mesh.nodes.items():
            for peer in node.evaluate(mesh.now, losses=True):
                if not peer.in_contact:
                    lost.setdefault((name, peer.name), []).append(mesh.now)
    return lost


def test_a_cut_link_isolates_nobody_at_any_moment() -> None:
    """The acknowledgement that the last direct heartbeat carried is not older than that heartbeat."""
    for links in itertools.product((False, True), repeat=2):
        mesh = Mesh(*NAMES)
        fine(mesh, 50)
        assert everybody(mesh) == ALL
        mesh.cuts |= {link for link, cut in zip((("a", "b"), ("b", "a")), links, strict=True) if cut}
        assert fine(mesh, 500) == {}, mesh.cuts


def test_both_ends_lose_contact_in_time_where_nobody_relays() -> None:
    for cuts in ({("a", "b")}, {("b", "a")}, {("a", "b"), ("b", "a")}):
        for begin in range(30):
            mesh = Mesh("a", "b")
            fine(mesh, 60 + begin)
            mesh.cuts |= cuts
            cut_at = mesh.now
            lost = fine(mesh, 150)
            assert set(lost) == {("a", "b"), ("b", "a")}
            assert all(len(times) == 1 for times in lost.values())
            assert max(max(times) for times in lost.values()) <= cut_at + ISOLATION + 3 * BEAT // 2


def test_contact_that_returns_stays() -> None:
    """The first heartbeats after a heal were sent by nodes that had not heard us yet. What they relay of one
    another is no contact either: it would end with the next heartbeat, and look like a second isolation."""
    for begin in range(30):
        for victim in NAMES:
            mesh = Mesh(*NAMES)
            fine(mesh, 60)
            mesh.cuts |= {link for link in ALL if victim in link}
            fine(mesh, 200 + begin)
            assert not {pair for pair in everybody(mesh) if victim in pair}
            mesh.cuts.clear()
            assert fine(mesh, 100) == {}, (begin, victim)
            assert everybody(mesh) == ALL


def test_who_is_heard_by_nobody_has_no_contact_by_relay() -> None:
    """a hears only c, and nobody hears a: what c relays of b shows that b has no evidence of a either."""
    mesh = Mesh(*NAMES)
    mesh.beat(3)
    mesh.cuts |= {("a", "b"), ("a", "c"), ("b", "a")}
    mesh.beat(20)
    assert everybody(mesh) == {("b", "c"), ("c", "b")}


def test_one_direction_between_two_nodes_isolates_both_alike() -> None:
    mesh = Mesh("a", "b")
    mesh.beat(3)
    mesh.cuts.add(("a", "b"))
    mesh.beat(11)
    assert not everybody(mesh)


def test_an_older_or_repeated_heartbeat_is_ignored() -> None:
    node = Contacts.of("a", 1, ("b",), ISOLATION)
    newer, older = Heartbeat("b", 2, 5, False, {}), Heartbeat("b", 1, 900, False, {})
    assert node.heard(newer, "x", 0)
    assert not node.heard(newer, "y", BEAT)
    assert not node.heard(older, "x", BEAT)
    assert node.peers["b"].advanced_at == 0
    assert node.peers["b"].networks == {"x": 0, "y": BEAT}
    assert node.heard(Heartbeat("b", 3, 1, False, {}), "x", 2 * BEAT)  # a restart is no replay


def test_a_stranger_is_ignored() -> None:
    node = Contacts.of("a", 1, ("b",), ISOLATION)
    assert not node.heard(Heartbeat("z", 1, 1, False, {}), "x", 0)
    assert not node.heard(Heartbeat("a", 9, 1, False, {}), "x", 0)


def test_a_newer_self_is_noticed() -> None:
    node = Contacts.of("a", 4, ("b",), ISOLATION)
    node.beat(0, hears_leader=False)
    for row, expected in ((Row(4, 1, False), None), (Row(4, 2, False), 4), (Row(7, 1, False), 7)):
        assert node.newer_self(Heartbeat("b", 1, 1, False, {peer_id("a"): row})) == expected


def test_a_stall_of_our_own_loop_isolates_nobody() -> None:
    mesh = Mesh("a", "b")
    mesh.beat(3)
    stall = 5 * SECOND
    mesh.now += stall
    mesh.nodes["a"].shift(stall, mesh.now)
    assert mesh.nodes["a"].evaluate(mesh.now, losses=True) == []


def test_the_longer_isolation_time_of_both_counts() -> None:
    mesh = Mesh("a", "b")
    mesh.nodes["b"].isolation_ns = 3 * ISOLATION
    mesh.beat(3)
    mesh.cuts |= {("a", "b"), ("b", "a")}
    mesh.beat(20)
    assert mesh.contact("a", "b")
    mesh.beat(12)
    assert not mesh.contact("a", "b")


def test_reachability_names_the_direction() -> None:
    mesh = Mesh("a", "b")
    mesh.beat(3)
    assert mesh.nodes["a"].reachability(mesh.now)["a"] == {"b": "both"}
    mesh.cuts.add(("a", "b"))
    mesh.beat(15)
    assert mesh.nodes["a"].reachability(mesh.now) == {"a": {"b": "in"}, "b": {"a": "out"}}
    three = Mesh(*NAMES)
    three.beat(3)
    three.cuts.add(("b", "a"))
    three.beat(15)
    assert three.nodes["a"].reachability(three.now)["a"] == {"b": "none", "c": "both"}
    assert three.nodes["a"].reachability(three.now)["b"]["c"] == "out"  # c's own word; b is silent here


@given(st.lists(st.tuples(st.sampled_from(sorted(ALL)), st.booleans()), max_size=12), st.integers(0, 30))
def test_contact_agrees_with_a_naive_oracle(changes: list[tuple[tuple[str, str], bool]], pause: int) -> None:
    """After a cut set has stood for long, contact is: evidence by some path, and, where the other's own
    heartbeats arrive, it has evidence of us by some path. Where they do not, whoever relays them has."""
    mesh = Mesh(*NAMES)
    mesh.beat(3)
    for link, cut in changes:
        (mesh.cuts.add if cut else mesh.cuts.discard)(link)
        mesh.beat(pause)
    mesh.beat(40)

    def path(a: str, b: str) -> bool:
        reached = {a}
        for _ in NAMES:
            reached |= {y for x in reached for y in NAMES if x != y and (x, y) not in mesh.cuts}
        return b in reached

    for a, b in ALL:
        (relay,) = set(NAMES) - {a, b}
        teller = b if (b, a) not in mesh.cuts else relay
        assert mesh.contact(a, b) == (path(b, a) and path(a, teller)), (a, b, mesh.cuts)

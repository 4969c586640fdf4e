"""Ungraceful exits: each isolation is counted once, and against the node that was away."""

import itertools

import pytest
from clusterd_story import Story

from daemonkit.units import MILLISECOND, SECOND

NODES = ("n1", "n2", "n3")


@pytest.mark.parametrize("with_store", [False, True])
def test_an_isolation_counts_against_nobody_but_the_node_that_was_away(with_store: bool) -> None:
    """Its contacts with the others end one after the other, so for a moment it seems to be among the majority
    that lost the first of them."""
    story = Story(quarantine_threshold="99")
    expected = dict.fromkeys(NODES, 0)
    for turn, name in zip(range(60), itertools.cycle(NODES), strict=False):
        leader = story.status["leader"]
        victim = leader if turn % 2 else name
        story.world.run_for(turn * 37 * MILLISECOND)
        if with_store:
            story.do(f"isolate {victim}")
        else:
            for other in NODES:
                if other != victim:
                    story.do(f"cut {victim} {other}")
        story.until(lambda s, v=victim: s["nodes"][v]["state"] == "isolated")
        story.world.run_for(turn % 3 * SECOND)
        story.do("heal")
        expected[victim] += 1
        story.until(lambda s, v=victim: s["nodes"][v]["state"] != "isolated", 60)
        story.world.run_for(4 * SECOND)
        counted = {name: node["ungraceful_exits"] for name, node in story.status["nodes"].items()}
        assert counted == expected, (turn, victim, leader, story.world.trace[-30:])

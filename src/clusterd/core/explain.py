"""``clusterctl explain node``: if this node vanished now, what happens to each of its VMs, when, and why.
The answer comes from the same code that the leader decides with."""

from typing import Any

import attrs

from clusterd.core.failover import judge
from clusterd.core.isolation import period_ns
from clusterd.core.leader import Leader
from clusterd.core.placement import place
from clusterd.core.records import Window
from daemonkit.units import to_seconds


def explain_node(leader: Leader, node: str) -> list[dict[str, Any]]:
    """One entry per VM that the node owns now, in the order in which they would be failed over."""
    desk, view = leader.desk, leader.desk.view
    gone = {node: "is the one that vanished"}
    answers = []
    for vm in view.vms():
        facts = leader.facts(vm)
        if facts.assignment is None or facts.assignment.owner != node:
            continue
        config = facts.spec.config
        period = period_ns(config, desk.properties, False)
        after = attrs.evolve(
            facts,
            owner_in_contact=False,
            previous_in_contact=False,
            window=Window(desk.properties.isolation_ns + (period or 0)),
        )
        verdict = judge(after, desk.properties)
        choice = place(config, leader.rooms(vm), excluded=dict(gone))
        answers.append(
            {
                "vm": vm,
                "priority": config.priority,
                "outcome": verdict.kind,
                "after_s": None if period is None else to_seconds(desk.properties.isolation_ns + period),
                "target": choice.node if verdict.kind == "start" else None,
                "why": verdict.why,
                "reasons": list(choice.reasons),
            }
        )
    return sorted(answers, key=lambda answer: (-answer["priority"], answer["vm"]))

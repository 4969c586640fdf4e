"""What the cluster says of itself, asked past the proxies."""

from collections.abc import Iterable
from typing import Any, Final

import trio

from clusterd.core.calls import STATUS, Nothing
from daemonkit.cli import call_once
from daemonkit.errors import OperatorError
from daemonkit.ports import Address
from daemonkit.rpc import CallFailed, CallRefused

ASK_SECONDS_MAX: Final = 2.0
POLL_SECONDS: Final = 0.05

Status = dict[str, Any]


async def ask_node(control: str) -> Status | None:
    """One node's status document, or None where it does not answer."""
    try:
        reply = await call_once(Address.parse(control), STATUS, Nothing(), seconds_max=ASK_SECONDS_MAX)
    except (CallFailed, CallRefused):
        return None
    return reply.document


async def ask_all(controls: Iterable[str]) -> list[Status]:
    """The answers of those that answer, in the order asked."""
    answers: dict[int, Status] = {}

    async def ask(index: int, control: str) -> None:
        if (answer := await ask_node(control)) is not None:
            answers[index] = answer

    async with trio.open_nursery() as nursery:
        for index, control in enumerate(controls):
            nursery.start_soon(ask, index, control)
    return [answers[index] for index in sorted(answers)]


def best(answers: Iterable[Status], *, but: str | None = None) -> Status | None:
    """The answer that counts: the leader's own, else of the node that sees most others up.

    ``but``: not this node's, when somebody else's view of it is wanted.
    """

    def weight(answer: Status) -> tuple[bool, int]:
        up = sum(node["state"] == "up" for node in answer["nodes"].values())
        return answer["leader"] == answer["answered_by"], up

    others = [answer for answer in answers if answer["answered_by"] != but]
    return max(others, key=weight, default=None)


def all_up(answers: list[Status], nodes: list[str]) -> bool:
    """Every node answers, and each sees every node up, a leader, and a store that answers."""
    return len(answers) == len(nodes) and all(
        answer["leader"] is not None
        and answer["store"] == "ok"
        and all(answer["nodes"].get(node, {}).get("state") == "up" for node in nodes)
        for answer in answers
    )


def describe_missing(answers: list[Status], nodes: list[str]) -> str:
    """Why the cluster is not up yet, in a few words."""
    silent = sorted(set(nodes) - {answer["answered_by"] for answer in answers})
    if silent:
        return f"{', '.join(silent)} did not answer"
    states = {node: {a["nodes"].get(node, {}).get("state", "unknown") for a in answers} for node in nodes}
    rest = [f"{node} is {'/'.join(sorted(seen))}" for node, seen in states.items() if seen != {"up"}]
    return ", ".join(rest) or "there is no leader, or the store does not answer"


class NotReached(OperatorError):
    """No node of the lab answers."""

"""What a node remembers across restarts of its clusterd: one small JSON document, replaced as a whole.

At start the shell reads the file, calls ``begin_incarnation``, replaces the file durably, and only then
constructs ``NodeCore`` with the result. So an incarnation is never used twice.
"""

import json
from typing import Final

import attrs

from clusterd.core.types import VmConfig
from clusterd.errors import Refused
from daemonkit.schema import SchemaError, structure, unstructure

INCARNATION_MAX: Final = (1 << 32) - 2


@attrs.frozen
class Intent:
    """A run this node may have started (S7): durable before the process is spawned."""

    config: VmConfig
    epoch: int
    boot_id: str


@attrs.frozen
class NodeState:
    """``store_id`` is the id of the store it has known, None before the first. ``epoch_seen`` and
    ``revision_seen``: marks below which a store is an older one (S6). ``recovery`` and ``recovery_token``: of
    the newest recovery of the store that it has seen, 0 for none. ``intents`` by VM name."""

    incarnation: int = 0
    store_id: str | None = None
    epoch_seen: int = 0
    revision_seen: int = 0
    intents: dict[str, Intent] = attrs.field(factory=dict)
    recovery: int = 0
    recovery_token: str = ""


def encode_state(state: NodeState) -> bytes:
    """The document that Persist carries."""
    return json.dumps(unstructure(state), sort_keys=True, indent=1).encode()


def decode_state(document: bytes | None) -> NodeState:
    """None or empty: a new node. Raises Refused for a damaged document, since forgetting runs is not safe."""
    if not document:
        return NodeState()
    try:
        return structure(NodeState, json.loads(document), where="node state")
    except (ValueError, RecursionError, SchemaError) as error:
        raise Refused(
            f"the node's state file does not read back ({error}): restore it, or remove it after "
            "making sure that no VM of this node runs"
        ) from error


def begin_incarnation(state: NodeState) -> NodeState:
    """The state with which the next clusterd of this node starts; persist it before using it."""
    if state.incarnation >= INCARNATION_MAX:
        raise Refused("the incarnation counter of this node is exhausted: remove the node and add it anew")
    return attrs.evolve(state, incarnation=state.incarnation + 1)

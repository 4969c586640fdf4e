"""Which of several nodes' status documents is the one to believe."""

from typing import Any


def choose_status(documents: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Of the status documents of all nodes that answered, the one to believe: of a node that is not
    isolated and knows the store, of the leader rather than of another, by name. A node that is back says so
    an interval before the others can."""

    def rank(name: str) -> tuple[bool, bool, bool, str]:
        document = documents[name]
        own = document["nodes"].get(name, {}).get("state")
        return own == "isolated", document["store"] != "ok", document["leader"] != name, name

    return documents[min(documents, key=rank)] if documents else None

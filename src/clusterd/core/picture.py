"""The last good picture of the store, kept by every node outside the store, so that it can be rebuilt (S6).

What is kept is the records themselves, as the store had them, but for those that end with a session (leader),
that the leader recomputes (held), or that only mean something beside revisions of that store (moves,
requests). Presence is kept for the boot ids. The store is the truth while there is one: no decision ever
reads what is kept here, only ``recovery`` does.
"""

import json
from typing import Final

import attrs

from clusterd.errors import Refused
from daemonkit.units import SECOND

PICTURE_INTERVAL_NS: Final = 2 * SECOND
PICTURE_BYTES_MAX: Final = 256 << 20  # what the witness holds at most
RECORDS_MAX: Final = 1 << 16
KEPT_HEADS: Final = ("members/", "goodbyes/", "confirmed/", "nodes/", "presence/")
KEPT_KEYS: Final = ("properties", "epoch", "vmset")
KEPT_PARTS: Final = ("/spec", "/assignment", "/run", "/doubt")


@attrs.frozen
class Picture:
    """``store_id``, ``recovery`` and ``revision``: of which store, after how many recoveries, and how far it
    was. ``records``: key (without the prefix) and value, ascending."""

    store_id: str
    recovery: int
    revision: int
    records: tuple[tuple[str, bytes], ...] = attrs.field(repr=False)

    @property
    def age_key(self) -> tuple[int, int]:
        """Of two pictures of one cluster the greater is the newer."""
        return self.recovery, self.revision


def is_kept(key: str) -> bool:
    """Whether this record belongs into the picture."""
    if key in KEPT_KEYS or key.startswith(KEPT_HEADS):
        return True
    return key.startswith("vms/") and key.endswith(KEPT_PARTS)


def encode_picture(picture: Picture) -> bytes:
    """One JSON document."""
    values = {key: value.decode() for key, value in picture.records}
    head = {"store_id": picture.store_id, "recovery": picture.recovery, "revision": picture.revision}
    return json.dumps({**head, "records": values}).encode()


def decode_picture(document: bytes) -> Picture:
    """Raises Refused for a document that does not read back: then this node has no picture."""
    try:
        table = json.loads(document)
        store_id, recovery, revision = table["store_id"], table["recovery"], table["revision"]
        values = table["records"]
        numbers = type(recovery) is int and type(revision) is int
        if not (isinstance(store_id, str) and numbers and len(values) <= RECORDS_MAX):
            raise ValueError("its head is not one")
        kept = tuple((key, values[key].encode()) for key in sorted(values) if is_kept(key))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"the kept picture of the store does not read back ({error})") from error
    return Picture(store_id, recovery, revision, kept)

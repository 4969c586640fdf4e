"""What the state of each node is, seen from this one: evidence, presence and goodbyes put together.

Theory of operation. *Liveness* has four values:

    joining   heard, but without presence key, or with runs taken from it that it may not have stopped
    up        in contact, present in the store, and settled: every run taken from it has been stopped
    isolated  no contact: this node's own verdict, shown at once
    down      no contact, and the leader recorded that its last finite window ended, or it said ``leave``

*Admission* is what operators and the leader allow: normal, paused, quarantined, leaving. The one word
``state`` shows down before isolated before admission before liveness.

Of ourselves we say ``isolated`` when we are in contact with no majority of the members, unless the store
answers us and says that no larger side is alive.
"""

from typing import Final, Literal

from clusterd.core import records
from clusterd.core.desk import Desk
from clusterd.core.types import Admission, Liveness

RECENT_BEATS: Final = 2  # below the lowest threshold, and above what a lost datagram takes
Standing = Literal["majority", "tie", "minority"]


def in_contact(desk: Desk, node: str) -> bool:
    """Contact by evidence; with ourselves always."""
    if node == desk.name:
        return True
    peer = desk.contacts.peers.get(node)
    return peer is not None and peer.in_contact


def all_in_contact(desk: Desk) -> bool:
    """Whether contact holds with every member: the usual case, told at once."""
    if desk.contacts.without_contact:
        return False
    memo = desk.view.memo
    found: bool | None = memo.get("all are peers")
    if found is None:
        found = memo["all are peers"] = desk.view.members().keys() <= {desk.name, *desk.contacts.peers}
    return found


def is_lost(desk: Desk, node: str) -> bool:
    """No contact, and not merely because this clusterd, or that one, has just begun: who was never met is
    given one isolation time from when both of us were there to be heard."""
    if in_contact(desk, node):
        return False
    peer = desk.contacts.peers.get(node)
    if peer is not None and peer.met:
        return True
    began_at = max(desk.started_at, desk.expected.get(node, (0, desk.started_at))[1])
    until = began_at + desk.properties.isolation_ns
    if desk.now < until:
        desk.wake(until)
    return desk.now >= until


def goodbye(desk: Desk, node: str) -> records.Goodbye | None:
    """The node's goodbye, if it is still about the incarnation that we last knew."""
    said = desk.view.record(f"goodbyes/{node}", records.Goodbye)
    if said is None:
        return None
    peer = desk.contacts.peers.get(node)
    known = desk.state.incarnation if node == desk.name else (peer.counter[0] if peer else 0)
    return said if known <= said.incarnation else None


def is_settled(desk: Desk, node: str) -> bool:
    """Whether the node has stopped every run that was taken from it, by its own word in the store."""
    presence = desk.view.presence(node)
    return presence is not None and presence.settled >= desk.view.mod(f"moves/{node}")


def liveness(desk: Desk, node: str) -> Liveness:
    """Evidence and store put together; see the header."""
    if node == desk.name:
        if desk.is_self_isolated:
            return Liveness.ISOLATED
        return Liveness.UP if is_settled(desk, node) and not desk.is_unsure else Liveness.JOINING
    if in_contact(desk, node):
        return Liveness.UP if is_settled(desk, node) else Liveness.JOINING
    if not is_lost(desk, node):
        return Liveness.JOINING
    said = goodbye(desk, node)
    window = desk.view.node(node).window
    if (said is not None and said.kind == "leave") or (window is not None and window.ended):
        return Liveness.DOWN
    return Liveness.ISOLATED


def admission(desk: Desk, node: str) -> Admission:
    """What the store says the node may do."""
    memo = desk.view.memo
    found: Admission | None = memo.get(("admission", node))
    if found is None:
        found = memo["admission", node] = _admission(desk, node)
    return found


def _admission(desk: Desk, node: str) -> Admission:
    member = desk.view.record(f"members/{node}", records.Member)
    if member is not None and member.admission == "leaving":
        return Admission.LEAVING
    if desk.view.node(node).quarantine_elapsed_ns is not None:
        return Admission.QUARANTINED
    if member is not None and member.admission == "paused":
        return Admission.PAUSED
    return Admission.NORMAL


def state_word(live: Liveness, admitted: Admission) -> str:
    """The one word shown: down before isolated before admission before liveness."""
    shown: Liveness | Admission = live
    if live not in (Liveness.DOWN, Liveness.ISOLATED) and admitted is not Admission.NORMAL:
        shown = admitted
    return str(shown.value)


def why_not_placed(desk: Desk, node: str) -> str:
    """S4: why nothing may be placed on this node now, or an empty text."""
    if desk.view.presence(node) is None:
        return "its presence key is gone"
    live, admitted = liveness(desk, node), admission(desk, node)
    if live is Liveness.UP and admitted is Admission.NORMAL:
        return ""
    return f"is {state_word(live, admitted)}"


def counted_members(desk: Desk) -> list[str]:
    """Members that count for majorities: quarantined and leaving ones take part in nothing."""
    memo = desk.view.memo
    found: list[str] | None = memo.get("counted")
    if found is None:
        apart = (Admission.QUARANTINED, Admission.LEAVING)
        found = memo["counted"] = [name for name in desk.view.members() if admission(desk, name) not in apart]
    return found


def _counted_present(desk: Desk) -> list[str]:
    """Those of them whose presence key is alive."""
    memo = desk.view.memo
    found: list[str] | None = memo.get("present")
    if found is None:
        found = [name for name in counted_members(desk) if desk.view.presence(name) is not None]
        memo["present"] = found
    return found


def standing(desk: Desk) -> Standing:
    """Our side among the members whose presence key is alive. Not being one of them is a minority.

    A leaving or quarantined node decides nothing, unless no counted member is alive at all: then somebody
    has to be able to end the quarantine or the leave."""
    alive = _counted_present(desk)
    if not alive:
        alive = [name for name in desk.view.members() if desk.view.presence(name) is not None]
    if desk.name not in alive:
        return "minority"
    if all_in_contact(desk):
        return "majority"
    ours = sum(1 for name in alive if in_contact(desk, name))
    if 2 * ours > len(alive):
        return "majority"
    return "tie" if 2 * ours == len(alive) else "minority"


def may_be_us(desk: Desk) -> bool:
    """Whether the node that was just lost may be well and we may be the one cut off: of the members whose
    presence is alive, fewer than half have been heard of in the last beats, though their evidence still
    counts. Contacts end one after the other, within a beat; who blames the first is wrong in that case. They
    come back one after the other as well, so for one isolation time after our own return nobody is blamed."""
    if desk.now < desk.back_since + desk.properties.isolation_ns:
        return True
    names = _counted_present(desk)
    recent = sum(1 for name in names if name == desk.name or is_recent(desk, name))
    return 2 * recent < len(names)


def is_recent(desk: Desk, node: str) -> bool:
    """Whether the node is in contact, and was heard of in the last beats."""
    peer = desk.contacts.peers.get(node)
    if peer is None or peer.advanced_at is None or not peer.in_contact:
        return False
    beat = desk.contacts.lasts_ns(peer) // desk.properties.heartbeat_threshold
    return desk.now < peer.advanced_at + RECENT_BEATS * beat


def judge_self(desk: Desk) -> bool:
    """Whether we are isolated ourselves."""
    if all_in_contact(desk):
        return False
    members = counted_members(desk)
    ours = sum(1 for name in members if in_contact(desk, name) or not is_lost(desk, name))
    if desk.name not in members:  # not counted, but the verdict is about the others' majority all the same
        members, ours = [*members, desk.name], ours + 1
    if len(members) <= 1 or 2 * ours > len(members):
        return False
    return not (desk.store_known and standing(desk) != "minority")

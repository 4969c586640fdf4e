"""Who leads: the holder of the leader key, as long as it deserves it.

Theory of operation. The key lies in the store under the holder's session. A node holds or campaigns for it
only while the store is known, its presence is recorded, and it is in contact with a majority of the
members whose presence key is alive, itself included. On a tie it may too (the store grants the key to one
of the two sides), unless none of its reference addresses answers. So the last node standing can act, a
minority never does (S3), and a leader that lost only its own cluster network steps aside.

    follower --key absent, eligible--> (campaign: guarded put) --granted--> leader
    leader --not eligible--> (resign: guarded delete) ; --session or key lost--> follower

A key of ours under a session that is not ours (any more), left over from before a restart or from before
``store_session`` changed, is let go at once, rather than waited out.
"""

import attrs

from clusterd.core import effects, events, records
from clusterd.core.desk import Desk
from clusterd.core.membership import is_settled, standing
from clusterd.core.store_session import StoreSession
from clusterd.core.types import EventName
from daemonkit.units import SECOND

REFERENCES_INTERVAL_NS = 2 * SECOND


@attrs.define
class Leadership:
    desk: Desk
    store: StoreSession
    was_leading: bool = False
    references_request: int | None = None
    references_at: int = 0
    references_answer: bool = True

    def decide(self) -> bool:
        """Campaign or resign; whether we lead now."""
        desk = self.desk
        leading = desk.is_leading()
        if leading != self.was_leading:
            self.was_leading = leading
            desk.note(EventName.LEADER_ELECTED if leading else EventName.LEADER_RESIGNED, node=desk.name)
        if not self.store.is_usable or desk.lease is None:
            return False
        eligible = self._is_eligible()
        key = desk.view.seen.get("leader")
        left_over = key is not None and key.record.node == desk.name and key.lease != desk.lease
        if (leading and not eligible) or left_over:
            self.store.write(("leader",), self.store.leading(), [], deletes=("leader",))
            return False
        if key is None and eligible and not desk.is_leaving_process:
            absent = effects.Compare("leader", "create", 0)
            record = records.Leader(desk.name)
            self.store.write(("leader",), [absent], [("leader", record)], leased=("leader",))
        return leading

    def _is_eligible(self) -> bool:
        desk = self.desk
        if desk.view.presence(desk.name) is None or not is_settled(desk, desk.name):
            return False
        side = standing(desk)
        if side == "tie":
            return self._references_allow()
        return side == "majority"

    def _references_allow(self) -> bool:
        desk = self.desk
        if not desk.identity.has_references:
            return True
        if self.references_request is None and desk.now >= self.references_at:
            self.references_request = desk.request()
            self.references_at = desk.now + REFERENCES_INTERVAL_NS
            desk.act(effects.CheckReferences(self.references_request))
        desk.wake(max(self.references_at, desk.now + SECOND))
        return self.references_answer

    def references_answered(self, event: events.ReferencesAnswered) -> None:
        if event.request == self.references_request:
            self.references_request, self.references_answer = None, event.any_answered

"""What one node can tell about the cluster when the store is lost: its marks, its runs, its last picture.

Kept up while the store is good (``Memory.decide``), given away when a recovery asks (``Memory.testimony``).
"""

import attrs

from clusterd.core import effects
from clusterd.core.desk import Desk
from clusterd.core.fencing import LocalRun, Phase
from clusterd.core.owner import Owner
from clusterd.core.picture import PICTURE_INTERVAL_NS, Picture, is_kept
from clusterd.core.store_session import StoreSession
from clusterd.core.types import RunState, VmConfig


@attrs.frozen
class LiveRun:
    """A run of which a process may live on the node that tells of it."""

    config: VmConfig
    epoch: int
    state: RunState
    boot_id: str
    pid: int | None = None


@attrs.frozen
class Testimony:
    """``epoch``: the newest that this node has seen anywhere. ``picture_recovery`` and ``picture_revision``:
    how new its picture of the store is; -1 where it has none."""

    node: str
    boot_id: str
    store_id: str | None
    store_known: bool
    recovery: int
    recovery_token: str
    epoch: int
    runs: tuple[LiveRun, ...] = ()
    picture_recovery: int = -1
    picture_revision: int = -1

    @property
    def picture_age_key(self) -> tuple[int, int]:
        return self.picture_recovery, self.picture_revision


def _state(run: LocalRun) -> RunState:
    if run.phase is Phase.ONLINE:
        return "stalled" if run.is_stalled else "online"
    return "stopping" if run.phase is Phase.STOPPING else "starting"


@attrs.define
class Memory:
    """``kept``: the newest picture that was handed to the shell, or that it had at the start."""

    desk: Desk
    store: StoreSession
    owner: Owner
    kept: Picture | None = None
    version: int = -1
    keep_at: int = 0

    def start(self) -> None:
        """What was kept also shows how far the store had come: a copy from before that is an older one (S6).
        The state file may not: it is written when a run begins or ends, not when the store moves on."""
        kept, state = self.kept, self.desk.state
        if kept is not None and (kept.store_id, kept.recovery) == (state.store_id, state.recovery):
            self.store.revision_kept = kept.revision

    def decide(self) -> None:
        """Keep the picture where it has changed. Comes again with every read of the store, so nothing has to
        wake us for it."""
        desk = self.desk
        if not self.store.is_usable or "id" not in desk.view.seen:
            return
        if desk.view.version == self.version or desk.now < self.keep_at:
            return
        self.version = desk.view.version
        picture = self._of_view()
        if picture is None or (self.kept is not None and picture.records == self.kept.records):
            return
        self.kept, self.keep_at = picture, desk.now + PICTURE_INTERVAL_NS
        desk.act(effects.KeepPicture(picture))

    def _of_view(self) -> Picture | None:
        desk = self.desk
        if desk.state.store_id is None or not desk.view.has_read:
            return None
        seen = desk.view.seen
        kept = tuple((key, seen[key].value) for key in sorted(seen) if is_kept(key))
        return Picture(desk.state.store_id, desk.state.recovery, desk.view.revision, kept)

    def picture(self) -> Picture | None:
        """The newest that this node has of its own store."""
        found = self._of_view() or self.kept
        return found if found is not None and found.store_id == self.desk.state.store_id else None

    def testimony(self) -> Testimony:
        """What there is to tell now."""
        desk, state, picture = self.desk, self.desk.state, self.picture()
        runs = tuple(
            LiveRun(run.config, run.epoch, _state(run), run.boot_id, run.pid)
            for _, run in sorted(self.owner.runs.items())
            if run.may_live()
        )
        epochs = [run.epoch for run in self.owner.runs.values()]
        return Testimony(
            desk.name,
            desk.identity.boot_id,
            state.store_id,
            desk.store_known,
            state.recovery,
            state.recovery_token,
            max([state.epoch_seen, self.store.epoch_seen, desk.view.epoch(), *epochs]),
            runs,
            picture.recovery if picture else -1,
            picture.revision if picture else -1,
        )

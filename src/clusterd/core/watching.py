"""Looking at diskd from time to time: for our own runs (a newer epoch means that we are fenced, silence
that storage is stalled), and for unmonitored VMs of others (evidence of life: shown, never decisive)."""

from typing import Final

import attrs

from clusterd.core import effects, events
from clusterd.core.desk import Desk
from clusterd.core.membership import in_contact
from clusterd.core.owner import Owner
from clusterd.core.types import FINAL_RUN_STATES, UNSTARTED_RUN_STATES, Disk
from daemonkit.units import MILLISECOND, SECOND

INTERVAL_NS_MIN: Final = 500 * MILLISECOND
INTERVAL_NS_MAX: Final = 10 * SECOND


@attrs.define
class Watching:
    desk: Desk
    owner: Owner
    request: int | None = None
    asked: tuple[Disk, ...] = ()
    next_at: int = 0
    looks: dict[str, tuple[events.ImageLook, int]] = attrs.field(factory=dict)  # by image, with our time

    def decide(self) -> None:
        """Ask, if it is time and there is something to look at."""
        desk = self.desk
        if self.request is None and desk.now >= self.next_at:
            disks = self._disks()
            self.next_at = desk.now + self._interval_ns()
            if disks:
                self.request, self.asked = desk.request(), disks
                desk.act(effects.LookAtImages(self.request, disks))
        if self.request is None:
            desk.wake(self.next_at)

    def _interval_ns(self) -> int:
        return min(max(self.desk.properties.isolation_ns // 2, INTERVAL_NS_MIN), INTERVAL_NS_MAX)

    def _disks(self) -> tuple[Disk, ...]:
        view = self.desk.view
        disks = {disk for run in self.owner.live() for disk in run.config.disks}
        for vm in view.vms():
            spec, assignment, run = view.spec(vm), view.assignment(vm), view.current_run(vm)
            if spec is None or assignment is None or run is None or in_contact(self.desk, assignment.owner):
                continue
            if run.state not in (*FINAL_RUN_STATES, *UNSTARTED_RUN_STATES):
                disks.update(spec.config.disks)
        return tuple(sorted(disks))

    def images_seen(self, event: events.ImagesSeen) -> bool:
        """Answers arrived."""
        if event.request != self.request:
            return False
        self.request = None
        found = {look.disk.image: look for look in event.looks}
        for image, look in found.items():
            self.looks[image] = (look, self.desk.now)
        self.owner.images_seen(found, {disk.image for disk in self.asked})
        return True

    def last_io_age_ns(self, images: list[str]) -> int | None:
        """How long ago diskd last saw I/O of any of these images, as of now."""
        ages = []
        for image in images:
            look, at = self.looks.get(image, (None, 0))
            if look is not None and look.last_io_age_ns is not None:
                ages.append(look.last_io_age_ns + self.desk.now - at)
        return min(ages, default=None)

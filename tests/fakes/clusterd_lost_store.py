"""A store that is lost in the simulated world, and what must be so before and after."""

from clusterd_story import Story

from clusterd.core.events import StoreEntry
from clusterd.sim.store import SimStore


def lose(story: Story, copy: tuple[int, dict[str, StoreEntry]] | None = None) -> None:
    """The store comes back empty, or as an older copy; every node finds it unknown."""
    if copy is None:
        story.world.store = SimStore(next_lease=5000)
    else:
        story.world.store.revision, story.world.store.entries = copy[0], dict(copy[1])
        story.world.store.leases.clear()
    story.until(lambda _: all(s["store"] == "unknown" for s in story.world.statuses().values()))


def pids(story: Story, *names: str) -> list[tuple[str, str, int, int]]:
    """(VM, node, epoch, pid) of every process of these VMs."""
    found = [(name, *place) for name in names for place in story.world.processes_of(name)]
    return [(name, host.name, process.epoch, process.pid) for name, host, process in found]


def all_up(story: Story) -> None:
    story.until(
        lambda s: s["store"] == "ok" and s["leader"] and all(n["state"] == "up" for n in s["nodes"].values())
    )

"""Where a VM may run: a pure function, deterministic, with its reasons.

A node is a candidate if it is up and present (S4), its admission is normal, it is not excluded, and its
memory and vCPUs suffice. Among candidates: where an operator sent it first, then preferred nodes in their
order, then the fewest VMs, then the most free memory, then the name.
"""

import attrs

from clusterd.core.types import VmConfig
from daemonkit.units import format_size


@attrs.frozen
class Room:
    """One node as placement sees it. ``why_not``: a reason against any placement, empty if there is none."""

    name: str
    memory_bytes: int
    vcpus: int
    used_memory_bytes: int = 0
    used_vcpus: int = 0
    vms: int = 0
    why_not: str = ""


@attrs.frozen
class Choice:
    """``node`` None: nowhere. ``reasons``: for the chosen node, or against each."""

    node: str | None
    reasons: tuple[str, ...]


def refusal(vm: VmConfig, room: Room) -> str:
    """Why ``vm`` cannot run in this room, or an empty text."""
    if room.why_not:
        return room.why_not
    free = room.memory_bytes - room.used_memory_bytes
    if vm.memory_bytes > free:
        return f"needs {format_size(vm.memory_bytes)}, {format_size(max(free, 0))} free"
    if vm.vcpus > room.vcpus - room.used_vcpus:
        return f"needs {vm.vcpus} vCPUs, {max(room.vcpus - room.used_vcpus, 0)} free"
    return ""


def place(
    vm: VmConfig, rooms: list[Room], *, wanted: str | None = None, excluded: dict[str, str] | None = None
) -> Choice:
    """The node for ``vm``. ``excluded``: nodes with the reason why not now."""
    against: list[str] = []
    candidates: list[Room] = []
    for room in sorted(rooms, key=lambda r: r.name):
        reason = (excluded or {}).get(room.name, "") or refusal(vm, room)
        if reason:
            against.append(f"{room.name}: {reason}")
        else:
            candidates.append(room)
    if not candidates:
        return Choice(None, tuple(against) or ("there is no node",))

    def order(room: Room) -> tuple[int, int, int, int, str]:
        preferred = vm.preferred_nodes
        rank = preferred.index(room.name) if room.name in preferred else len(preferred)
        return (
            0 if room.name == wanted else 1,
            rank,
            room.vms,
            room.used_memory_bytes - room.memory_bytes,
            room.name,
        )

    best = min(candidates, key=order)
    if best.name == wanted:
        why = "wanted there"
    elif best.name in vm.preferred_nodes:
        why = f"preferred node {vm.preferred_nodes.index(best.name) + 1}"
    else:
        why = f"fewest VMs ({best.vms})"
    return Choice(best.name, (f"{best.name}: {why}", *against))


def with_vm(room: Room, vm: VmConfig) -> Room:
    """The room after ``vm`` has moved in."""
    return attrs.evolve(
        room,
        used_memory_bytes=room.used_memory_bytes + vm.memory_bytes,
        used_vcpus=room.used_vcpus + vm.vcpus,
        vms=room.vms + 1,
    )

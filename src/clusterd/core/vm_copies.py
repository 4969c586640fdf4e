"""Backups and restores of VMs through the cluster: where they run, and what a restored VM is called.

A backup runs at the VM's owner, with the configuration of the store: there its disks are reached, and there
its guest can be asked to hold still. It ends when the VM goes elsewhere: the frozen disks would still be
good, but whoever takes the VM over must not wait for them (the changes stay tracked, the next backup is
right). A VM that runs nowhere is backed up at the node that was asked.
"""

from collections.abc import Mapping, Sequence

import attrs

from clusterd.core.desk import Desk
from clusterd.core.membership import liveness
from clusterd.core.types import FINAL_RUN_STATES, Liveness, VmConfig, check_name
from clusterd.errors import Refused


@attrs.frozen
class BackupPlace:
    """``node`` runs it. ``epoch`` is that of the VM's run, or 0 while it runs nowhere."""

    node: str
    epoch: int
    config: VmConfig


def backup_place(desk: Desk, vm: str) -> BackupPlace:
    """Where a backup of ``vm`` runs. Raises Refused with what to do instead."""
    spec = desk.view.spec(vm)
    if spec is None:
        raise Refused(f"there is no VM {vm!r}: 'clusterctl vm list' shows them")
    if not spec.config.disks:
        raise Refused(f"VM {vm} has no disks: there is nothing to back up")
    assignment, run = desk.view.assignment(vm), desk.view.current_run(vm)
    if assignment is None or (run is not None and run.state in FINAL_RUN_STATES):
        return BackupPlace(desk.name, 0, spec.config)
    owner = assignment.owner
    if desk.is_self_isolated:
        raise Refused(
            f"this node, {desk.name}, is isolated and cannot tell where VM {vm} is: ask another one"
        )
    state = liveness(desk, owner)
    if owner != desk.name and state is not Liveness.UP:
        raise Refused(
            f"VM {vm} belongs to node {owner}, which is {state.value}:"
            " back it up when that is back, or when the VM has been failed over"
        )
    return BackupPlace(owner, assignment.epoch, spec.config)


def has_gone_elsewhere(desk: Desk, vm: str, place: BackupPlace) -> bool:
    """Whether the run that a backup began with is no longer this node's."""
    if not place.epoch:
        return False
    assignment = desk.view.assignment(vm)
    return assignment is not None and (assignment.owner, assignment.epoch) != (place.node, place.epoch)


def restored_names(vm: str, new_name: str | None, images: Mapping[str, str]) -> dict[str, str]:
    """Disk name -> the image it is restored into. ``images``: disk name -> the image it was of.

    Under its own name a VM gets its own images back; under a new one each image is named after the VM, and
    after the disk where there are several. Raises Refused for a name that is too long.
    """
    if new_name is None or new_name == vm:
        return dict(images)
    if len(images) == 1:
        return {disk: check_name(new_name, "image") for disk in images}
    return {disk: check_name(f"{new_name}-{disk}", "image") for disk in images}


def check_restored(config: VmConfig, images: Sequence[str]) -> VmConfig:
    """``config`` if it uses exactly the images that the backup holds. Raises Refused."""
    used = sorted(disk.image for disk in config.disks)
    if used != sorted(images):
        raise Refused(
            f"the backup's configuration of {config.name} uses the images {', '.join(used) or 'none'},"
            f" but its disks are {', '.join(sorted(images))}: restore it with diskctl target restore"
        )
    return config

"""A restore through the cluster: the new images of a VM that cannot be recorded, or may have been."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import trio

from clusterd.core import calls
from clusterd.core.commands import Command
from clusterd.errors import Refused, Unanswered
from clusterd.shell.vm_copies import VmCopies
from daemonkit.diskd_api import RestoredDisk, RestoreReport, RestoreRequest

FILE = """name = "web"
argv = ["true"]

[[disks]]
name = "root"
image = "web-root"
diskd = "main"
"""


class NoVms:
    """The core of a cluster without VMs."""

    def vm_config(self, _vm: str) -> None:
        return None


class NewImages:
    """Diskds that restore whatever is asked for."""

    def __init__(self) -> None:
        self.images: set[str] = set()

    async def restore(
        self, _diskd: str, request: RestoreRequest, _tell: Callable[[Any], None]
    ) -> RestoreReport:
        await trio.lowlevel.checkpoint()
        self.images |= set(request.images.values())
        return RestoreReport(request.vm, request.point, FILE, [RestoredDisk("root", "web-root", 4096)], 4096)

    async def delete_images(self, _diskd: str, images: Sequence[str]) -> None:
        await trio.lowlevel.checkpoint()
        self.images -= set(images)


class NobodyListens:
    """The caller."""

    async def progress(self, _value: Any) -> None:
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    ("error", "left"),
    [
        (Refused("VM web exists already"), set()),
        # The VM may have been recorded all the same: its disks must not vanish under it.
        (Unanswered("no answer within 8 s"), {"web-root"}),
    ],
)
async def test_restored_images_go_only_where_the_vm_was_refused(error: Refused, left: set[str]):
    async def ask(_command: Command) -> calls.Accepted:
        await trio.lowlevel.checkpoint()
        raise error

    diskds = NewImages()
    copies = VmCopies(NoVms(), None, diskds, {}, None, ask)
    with pytest.raises(ExceptionGroup) as raised:
        await copies.restore(calls.RestoreVm("web", "rp-0123456789abcdef", "127.0.0.1:1"), NobodyListens())
    assert diskds.images == left
    (reason,) = raised.value.exceptions
    assert ("web-root" in str(reason)) is bool(left)

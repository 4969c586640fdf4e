"""Brings an image here that another daemon of the same storage has, for a run that was given to this host.

A living daemon is asked at its control: it fences every older run of the image, closes it and lets it go.
Where nobody answers, the image is taken if its owner is known to be dead (core.ownership); else it is not.
"""

from collections.abc import Collection

import structlog

from daemonkit.cli import call_once
from daemonkit.diskd_api import LeaseRequest
from daemonkit.errors import OperatorError
from daemonkit.ports import Address
from diskd.core import calls
from diskd.core.ownership import Lost
from diskd.errors import Refused
from diskd.shell.images import Images
from diskd.shell.owning import NotOurs, Order

log = structlog.get_logger()

# clusterd allows 5 s for all disks of a run; a close flushes, and takes longer than that only in trouble.
ASK_SECONDS_MAX = 3.0


async def bring_here(
    images: Images, name: str, epoch: int, holder: str, dead_boots: Collection[str], key: bytes | None
) -> None:
    """Return when the image is open here. Raises Refused, with what stands in the way."""
    order = Order(dead_boots=frozenset(dead_boots))
    try:
        await images.open(name, order)
        return
    except Lost as error:
        raise Refused(f"image {name}: {error}") from error
    except NotOurs as error:
        if error.control is None:
            raise
        refusal, control = error, error.control
    try:
        address = Address.parse(control)
        request = LeaseRequest(name, epoch, holder)
        await call_once(address, calls.IMAGE_HAND_OVER, request, key=key, seconds_max=ASK_SECONDS_MAX)
    except (OperatorError, ValueError) as error:
        raise Refused(f"{refusal}; asked to hand it over, {control} says: {error}") from error
    log.info("image.brought_here", image=name, former=control, epoch=epoch)
    await images.open(name, order)

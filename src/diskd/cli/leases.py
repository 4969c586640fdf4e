"""`diskctl lease`: who may write to an image. clusterd makes the same calls."""

from typing import Any

import click

from daemonkit.cli import print_json
from daemonkit.diskd_api import (
    LEASE_ACQUIRE,
    LEASE_PREPARE,
    LEASE_RELEASE,
    LEASE_SHOW,
    ImageName,
    Lease,
    LeaseRequest,
)
from daemonkit.methods import Method
from diskd.cli.calling import Diskd, json_option, pass_diskd


@click.group()
def lease() -> None:
    """Who may write to an image: taking a lease with a higher epoch fences every older holder."""


def _print(found: Lease, *, as_json: bool) -> None:
    holder = None if found.released else found.holder
    if as_json:
        document: dict[str, Any] = {"image": found.image, "epoch": found.epoch, "holder": holder}
        print_json(document)
        return
    text = f"{found.image}: epoch {found.epoch}, {f'held by {holder}' if holder else 'held by nobody'}"
    if found.prepared is not None:
        text += f", epoch {found.prepared} may connect and read"
    click.echo(text)


EPOCH_HELP = "The number of the run: higher than every one before it, of any VM."


def _verb(name: str, method: Method[LeaseRequest, Lease], text: str) -> None:
    @lease.command(name, help=text)
    @click.argument("image")
    @click.option("--epoch", required=True, type=click.IntRange(1, 2**63 - 1), help=EPOCH_HELP)
    @click.option("--holder", required=True, help="Who asks, for example n1/web; shown, and compared.")
    @json_option
    @pass_diskd
    def command(diskd: Diskd, image: str, epoch: int, holder: str, as_json: bool) -> None:
        _print(diskd.call(method, LeaseRequest(image, epoch, holder)), as_json=as_json)


_verb(
    "acquire",
    LEASE_ACQUIRE,
    "Take the lease of IMAGE at a higher epoch. Every older holder is fenced when this has answered. "
    "The same epoch and holder again change nothing; any other epoch at or below the current is refused.",
)
_verb(
    "prepare",
    LEASE_PREPARE,
    "Let the next epoch connect to IMAGE and read, before it is acquired (live migration).",
)
_verb("release", LEASE_RELEASE, "Let go of the lease of IMAGE; its epoch stays where it is.")


@lease.command()
@click.argument("image")
@json_option
@pass_diskd
def show(diskd: Diskd, image: str, as_json: bool) -> None:
    """The newest lease of IMAGE."""
    _print(diskd.call(LEASE_SHOW, ImageName(image)), as_json=as_json)

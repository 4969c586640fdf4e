"""`diskctl`: asks a running diskd, one call per command. One module per group of verbs."""

import click

from daemonkit.cli import ADDRESS, LazyGroup, read_key, run_main
from daemonkit.ports import Address
from diskd.cli.calling import CONTROL_DEFAULT, Diskd

VERBS = {
    "apply": "diskd.cli.export:apply",
    "backup": "diskd.cli.backup:backup",
    "changes": "diskd.cli.points:changes",
    "checkpoint": "diskd.cli.checkpoints:checkpoint",
    "export": "diskd.cli.export:export",
    "image": "diskd.cli.images:image",
    "lease": "diskd.cli.leases:lease",
    "point": "diskd.cli.points:point",
    "san": "diskd.cli.san:san",
    "show": "diskd.cli.statistics:show",
    "status": "diskd.cli.statistics:status",
    "target": "diskd.cli.target:target",
}


@click.group(cls=LazyGroup, verbs=VERBS, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--control", type=ADDRESS, envvar="HOLDFAST_DISKD", default=CONTROL_DEFAULT, show_default=True,
              help="Where diskd listens for control calls; HOLDFAST_DISKD stands for it.")  # fmt: skip
@click.option("--key", metavar="FILE", help="Cluster key; HOLDFAST_KEY_FILE stands for it.")
@click.pass_context
def group(context: click.Context, control: Address, key: str | None) -> None:
    """Images, leases, reference points, checkpoints and backups of a diskd.

    \b
    diskctl image create web 10GiB                      an image; `image import` makes one of a disk file
    diskctl lease acquire web --epoch 1 --holder n1/web who may write to it
    diskctl backup --vm web --image web --target HOST:PORT
    diskctl show web                                    what it does, and how it is
    diskctl changes web --since rp-...                  what changed since a reference point
    diskctl checkpoint begin --vm web --image web       freeze it, for backups that pull

    Exit code 0: done; 1: refused or failed, with one line that says what to do; 2: usage.
    """
    context.obj = Diskd(control, read_key(key))


def main() -> None:
    run_main(group)

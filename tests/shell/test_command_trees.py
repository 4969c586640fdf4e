"""Every verb of every command line can be loaded, and says what it does."""

import importlib
from collections.abc import Iterator

import click
import pytest

TREES = ["clusterd.cli.daemon:cli", "clusterd.cli.ctl:cli", "diskd.cli.daemon:group", "diskd.cli.ctl:group"]


def verbs(command: click.Command, path: str, context: click.Context) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        inner = click.Context(command, parent=context)
        for name in command.list_commands(inner):
            verb = command.get_command(inner, name)
            assert verb is not None, f"{path} {name} is listed, but cannot be loaded"
            yield from verbs(verb, f"{path} {name}", inner)


@pytest.mark.parametrize("tree", TREES)
def test_every_verb_loads_and_explains_itself(tree: str) -> None:
    module, _, name = tree.partition(":")
    root = getattr(importlib.import_module(module), name)
    found = dict(verbs(root, tree.split(".")[0], click.Context(root)))
    assert len(found) > 2
    for path, command in found.items():
        assert command.help or command.short_help, f"{path} has no help"

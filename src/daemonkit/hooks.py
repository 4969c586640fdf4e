"""The ``[hooks]`` of a VM file: what quiesces the guest around a cut (DESIGN.md sections 7 and 9).

    [hooks]
    freeze = ["guest-freeze", "web"]      a list of words, or one string that is split like a shell does
    thaw = "guest-thaw web"

The first word names a program in diskd's ``hooks_dir``: there, and nowhere else, since diskd runs it as
itself. No shell sees any of it.
"""

import shlex
from typing import Any, Final, Literal, TypeAlias

import attrs

from daemonkit.errors import OperatorError
from daemonkit.toml_text import NotToml, parse_toml

HookName: TypeAlias = Literal["freeze", "thaw"]
WORDS_MAX: Final = 64
WORD_BYTES_MAX: Final = 4096
_NAMES: Final = ("freeze", "thaw")


class BadHooks(OperatorError):
    """The table makes no sense. The message is one line."""


@attrs.frozen
class Hooks:
    """Words of each hook, the program first."""

    freeze: tuple[str, ...]
    thaw: tuple[str, ...]

    def words(self, name: HookName) -> tuple[str, ...]:
        """Those of one hook."""
        return self.freeze if name == "freeze" else self.thaw


def check_hooks(table: Any) -> Hooks:
    """The table as TOML gives it. Raises BadHooks."""
    if not isinstance(table, dict):
        raise BadHooks("[hooks] is a table with freeze and thaw")
    for key in table:
        if key not in _NAMES:
            raise BadHooks(f"[hooks]: unknown key {str(key)[:80]!r}; known: freeze, thaw")
    for name in _NAMES:
        if name not in table:
            raise BadHooks(f"[hooks]: {name} is missing: what one does the other must undo")
    return Hooks(_words("freeze", table["freeze"]), _words("thaw", table["thaw"]))


def _words(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        try:
            value = shlex.split(value)
        except ValueError as error:
            raise BadHooks(f"[hooks] {name}: {error}") from error
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise BadHooks(f"[hooks] {name} is a list of words, or one string")
    if not 0 < len(value) <= WORDS_MAX or not value[0]:
        raise BadHooks(f"[hooks] {name} has 1 to {WORDS_MAX} words, a program first")
    if any(len(word.encode(errors="replace")) > WORD_BYTES_MAX or "\0" in word for word in value):
        raise BadHooks(f"[hooks] {name}: a word has at most {WORD_BYTES_MAX} bytes, and no zero byte")
    return tuple(value)


def hooks_of(config: str) -> Hooks | None:
    """Of a VM file's text. A text that is no TOML is not one of ours, and has none. Raises BadHooks."""
    try:
        table = parse_toml(config).get("hooks")
    except NotToml:
        return None
    return None if table is None else check_hooks(table)

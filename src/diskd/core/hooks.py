"""Which program a hook may be, and what a backup is called afterwards (shell/hooks.py runs them).

The words of a hook come over control, from whoever may ask for a backup; diskd mostly runs as root. So the
program is one that the host's administrator has put into ``hooks_dir``, and nothing else can be run; its
further words are data, and the program must treat them so (ADR 0041).
"""

import re
import stat
from typing import Final, Literal, TypeAlias

import attrs

from diskd.errors import Refused

# The guest was frozen at the cut; or it was not, and its journal makes it whole.
APPLICATION: Final = "application"
CRASH: Final = "crash"
Consistency: TypeAlias = Literal["application", "crash"]

_PROGRAM: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", re.ASCII)


@attrs.frozen
class FileFacts:
    """Of a program, or of the directory that it lies in."""

    mode: int
    owner: int


def program_path(hooks_dir: str | None, program: str) -> str:
    """Where the program lies: named alone, or with exactly that directory. Raises Refused."""
    if hooks_dir is None:
        raise Refused("diskd runs no hooks: set hooks_dir to the directory of those that it may run")
    name = program.removeprefix(hooks_dir.rstrip("/") + "/")
    if _PROGRAM.fullmatch(name) is None:
        raise Refused(f"{program[:80]!r} is not a program in hooks_dir ({hooks_dir})")
    return f"{hooks_dir.rstrip('/')}/{name}"


def check_program(path: str, program: FileFacts, directory: FileFacts, me: int) -> None:
    """Nobody else may have written it. Raises Refused."""
    if not stat.S_ISREG(program.mode) or not program.mode & 0o111:
        raise Refused(f"{path} is not an executable file")
    for what, facts in ((path, program), (path.rpartition("/")[0], directory)):
        if facts.owner not in (0, me) or facts.mode & 0o022:
            raise Refused(f"{what} can be written by others than root: no hook is run from there")

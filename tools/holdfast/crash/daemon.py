"""`diskd` with a power supply that can fail: `python -m holdfast.crash.daemon PLACE ROOT -- run ...`

The same daemon, in which every change of a file under ROOT leaves a note in PLACE first (syscalls.py).
After a kill -9, power.py takes back what was not synced.
"""

import sys
from pathlib import Path
from typing import Any

from holdfast.crash.journal import Place
from holdfast.crash.syscalls import SystemCalls


def main() -> None:
    place, root, dashes, *arguments = sys.argv[1:]
    if dashes != "--":
        raise SystemExit("usage: python -m holdfast.crash.daemon PLACE ROOT -- ARGUMENTS OF diskd")
    calls = SystemCalls(Path(root), Place(Path(place)))
    calls.install()
    # Only now: modules of diskd bind some of what was replaced when they are imported.
    from diskd.cli.daemon import main as diskd
    from diskd.shell import files

    # os has no fallocate(2): diskd calls it through ctypes, here.
    library: Any = files._libc
    library.fallocate = calls.fallocate(library.fallocate)
    sys.argv = ["diskd", *arguments]
    diskd()


if __name__ == "__main__":
    main()

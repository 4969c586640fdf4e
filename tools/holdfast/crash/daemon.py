"""`diskd` with a power supply that can fail: `python -m holdfast.crash.daemon PLACE NEAR ROOT -- run ...`

The same daemon (`run` or `target`), in which every change of a file under ROOT leaves a note in PLACE first
(syscalls.py); NEAR is a directory on ROOT's file system. After a kill -9, power.py takes back what was not
synced.
"""

import sys
from pathlib import Path
from typing import Any

from holdfast.crash.journal import Place
from holdfast.crash.syscalls import SystemCalls


def main() -> None:
    place, near, root, dashes, *arguments = sys.argv[1:]
    if dashes != "--":
        raise SystemExit("usage: python -m holdfast.crash.daemon PLACE NEAR ROOT -- ARGUMENTS OF diskd")
    calls = SystemCalls(Path(root), Place(Path(place), Path(near)))
    calls.install()
    # Only now: modules of diskd bind some of what was replaced when they are imported.
    from diskd.cli.daemon import main as diskd
    from diskd.shell import files, repository_files

    # os has no fallocate(2) and no renameat2(2): diskd calls them through ctypes, here.
    library: Any = files._libc
    library.fallocate = calls.fallocate(library.fallocate)
    library = repository_files._libc
    library.renameat2 = calls.exchange(library.renameat2)
    sys.argv = ["diskd", *arguments]
    diskd()


if __name__ == "__main__":
    main()

"""`python -m holdfast.bench.untracked FILE (PORT | SOCKET)`: diskd's NBD server over a bare raw file.

The benchmark's control: the same server, session and raw layer as diskd's, without tracking, lease and hold.
"""

import sys
from functools import partial
from pathlib import Path

import trio

from daemonkit.ports import Address
from diskd.shell.nbd_server import NbdServer
from diskd.shell.raw_file import OpenFile, RawFile, RawFileCatalog


def main() -> None:
    file, where = sys.argv[1:]
    opened = OpenFile(Path(file))
    try:
        server = NbdServer(RawFileCatalog(RawFile(opened)))
        if where.isdigit():
            trio.run(partial(server.serve_tcp, Address("127.0.0.1", int(where))))
        else:
            trio.run(partial(server.serve_unix, where))
    finally:
        opened.close()


if __name__ == "__main__":
    main()

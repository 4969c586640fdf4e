"""Any of the daemons as a process in a test without trio: started, its ready line read, ended cleanly."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BINARIES = Path(sys.executable).parent
SECONDS_MAX = 30
FREE = "127.0.0.1:0"
NODE = """\
name = "n1"
cluster = "lab"
key_files = ["{key}"]
control = "127.0.0.1:0"
store = ["{store}"]
memory = "4GiB"
vcpus = 4
data_dir = "{data}"
[[networks]]
name = "a"
listen = "127.0.0.1:0"
"""


def node_toml(store: str = "http://127.0.0.1:1", *, key: object = "key", data: object = "data") -> str:
    """A node's configuration; relative paths are relative to where it is written."""
    return NODE.format(store=store, key=key, data=data)


@contextlib.contextmanager
def daemon(log: Path, *argv: object, unheard: tuple[str, ...] = ("Traceback",)) -> Iterator[dict[str, Any]]:
    """Its ready line. It must live until it is told to end, and end cleanly, ``unheard`` not in its log."""
    with log.open("wb") as err:
        process = subprocess.Popen(
            [BINARIES / str(argv[0]), *map(str, argv[1:])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=err,
        )
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())
        assert process.poll() is None, log.read_text()
        process.terminate()
        assert process.wait(SECONDS_MAX) == 0
        assert not [word for word in unheard if word in log.read_text()]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()

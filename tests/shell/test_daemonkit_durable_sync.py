"""A small file whose directory cannot be synced after the rename: unknown, never said to be unchanged."""

import shutil
import subprocess
import sys

import pytest

PROGRAM = """
import sys, errno
from pathlib import Path
from daemonkit.durable import replace_file
try:
    replace_file(Path(sys.argv[1]), b"new")
except OSError as error:
    print(errno.errorcode[error.errno], error.filename)
"""


@pytest.mark.parametrize(("which", "said", "content"), [(1, "ENOSPC", "old"), (2, "EIO", "new")])
def test_a_failed_sync_says_what_is_known(tmp_path, which, said, content):
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace, which fails the sync, is not installed")
    path = tmp_path / "file"
    path.write_text("old")
    inject = ["-e", "trace=fsync", "-e", f"inject=fsync:error=ENOSPC:when={which}"]
    argv = [
        strace,
        "-f",
        "-qq",
        "-o",
        str(tmp_path / "log"),
        *inject,
        sys.executable,
        "-c",
        PROGRAM,
        str(path),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    if "ptrace" in done.stderr or "not permitted" in done.stderr:
        pytest.skip(f"strace cannot trace here: {done.stderr.strip()[-100:]}")
    assert done.stdout.split() == [said, str(path)], done.stderr
    assert path.read_text() == content
    assert sorted(found.name for found in tmp_path.iterdir()) == ["file", "log"]

"""Third-party programs in tests: found or skipped aloud, run with a deadline, their output kept."""

import shutil
from typing import NamedTuple

import pytest
import trio

SECONDS_MAX = 60

PACKAGES = {
    "nbdinfo": "libnbd-bin",
    "nbdcopy": "libnbd-bin",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "nbdkit": "nbdkit",
    "fio": "fio",
}


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


def need(program: str) -> str:
    """The program's path; skips the test, saying what to install, where it is missing."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed (Debian package {PACKAGES.get(program, program)})")
    return path


async def run(*argv: str, stdin: bytes = b"") -> Outcome:
    """Run to the end; the code is for the test to judge."""
    with trio.fail_after(SECONDS_MAX):
        done = await trio.run_process(
            [need(argv[0]), *argv[1:]], stdin=stdin, capture_stdout=True, capture_stderr=True, check=False
        )
    return Outcome(
        done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    )


async def good(*argv: str) -> Outcome:
    """Run to the end; anything but success fails the test with what the program said."""
    outcome = await run(*argv)
    assert outcome.code == 0, f"{' '.join(argv)}: exit {outcome.code}: {outcome.text}"
    return outcome

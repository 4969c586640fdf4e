"""Does this run still live? A locked file answers, so that nobody has to guess from pids (S7).

Each run inherits a descriptor of ``runs/VM.EPOCH.lock`` with an exclusive flock on it. The lock belongs to
the open file, not to a process: it lasts exactly as long as the run, or anything that the run started and
that kept the descriptor, lives, and it survives clusterd's death. Whoever can take the lock knows that
nothing of the run is left. The pid is only needed to send signals; it is noted beside the lock together
with the process's start time, and where the note is missing (clusterd died between spawn and note) the
process is found by the lock file that it holds open.

All functions here block briefly; they are called in a thread.
"""

import contextlib
import fcntl
import json
import os
from pathlib import Path

import attrs

from daemonkit.durable import read_small_file, remove_file, replace_file


@attrs.frozen
class RunFiles:
    """The files of one run under ``directory``."""

    directory: Path
    vm: str
    epoch: int

    @property
    def lock(self) -> Path:
        return self.directory / f"{self.vm}.{self.epoch}.lock"

    @property
    def note(self) -> Path:
        return self.directory / f"{self.vm}.{self.epoch}.json"

    def take(self) -> int | None:
        """A descriptor that holds the run's lock, or None: the run lives. Raises OSError."""
        descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def lives(self) -> bool:
        """Is anything of the run left?"""
        if not self.lock.exists():
            return False
        descriptor = self.take()
        if descriptor is None:
            return True
        os.close(descriptor)
        return False

    def write_note(self, pid: int) -> None:
        replace_file(self.note, json.dumps({"pid": pid, "start_time": start_time(pid)}).encode())

    def read_note(self) -> int | None:
        """The noted pid, if that process, and not a later one of the same number, is still there."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads(read_small_file(self.note))
            pid = note["pid"]
            if isinstance(pid, int) and pid > 1 and start_time(pid) == note["start_time"]:
                return pid
        return None

    def holders(self) -> list[int]:
        """The processes that hold the lock file open, a session's leader first."""
        try:
            wanted = os.stat(self.lock)
        except OSError:
            return []
        found = [
            pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if _has_open(pid, wanted)
        ]
        return sorted(found, key=lambda pid: (not _leads_session(pid), pid))

    def find(self) -> int | None:
        """The run's main process, or None where none is found."""
        noted = self.read_note()
        return noted if noted is not None else next(iter(self.holders()), None)

    def remove(self) -> None:
        """Forget a run of which nothing is left."""
        remove_file(self.note)
        remove_file(self.lock)


def start_time(pid: int) -> str | None:
    """When the process started, in ticks since boot: with the pid, its identity. None: not there."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The second field, the command in parentheses, may itself hold spaces and parentheses.
    return stat.rpartition(")")[2].split()[19]


def _has_open(pid: int, wanted: os.stat_result) -> bool:
    if pid == os.getpid():
        return False
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                seen = os.stat(f"/proc/{pid}/fd/{name}")
                if (seen.st_dev, seen.st_ino) == (wanted.st_dev, wanted.st_ino):
                    return True
    return False


def _leads_session(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return os.getsid(pid) == pid
    return False

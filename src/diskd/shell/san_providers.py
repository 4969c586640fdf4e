"""What takes snapshots of the volume that holds the images: commands, btrfs, reflink copies (core/san.py).

Everything here is told by ROOT/san.toml, which must be the daemon's own: nobody else may write it, since the
daemon may be root. Commands run without a shell, with a time limit, and nothing of a request among their
arguments but the snapshot's name, which is made here.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import trio

from daemonkit.durable import read_small_file, sync_directory
from daemonkit.units import SECOND
from diskd.core.san import (
    CONFIG_BYTES_MAX,
    CONFIG_FILE,
    Provider,
    create_argv,
    delete_argv,
    parse_providers,
    raw_path,
    seen_at,
)
from diskd.errors import Refused

# linux/fs.h: _IOW(0x94, 9, int).
_FICLONE: Final = 0x40049409
_SAID_MAX: Final = 300
# Of each of stdout and stderr; a path has at most 4,096 bytes, so what is longer is refused as no path.
_HEARD_BYTES_MAX: Final = 64 << 10
_KILL_SECONDS: Final = 5.0


def read_providers(root: Path) -> dict[str, Provider]:
    """san.toml of this daemon; none where there is no such file. Raises Refused."""
    path = root / CONFIG_FILE
    try:
        found = path.stat()
        if found.st_uid not in (0, os.geteuid()) or stat.S_IMODE(found.st_mode) & 0o022:
            raise Refused(f"{path}: others than diskd's user may write it, and it names commands; chmod 600")
        return parse_providers(read_small_file(path, size_bytes_max=CONFIG_BYTES_MAX).decode())
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path}: {error}") from error


class Snapshots:
    """Makes and deletes the snapshots of one provider. ``root``: the daemon's, absolute."""

    def __init__(self, name: str, provider: Provider, root: Path) -> None:
        self._name = name
        self._provider = provider
        self._root = root

    async def create(self, snapshot: str, images: Sequence[str]) -> str:
        """The path at which the root is seen in it. Raises Refused; then ``delete`` what may be there."""
        said = ""
        if self._provider.kind == "reflink":
            await trio.to_thread.run_sync(self._clone, self._directory() / snapshot, images)
        else:
            said = await self._run(create_argv(self._provider, snapshot, str(self._root)), "create")
        return seen_at(self._provider, snapshot, str(self._root), said)

    async def delete(self, snapshot: str) -> None:
        """It is not there any more. Raises Refused."""
        if self._provider.kind == "reflink":
            await trio.to_thread.run_sync(self._remove, self._directory() / snapshot)
            return
        if self._provider.kind == "btrfs" and not (self._directory() / snapshot).exists():
            return
        await self._run(delete_argv(self._provider, snapshot, str(self._root)), "delete")

    def _directory(self) -> Path:
        assert self._provider.directory is not None
        return Path(self._provider.directory)

    def _clone(self, where: Path, images: Sequence[str]) -> None:
        try:
            where.mkdir()
            for image in images:
                new = where / raw_path(image)
                new.parent.mkdir(parents=True)
                _clone_file(self._root / raw_path(image), new)
                sync_directory(new.parent)
            for path in (where / "images", where, where.parent):
                sync_directory(path)
        except OSError as error:
            raise self._failed(f"{error.filename or where}: {_reason(error)}", "create") from error

    def _remove(self, where: Path) -> None:
        try:
            shutil.rmtree(where)
            sync_directory(where.parent)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._failed(f"{error.filename or where}: {error.strerror}", "delete") from error

    async def _run(self, argv: list[str], verb: str) -> str:
        """What it said on stdout. It is not left running, nor what it started: a copy that went on after its
        time would make a snapshot that nobody deletes."""
        seconds = self._provider.timeout_ns / SECOND
        try:
            process = await trio.lowlevel.open_process(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise self._failed(f"{argv[0]}: {error.strerror}", verb) from error
        answer, complaint, ended = bytearray(), bytearray(), False
        try:
            with trio.move_on_after(seconds):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_listen, process.stdout, answer)
                    nursery.start_soon(_listen, process.stderr, complaint)
                    await process.wait()
                ended = True
        finally:
            with trio.move_on_after(_KILL_SECONDS, shield=True):
                await _close(process, kill=not ended)
        if not ended:
            raise self._failed(f"{argv[0]} took longer than {seconds:g} s and was killed", verb)
        if process.returncode != 0:
            said = " ".join((complaint or answer).decode(errors="replace").split())[:_SAID_MAX]
            raise self._failed(f"{argv[0]} ended with {process.returncode}: {said or 'no word'}", verb)
        return answer.decode(errors="replace")

    def _failed(self, reason: str, verb: str) -> Refused:
        return Refused(f"SAN provider {self._name} failed to {verb} the snapshot: {reason}")


async def _listen(stream: trio.abc.ReceiveStream | None, said: bytearray) -> None:
    """Keep the beginning, and let it say the rest."""
    assert stream is not None
    async for part in stream:
        said += part[: max(0, _HEARD_BYTES_MAX - len(said))]


async def _close(process: trio.Process, *, kill: bool) -> None:
    """Let go of a command, having killed its whole group where it has not ended."""
    if kill:
        # A command that became another user may not be killed: then its time limit is its own affair.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            await stream.aclose()


def _clone_file(source: Path, new: Path) -> None:
    """A reflink copy, durable. Raises OSError."""
    with source.open("rb") as old, new.open("xb") as file:
        fcntl.ioctl(file.fileno(), _FICLONE, old.fileno())
        os.fsync(file.fileno())


def _reason(error: OSError) -> str:
    if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS):
        return "this file system cannot share extents (reflink): use btrfs, xfs or another kind of provider"
    if error.errno == errno.EXDEV:
        return "the provider's directory is on another file system than the images"
    return error.strerror or str(error)

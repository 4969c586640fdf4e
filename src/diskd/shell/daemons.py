"""The daemons of one root, under ROOT/daemons: each has its name to itself, and tells where it answers.

ROOT/daemons/NAME.lock   held while a daemon of that name runs
ROOT/daemons/NAME        one sealed line: its instance, and the address of its control
"""

import contextlib
import re
import secrets
import socket
from pathlib import Path
from typing import Final

from daemonkit import durable
from daemonkit.errors import HoldfastError
from diskd.core.inventory import LibrarySettings, check_name
from diskd.core.ownership import TEXT_CHARS_MAX, Daemon
from diskd.core.sealed_line import seal, unseal
from diskd.errors import Refused

_VERSION: Final = 1
_MACHINE_ID: Final = Path("/etc/machine-id")


def identify(settings: LibrarySettings, boot_id_file: Path) -> Daemon:
    """This run of this daemon. Raises Refused."""
    try:
        boot_id = boot_id_file.read_text().strip()
    except (OSError, ValueError) as error:
        raise Refused(f"{boot_id_file}: not a boot id: {error}") from error
    host = settings.host_name or socket.gethostname()
    name = settings.daemon_name or re.sub(r"[^a-z0-9._-]", "-", host.lower()).lstrip("._-")[:63]
    return Daemon(
        check_name("a diskd", name),
        host[:TEXT_CHARS_MAX],
        _machine_id(settings.machine_id_file, host),
        boot_id,
        secrets.token_hex(8),
    )


def _machine_id(path: str | None, host: str) -> str:
    """A container often has none: then its host name stands for it."""
    try:
        found = Path(path or _MACHINE_ID).read_text().strip()
    except FileNotFoundError as error:
        if path is not None:
            raise Refused(f"machine_id_file {path}: no such file") from error
        found = ""
    except (OSError, ValueError) as error:
        raise Refused(f"{path or _MACHINE_ID}: not a machine id: {error}") from error
    found = found or f"host-{host}"
    if len(found) > TEXT_CHARS_MAX or not found.isprintable():
        raise Refused(f"{path or _MACHINE_ID}: not a machine id")
    return found


def lock(directory: Path, me: Daemon) -> int:
    """A descriptor that keeps the name until it is closed. Raises Refused where it is taken."""
    try:
        return durable.lock_file(directory / f"{me.name}.lock")
    except durable.LockHeldError as error:
        raise Refused(
            f"a diskd named {me.name} serves this root already ({error}): stop it, or give this one another"
            " --name"
        ) from error


def announce(directory: Path, me: Daemon, control: str) -> None:
    """Tell other daemons where this one answers. Raises OSError."""
    durable.replace_file(directory / me.name, seal(_VERSION, {"instance": me.instance, "control": control}))


def withdraw(directory: Path, me: Daemon) -> None:
    """It answers no more."""
    with contextlib.suppress(OSError):
        (directory / me.name).unlink(missing_ok=True)


def control_of(directory: Path, daemon: Daemon) -> str | None:
    """Where that very run of a daemon answers, or answered when it was last heard of."""
    try:
        fields = unseal(_VERSION, durable.read_small_file(directory / daemon.name))
        if fields["instance"] == daemon.instance and isinstance(fields["control"], str):
            return str(fields["control"])
    except (OSError, HoldfastError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return None

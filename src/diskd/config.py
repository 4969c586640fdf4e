"""diskd's settings: their meaning, their defaults with the reason, and how they are read.

From TOML (``--config FILE``), then ``--set KEY=VALUE``; durations and sizes carry units. An unknown key
is an error that names the nearest one. ``--show-config`` prints what is in force, as JSON.
"""

import difflib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import attrs

from daemonkit.durable import read_small_file
from daemonkit.errors import OperatorError
from daemonkit.units import (
    DAY,
    HOUR,
    MILLISECOND,
    MINUTE,
    SECOND,
    GiB,
    KiB,
    MiB,
    TiB,
    UnitError,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
    to_seconds,
)
from diskd.core.inventory import LOW_DISK_LIMIT, LibrarySettings
from diskd.core.space import Reserve, parse_reserve

NONE: Final = "none"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)


@attrs.frozen
class _Rule:
    """How a setting is written and between which values it makes sense."""

    kind: Literal["duration", "size", "count", "path", "name", "space"]
    minimum: int = 0
    maximum: int = 0
    may_be_none: bool = False


def _setting(default: Any, rule: _Rule) -> Any:
    return attrs.field(default=default, metadata={"rule": rule})


@attrs.frozen
class Settings:
    """Durations in nanoseconds, sizes in bytes. Every field is a key of the file."""

    # How often fine marks become durable. Shorter costs writes; longer lets a power loss over-report more.
    tracking_flush_interval: int = _setting(5 * SECOND, _Rule("duration", 100 * MILLISECOND, HOUR))
    # How long a sealed checkpoint waits after a restart for its export to go on: an operator's coffee break.
    checkpoint_resume_timeout: int = _setting(10 * MINUTE, _Rule("duration", 0, DAY))
    # The most that a power loss under load can over-report, per image. At it, a first touch waits.
    max_open_bytes: int = _setting(4 * GiB, _Rule("size", 64 * MiB, 1024 * TiB))
    # What an AVHD may take per disk before the backup is given up; none: as much as the file system has.
    avhd_limit: int | None = _setting(None, _Rule("size", MiB, 1024 * TiB, may_be_none=True))
    # Below it no checkpoint begins, and a running one is given up: a full file system would hurt every guest.
    low_disk_limit: Reserve | None = _setting(  # noqa: RUF009 - a Reserve is frozen
        LOW_DISK_LIMIT, _Rule("space", may_be_none=True)
    )
    # One step of a merge, at most: with the guest at work its steps are of some milliseconds.
    merge_batch: int = _setting(4 * MiB, _Rule("size", 64 * KiB, GiB))
    # The most that a merge moves in a second, per image. It makes way for the guest in any case.
    merge_rate: int | None = _setting(None, _Rule("size", MiB, 1024 * GiB, may_be_none=True))
    # Where the shared bitmaps live; it must be a tmpfs. none: a directory of our own there.
    shared_dir: str | None = _setting(None, _Rule("path", may_be_none=True))
    # What lies in shared_dir is believed only under the boot that this file names. none: the kernel's file.
    boot_id_file: str | None = _setting(None, _Rule("path", may_be_none=True))
    # What this daemon is called among those that serve the same root. none: as its host is.
    daemon_name: str | None = _setting(None, _Rule("name", may_be_none=True))
    # What an operator calls this host where he says that it is fenced. none: the system's name.
    host_name: str | None = _setting(None, _Rule("name", may_be_none=True))
    # Together with the boot id it tells this host from others over shared storage. none: /etc/machine-id.
    machine_id_file: str | None = _setting(None, _Rule("path", may_be_none=True))
    # The only programs that [hooks] of a VM file may name, run as diskd itself. none: no hook is run.
    hooks_dir: str | None = _setting(None, _Rule("path", may_be_none=True))
    # A freeze or thaw hook that takes longer is killed. QEMU's guest agent and VSS give up after as long.
    hook_timeout: int = _setting(10 * SECOND, _Rule("duration", 100 * MILLISECOND, 10 * MINUTE))
    # NBD clients at a time. Each takes 0.5 MiB, when busy 2 MiB more; together 512 MiB for large requests.
    nbd_connections: int = _setting(512, _Rule("count", 1, 65536))

    def library(self) -> LibrarySettings:
        """What the image library needs of them."""
        return LibrarySettings(
            tracking_flush_interval_ns=self.tracking_flush_interval,
            checkpoint_resume_timeout_ns=self.checkpoint_resume_timeout,
            max_open_bytes=self.max_open_bytes,
            avhd_limit_bytes=self.avhd_limit,
            merge_batch_bytes=self.merge_batch,
            merge_rate=self.merge_rate,
            low_disk_limit=self.low_disk_limit,
            hooks_dir=self.hooks_dir,
            hook_timeout_ns=self.hook_timeout,
            shared_dir=self.shared_dir,
            boot_id_file=self.boot_id_file,
            daemon_name=self.daemon_name,
            host_name=self.host_name,
            machine_id_file=self.machine_id_file,
        )


_FIELDS: Final = {field.name: field for field in attrs.fields(Settings)}


def _value(key: str, raw: Any) -> Any:
    """A setting's value from TOML or from the command line. Raises OperatorError."""
    if key not in _FIELDS:
        near = difflib.get_close_matches(key, _FIELDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_FIELDS)}"
        raise OperatorError(f"unknown setting {key!r}: {hint}")
    rule: _Rule = _FIELDS[key].metadata["rule"]
    if rule.may_be_none and raw == NONE:
        return None
    if rule.kind == "path":
        if not isinstance(raw, str) or not raw.startswith("/"):
            raise OperatorError(f"setting {key}: {raw!r} is no absolute path")
        return raw
    if rule.kind == "space":
        return _reserve(key, raw)
    if rule.kind == "name":
        if not isinstance(raw, str) or _NAME.fullmatch(raw) is None:
            raise OperatorError(
                f"setting {key}: {raw!r} is no name: use up to 63 of a-z, A-Z, 0-9, '.', '_', '-'"
            )
        return raw
    value = _quantity(key, rule, raw)
    if not rule.minimum <= value <= rule.maximum:
        low, high = _text(rule, rule.minimum), _text(rule, rule.maximum)
        raise OperatorError(f"setting {key}: {_text(rule, value)} is not between {low} and {high}")
    return value


def _reserve(key: str, raw: Any) -> Reserve:
    try:
        return Reserve(size_bytes=raw) if type(raw) is int and raw >= 0 else parse_reserve(str(raw))
    except UnitError as error:
        raise OperatorError(f"setting {key}: {error}") from error


def _text(rule: _Rule, value: int) -> str:
    if rule.kind == "duration":
        return format_duration(value)
    return format_size(value) if rule.kind == "size" else str(value)


def _quantity(key: str, rule: _Rule, raw: Any) -> int:
    if rule.kind != "duration" and type(raw) is int:
        return raw
    if not isinstance(raw, str):
        raise OperatorError(f"setting {key}: {raw!r} is no {rule.kind}; write it with its unit, in quotes")
    try:
        if rule.kind == "duration":
            return parse_duration(raw)
        if rule.kind == "size":
            return parse_size(raw)
        return int(raw)
    except (UnitError, ValueError) as error:
        reason = error if isinstance(error, UnitError) else f"{raw!r} is no number"
        raise OperatorError(f"setting {key}: {reason}") from error


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_small_file(path).decode())
    except OSError as error:
        raise OperatorError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OperatorError(f"{path}: not TOML: {error}") from error


def load_settings(path: Path | None, overrides: Sequence[str] = ()) -> Settings:
    """The settings in force: defaults, then the file, then ``KEY=VALUE`` each. Raises OperatorError."""
    values: dict[str, Any] = {}
    if path is not None:
        for key, raw in _read_file(path).items():
            try:
                values[key] = _value(key, raw)
            except OperatorError as error:
                raise OperatorError(f"{path}: {error}") from error
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals:
            raise OperatorError(f"--set {text}: write --set KEY=VALUE")
        values[key.strip()] = _value(key.strip(), raw.strip())
    return Settings(**values)


def show_settings(settings: Settings) -> dict[str, Any]:
    """For ``--show-config``: as in all JSON, durations are seconds and sizes bytes."""
    shown: dict[str, Any] = {}
    for name, field in _FIELDS.items():
        value = getattr(settings, name)
        is_duration = field.metadata["rule"].kind == "duration"
        if isinstance(value, Reserve):
            value = value.percent / 100 if value.percent else value.size_bytes
        shown[name] = to_seconds(value) if is_duration else value
    return shown

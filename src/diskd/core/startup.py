"""Is this host fit to serve a root? Judged once, before anything is opened: what cannot work is refused with
its name, what will hurt later is told.

Only the judgement is here; shell/startup.py gathers the facts. A missing fact (None) is never held against a
host.
"""

from collections.abc import Sequence
from typing import Final

import attrs

from daemonkit.units import SECOND, format_size
from diskd.errors import Refused

# An image takes about eight descriptors, a connection two.
FILES_MIN: Final = 4096
# Clocks of two hosts that share storage differ by less than this.
CLOCK_SLACK_NS: Final = 60 * SECOND
_GOOD: Final = "ext4 and XFS are good"
# Where live bitmaps lie on a disk, every mark costs what a disk costs; nothing breaks.
_IN_MEMORY: Final = ("tmpfs", "ramfs")


@attrs.frozen
class Facts:
    """``write_error``: why nothing can be made under the root, or None. ``bitmap_bytes``: what live bitmaps
    of all images under the root take, half of what they take during a backup."""

    root: str
    file_system: str | None
    write_error: str | None
    makes_holes: bool | None
    punches_holes: bool | None
    shared_dir: str
    shared_file_system: str | None
    shared_bytes: int
    bitmap_bytes: int
    newest_ns: int | None
    now_ns: int
    files_max: int


@attrs.frozen
class Warned:
    """``check`` is a stable name, ``text`` says what is wrong, what comes of it and what to do."""

    check: str
    text: str


def judge(facts: Facts) -> list[Warned]:
    """What to tell the operator. Raises Refused for what cannot be served."""
    kind = facts.file_system or "this file system"
    if facts.write_error is not None:
        raise Refused(
            f"{facts.root} cannot be written: {facts.write_error}; it must belong to the user that diskd runs"
            " as, on a file system mounted read-write"
        )
    if facts.makes_holes is False:
        raise Refused(
            f"{facts.root} is on {kind}, which has no sparse files: every image would take its whole size at"
            f" once; use another file system ({_GOOD})"
        )
    return [*_storage(facts, kind), *_memory(facts), *_host(facts)]


def _storage(facts: Facts, kind: str) -> list[Warned]:
    if facts.punches_holes is not False:
        return []
    text = f"{facts.root} is on {kind}, which cannot punch holes: what guests trim keeps its space ({_GOOD})"
    return [Warned("punch", text)]


def _memory(facts: Facts) -> list[Warned]:
    found = []
    where, has = facts.shared_dir, format_size(facts.shared_bytes)
    if facts.shared_file_system is not None and facts.shared_file_system not in _IN_MEMORY:
        text = f"{where} is on {facts.shared_file_system}, not on a tmpfs: first writes wait for that disk"
        found.append(Warned("shared_dir", f"{text}; set shared_dir to a tmpfs"))
    needed = format_size(facts.bitmap_bytes)
    remedy = "enlarge it (docker: --shm-size; mount -o remount,size=…), or set shared_dir"
    if facts.bitmap_bytes > facts.shared_bytes:
        text = f"{where} has {has}, the images' live bitmaps take {needed}: some will not open; {remedy}"
        found.append(Warned("shared_memory", text))
    elif 2 * facts.bitmap_bytes > facts.shared_bytes:
        text = f"{where} has {has}, the images' live bitmaps take {needed}, twice that during a backup of all"
        found.append(Warned("shared_memory", f"{text}: it may be refused; {remedy}"))
    return found


def _host(facts: Facts) -> list[Warned]:
    found = []
    if facts.newest_ns is not None and facts.newest_ns > facts.now_ns + CLOCK_SLACK_NS:
        ahead = (facts.newest_ns - facts.now_ns) // SECOND
        text = f"the clock is {ahead} s before the newest file under {facts.root}: set it (NTP)"
        found.append(Warned("clock", f"{text}, or changes of the images from outside may go unnoticed"))
    if facts.files_max < FILES_MIN:
        text = f"only {facts.files_max} files may be open: enough for about {facts.files_max // 10} images"
        found.append(Warned("open_files", f"{text}; raise the hard limit (ulimit -n, LimitNOFILE=)"))
    return found


def file_system_of(mountinfo: str, path: str) -> str | None:
    """The type of the file system that an absolute, resolved path is on, by /proc/self/mountinfo's text."""
    best, kind = "", None
    for line in mountinfo.splitlines():
        fields, dash, rest = line.partition(" - ")
        columns, described = fields.split(" "), rest.split(" ")
        if not dash or len(columns) < 5:
            continue
        place = _unescaped(columns[4])
        inside = path == place or path.startswith(place.rstrip("/") + "/")
        # Of two mounts on one place the later one covers the earlier.
        if inside and len(place) >= len(best):
            best, kind = place, described[0]
    return kind


def _unescaped(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def newest(times_ns: Sequence[int]) -> int | None:
    """The latest of the files' times, or None where there is no file."""
    return max(times_ns, default=None)

"""diskd's numbers in Prometheus' text format (version 0.0.4): pure text, made anew for each scrape."""

from collections.abc import Callable, Iterable
from typing import Final

from daemonkit.units import SECOND
from diskd.core.calls import DaemonStatus
from diskd.core.statistics import ImageStats, IoCounts

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_STATES: Final = ("open", "released", "elsewhere", "damaged")

Sample = tuple[dict[str, str], float]

_DAEMON: Final[tuple[tuple[str, str, Callable[[DaemonStatus], float]], ...]] = (
    ("uptime_seconds", "Since the daemon started.", lambda status: status.vitals.uptime_ns / SECOND),
    (
        "loop_lag_seconds",
        "The longest that the event loop was late within the last minute.",
        lambda status: status.vitals.loop_lag_ns / SECOND,
    ),
    ("threads", "Threads of the process.", lambda status: status.vitals.threads),
    ("resident_bytes", "Resident memory of the process.", lambda status: status.vitals.resident_bytes),
    ("open_files", "Open file descriptors.", lambda status: status.vitals.open_files),
    ("open_files_max", "How many there may be.", lambda status: status.vitals.files_max),
    ("connections", "NBD connections.", lambda status: status.connections),
)
_IO: Final[tuple[tuple[str, str, Callable[[IoCounts], float]], ...]] = (
    ("reads_total", "Read requests of guests.", lambda io: io.reads),
    ("read_bytes_total", "Bytes read by guests.", lambda io: io.read_bytes),
    ("writes_total", "Write requests of guests.", lambda io: io.writes),
    ("written_bytes_total", "Bytes written by guests.", lambda io: io.written_bytes),
    ("zeroes_total", "WRITE_ZEROES requests.", lambda io: io.zeroes),
    ("zeroed_bytes_total", "Bytes of WRITE_ZEROES requests.", lambda io: io.zeroed_bytes),
    ("trims_total", "TRIM requests.", lambda io: io.trims),
    ("trimmed_bytes_total", "Bytes of TRIM requests.", lambda io: io.trimmed_bytes),
    ("flushes_total", "FLUSH and FUA requests.", lambda io: io.flushes),
    ("flush_seconds_total", "Time that guests waited in flushes.", lambda io: io.flush_ns / SECOND),
    ("errors_total", "Requests that failed, those of fenced epochs included.", lambda io: io.errors),
    ("regions_opened_total", "First touches: regions opened in the MRT.", lambda io: io.regions_opened),
    ("marks_total", "Durable writes of the MRT.", lambda io: io.marks),
)
_IMAGE: Final[tuple[tuple[str, str, Callable[[ImageStats], float | None]], ...]] = (
    ("size_bytes", "Virtual size.", lambda stats: stats.image.size_bytes),
    ("allocated_bytes", "Taken on the disk, AVHD included.", lambda stats: stats.image.allocated_bytes),
    ("clients", "NBD connections.", lambda stats: stats.image.connections),
    ("epoch", "Epoch of the newest lease; 0: never leased.", lambda stats: stats.image.epoch),
    ("failed", "1 where it answers EIO until it is reopened.", lambda stats: _failed(stats)),
    ("checkpoint", "1 while a checkpoint stands or is merged.", lambda stats: _has_checkpoint(stats)),
    (
        "merge_remaining_bytes",
        "Left to merge.",
        lambda stats: stats.image.merge_remaining_bytes,
    ),
    ("open_bytes", "What a power loss now would over-report at most.", lambda stats: stats.open_bytes),
    ("open_bytes_max", "At this bound first touches wait.", lambda stats: stats.max_open_bytes),
)


def _failed(stats: ImageStats) -> float | None:
    return None if stats.image.state != "open" else float(stats.image.reason is not None)


def _has_checkpoint(stats: ImageStats) -> float | None:
    return None if stats.image.state != "open" else float(stats.image.checkpoint is not None)


def render(status: DaemonStatus, images: list[ImageStats]) -> str:
    """The whole answer to one scrape. What an image does not have, it does not show."""
    lines = _family("holdfast_diskd_info", "gauge", "Version.", [({"version": status.version}, 1)])
    for name, text, value in _DAEMON:
        lines += _family(f"holdfast_diskd_{name}", "gauge", text, [({}, value(status))])
    states = [
        ({"image": stats.image.name, "state": state}, float(stats.image.state == state))
        for stats in images
        for state in _STATES
    ]
    lines += _family("holdfast_image_state", "gauge", "1 for the state that the image is in.", states)
    for name, text, of_image in _IMAGE:
        samples = [({"image": stats.image.name}, of_image(stats)) for stats in images]
        known = [(labels, value) for labels, value in samples if value is not None]
        lines += _family(f"holdfast_image_{name}", "gauge", text, known)
    for name, text, of_io in _IO:
        counted = [({"image": stats.image.name}, of_io(stats.io)) for stats in images if stats.io is not None]
        lines += _family(f"holdfast_image_{name}", "counter", text, counted)
    lines += _family("holdfast_image_points", "gauge", "Reference points.", _points(images))
    return "\n".join(lines) + "\n"


def _points(images: list[ImageStats]) -> list[Sample]:
    return [
        (
            {"image": stats.image.name, "valid": str(valid).lower()},
            sum(point.valid is valid for point in stats.points),
        )
        for stats in images
        if stats.points is not None
        for valid in (True, False)
    ]


def _family(name: str, kind: str, text: str, samples: Iterable[Sample]) -> list[str]:
    lines = [f"{name}{_labels(labels)} {_number(value)}" for labels, value in samples]
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *lines] if lines else []


def _number(value: float) -> str:
    return repr(value) if isinstance(value, float) and not value.is_integer() else str(int(value))


def _labels(labels: dict[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

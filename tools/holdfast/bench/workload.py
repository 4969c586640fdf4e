"""What the NBD benchmark's servers are asked to do, and the client that asks: `qemu-img bench`."""

import re
import subprocess

import attrs

from daemonkit.units import KiB, MiB
from holdfast.bench.servers import BenchFailed, Server, Transport, cpu_seconds

CLIENT_SECONDS_MAX = 120
SAMPLE_SECONDS_MAX = 1.0


@attrs.frozen
class Cell:
    """One workload; `qemu-img bench` knows no random addresses, so a stride scatters them."""

    name: str
    write: bool
    request_bytes: int
    depth: int
    count: int
    step_bytes: int
    # Each sample on a new disk, where the server can make one: every request touches a closed region.
    first_touch: bool = False


# One region a request: that is the working set of the first-touch rows.
FIRST_TOUCHES = 200
FIRST_TOUCH_BYTES = 256 * MiB
# A stride of a prime number of blocks visits the whole disk before it repeats: random enough for the servers.
STRIDE = 1021 * 4 * KiB
CELLS = [
    *(
        Cell(f"4 KiB {'write' if write else 'read'}, depth {depth}", write, 4 * KiB, depth, count, STRIDE)
        for write in (False, True)
        for depth, count in ((1, 2000), (8, 8000), (32, 8000))
    ),
    Cell("1 MiB read, depth 4", False, MiB, 4, 500, MiB),
    Cell("1 MiB write, depth 4", True, MiB, 4, 250, MiB),
    *(
        Cell(
            f"4 KiB write, first touch of {FIRST_TOUCHES} regions in order, depth {depth}",
            True,
            4 * KiB,
            depth,
            FIRST_TOUCHES,
            MiB,
            first_touch=True,
        )
        for depth in (1, 8)
    ),
]
TRANSPORTS: tuple[Transport, ...] = ("TCP", "Unix socket")
PATTERN = "--pattern=165"


@attrs.frozen
class Sample:
    operations_per_second: float
    cpu_microseconds: float


def client(*arguments: str) -> float:
    """Seconds that `qemu-img bench` says it took. Raises BenchFailed."""
    done = subprocess.run(
        ["qemu-img", "bench", *([] if "--image-opts" in arguments else ["-f", "raw"]), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=CLIENT_SECONDS_MAX,
    )
    match = re.search(r"Run completed in ([0-9.]+) seconds", done.stdout)
    if done.returncode or match is None:
        raise BenchFailed(f"qemu-img bench {' '.join(arguments)} failed: {done.stderr.strip()[-200:]}")
    return float(match[1])


def fill(server: Server, size_bytes: int) -> None:
    """Write the whole disk."""
    client("-w", PATTERN, "-c", str(size_bytes // MiB), "-d", "4", "-s", str(MiB), server.uri)


def open_regions(uri: str, size_bytes: int) -> None:
    """One write per region opens it where there is tracking; it stays open for longer than a sample takes."""
    client("-w", PATTERN, "-c", str(size_bytes // MiB), "-d", "8", "-s", str(4 * KiB), "-S", str(MiB), uri)


def measure(server: Server, cell: Cell, count: int) -> Sample:
    """One run of the client with so many requests. Raises BenchFailed."""
    uri = server.fresh(FIRST_TOUCH_BYTES) if cell.first_touch and server.fresh else server.uri
    arguments = ["-c", str(count), "-d", str(cell.depth), "-s", str(cell.request_bytes)]
    arguments += ["-S", str(cell.step_bytes), *(["-w", PATTERN] if cell.write else [])]
    if cell.write and not cell.first_touch:
        open_regions(uri, server.size_bytes)
    before = cpu_seconds(server.pid)
    seconds = client(*arguments, uri)
    return Sample(count / max(seconds, 0.001), (cpu_seconds(server.pid) - before) / count * 1e6)

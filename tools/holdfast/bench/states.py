"""What our own background work costs a guest: the same requests while nothing else happens, through an AVHD
(a checkpoint stands), during the merge that follows, and during a large TRIM of the same disk.

A state is set up anew for each sample, and all of them are visited before the next round. Half of the blocks
lie in the AVHD when reads go through it. A merge begins with the whole data part of the disk in the AVHD; the
TRIM is of 512 MiB in 2,048 scattered pieces. What still went on when the sample ended is counted, since a
merge that was over halfway says little.
"""

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import attrs

from daemonkit.units import KiB, MiB
from holdfast.bench.report import Row, markdown
from holdfast.bench.servers import BenchFailed, Server, cpu_seconds, holdfast
from holdfast.bench.workload import PATTERN, STRIDE, Cell, client, open_regions

State = Literal["alone", "through an AVHD", "during a merge", "during a TRIM"]
STATES: tuple[State, ...] = ("alone", "through an AVHD", "during a merge", "during a TRIM")
# What is read and written; above it lies what is trimmed.
DATA_BYTES = 256 * MiB
TRIM_BYTES = 512 * MiB
TRIM_PIECES = 2048
CELLS = [
    Cell("4 KiB read, depth 8", False, 4 * KiB, 8, 4000, STRIDE),
    Cell("4 KiB write, depth 1", True, 4 * KiB, 1, 500, STRIDE),
    Cell("4 KiB write, depth 8", True, 4 * KiB, 8, 2000, STRIDE),
]
MERGE_SECONDS_MAX = 120.0


@attrs.frozen
class Taken:
    rate: float
    cpu_microseconds: float
    lasted: bool


def _show(server: Server, image: str) -> Row:
    assert server.diskctl is not None
    shown: Row = json.loads(server.diskctl("image", "show", image, "--json"))
    return shown


def _begin(server: Server, image: str) -> str:
    assert server.diskctl is not None
    begun = server.diskctl("checkpoint", "begin", "--vm", "bench", "--image", image, "--json")
    return str(json.loads(begun)["checkpoint"])


def _end(server: Server, checkpoint: str) -> None:
    assert server.diskctl is not None
    server.diskctl("checkpoint", "end", checkpoint, "--discard")


def _wait_merged(server: Server, image: str) -> None:
    deadline = time.monotonic() + MERGE_SECONDS_MAX
    while _show(server, image)["checkpoint"] is not None:
        if time.monotonic() > deadline:
            raise BenchFailed(f"the merge of {image} took more than {MERGE_SECONDS_MAX:g} s")
        time.sleep(0.05)


@contextmanager
def _in_state(server: Server, image: str, state: State, *, writes: bool) -> Iterator[Callable[[], bool]]:
    """In it from the start to the end of the block, if the yielded function says so then."""
    uri = server.uri
    if state == "through an AVHD":
        checkpoint = _begin(server, image)
        if not writes:
            every_other = ["-c", str(DATA_BYTES // (8 * KiB)), "-d", "8", "-s", "4096", "-S", str(8 * KiB)]
            client("-w", PATTERN, *every_other, uri)
        yield lambda: True
        _end(server, checkpoint)
        _wait_merged(server, image)
    elif state == "during a merge":
        checkpoint = _begin(server, image)
        client("-w", PATTERN, "-c", str(DATA_BYTES // MiB), "-d", "4", "-s", str(MiB), uri)
        _end(server, checkpoint)
        yield lambda: _show(server, image)["checkpoint"] is not None
        _wait_merged(server, image)
    elif state == "during a TRIM":
        step = TRIM_BYTES // TRIM_PIECES
        pieces = ["-c", str(TRIM_PIECES), "-d", "16", "-s", "4096", "-S", str(step), "-o", str(DATA_BYTES)]
        client("-w", PATTERN, *pieces, uri)
        # On the disk, as what is trimmed mostly is: else the file system would write it first.
        subprocess.run(["qemu-io", "-f", "raw", "-c", "flush", uri], check=True, stdout=subprocess.DEVNULL)
        argv = ["qemu-io", "-f", "raw", "-c", f"discard {DATA_BYTES} {TRIM_BYTES}", uri]
        with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as trim:
            yield lambda: trim.poll() is None
    else:
        yield lambda: True


def _sample(server: Server, image: str, cell: Cell, state: State) -> Taken:
    if cell.write:
        open_regions(server.uri, DATA_BYTES)
    with _in_state(server, image, state, writes=cell.write) as goes_on:
        arguments = ["-c", str(cell.count), "-d", str(cell.depth), "-s", str(cell.request_bytes)]
        arguments += ["-S", str(cell.step_bytes), *(["-w", PATTERN] if cell.write else [])]
        before = cpu_seconds(server.pid)
        seconds = client(*arguments, "--image-opts", _window(server.uri))
        used = cpu_seconds(server.pid) - before
        lasted = goes_on()
    return Taken(cell.count / max(seconds, 0.001), used / cell.count * 1e6, lasted)


def _window(uri: str) -> str:
    """The data part of the disk, as qemu opens it: strides wrap at its end."""
    host, _, rest = uri.removeprefix("nbd://").partition(":")
    port, _, export = rest.partition("/")
    inner = f"file.driver=nbd,file.server.type=inet,file.server.host={host},file.server.port={port}"
    return f"driver=raw,size={DATA_BYTES},{inner},file.export={export}"


def measure(rounds: int) -> list[Row]:
    """A row per cell. Raises BenchFailed."""
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as name, ExitStack() as stack:
        server = stack.enter_context(holdfast(Path(name), DATA_BYTES + TRIM_BYTES, "TCP"))
        image = server.image
        client("-w", PATTERN, "-c", str(DATA_BYTES // MiB), "-d", "4", "-s", str(MiB), server.uri)
        taken: dict[str, dict[State, list[Taken]]] = {c.name: {s: [] for s in STATES} for c in CELLS}
        for number in range(rounds + 1):
            for cell in CELLS:
                for state in STATES:
                    sample = _sample(server, image, cell, state)
                    if number:
                        taken[cell.name][state].append(sample)
    return [_row(cell, by_state) for cell, by_state in taken.items()]


def _row(cell: str, by_state: dict[State, list[Taken]]) -> Row:
    row: Row = {"cell": cell}
    alone = statistics.median(sample.rate for sample in by_state["alone"])
    for state, samples in by_state.items():
        rates = [sample.rate for sample in samples]
        median = statistics.median(rates)
        row[state] = {
            "operations_per_second": round(median),
            "spread": round((max(rates) - min(rates)) / median, 2),
            "cpu_us_per_operation": round(statistics.median(s.cpu_microseconds for s in samples), 1),
            "of_alone": round(median / alone, 2),
            "lasted": sum(sample.lasted for sample in samples),
            "samples": len(samples),
        }
    return row


def render(rows: list[Row]) -> str:
    """Markdown."""
    lines = []
    for row in rows:
        line = [row["cell"]]
        for state in STATES:
            cell = row[state]
            text = f"{cell['operations_per_second']:,} ({cell['cpu_us_per_operation']} µs, ±{cell['spread']})"
            if state != "alone":
                text += f" **{cell['of_alone']:.2f}**"
            if cell["lasted"] < cell["samples"]:
                text += f" [{cell['lasted']} of {cell['samples']}]"
            line.append(text)
        lines.append(line)
    return markdown("Beside our own background work (TCP)", ["cell", *STATES], lines)

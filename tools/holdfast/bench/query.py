"""How long "what changed" takes inside the daemon, and what tracking costs in memory: a large, sparse image.

The image is real (side files, shared bitmap), and blocks scattered over all of it are marked as writes mark
them; only the writes themselves are left out. Then the question is asked again and again. Beside it, to see
what grows with what: the same number of changes in a smaller image, and few changes in the large one.

    .venv/bin/python -m holdfast.bench.query
"""

import gc
import logging
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Final

import attrs
import click
import structlog
import trio

from daemonkit.cli import SIZE, print_json, run_main
from daemonkit.errors import OperatorError
from daemonkit.units import SECOND, GiB, MiB, TiB, format_size
from diskd.shell.image import Image, ImageSettings

POINT: Final = "rp-0000000000000001"
BLOCK: Final = 4096
GOAL_MS: Final = 10.0
GOAL_US_PER_EXTENT: Final = 1.0


@attrs.frozen
class Answer:
    """One image's figures."""

    size_bytes: int
    changed_bytes: int
    extents: int
    median_ms: float
    cpu_ms: float
    loop_ms: float
    memory_bytes: int

    @property
    def goal_ms(self) -> float:
        return GOAL_MS + self.extents * GOAL_US_PER_EXTENT / 1000


def _memory_bytes() -> int:
    """What is really there of this process's memory, the shared bitmap included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status tells no VmRSS")


async def _longest_wait(image: Image) -> float:
    """The longest that the event loop did not come around while the question was answered, in seconds."""
    longest = 0.0
    answered = trio.Event()

    async def question() -> None:
        await image.changes(POINT)
        answered.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(question)
        last = time.perf_counter()
        while not answered.is_set():  # the waiting is what is measured
            await trio.lowlevel.checkpoint()
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
    return longest


def _remove(image: Path, shared: Path) -> None:
    shutil.rmtree(image)
    for left in shared.iterdir():
        left.unlink()


async def ask(directory: Path, shared: Path, size_bytes: int, changed_bytes: int, times: int) -> Answer:
    """Make the image, mark, ask ``times`` times, remove it."""
    path = directory / "image"
    await Image.create(path, size_bytes)
    gc.collect()
    before = _memory_bytes()
    image = await Image.open(path, ImageSettings(3600 * SECOND, 2 * size_bytes, shared))
    try:
        await image.prepare_cut()
        async with image.held():
            image.freeze(POINT)
        await image.persist_cut()
        await image.validate_point(POINT)
        for offset in range(0, size_bytes, GiB):
            await image.open_regions(offset, GiB)
        count = changed_bytes // BLOCK
        rng = Random(1)
        while count:
            block = rng.randrange(size_bytes // BLOCK)
            if not image.tracker.area.bits[block >> 3] >> (block & 7) & 1:
                image.tracker.admit(block * BLOCK, BLOCK)
                count -= 1
        await image.flush_tracking()
        gc.collect()
        grown = _memory_bytes() - before
        seconds: list[float] = []
        cpu: list[float] = []
        waits: list[float] = []
        extents = 0
        for _ in range(times):
            begun, busy = time.perf_counter(), time.process_time()
            report = await image.changes(POINT)
            seconds.append((time.perf_counter() - begun) * 1000)
            cpu.append((time.process_time() - busy) * 1000)
            waits.append(await _longest_wait(image) * 1000)
            if not report.exact or sum(length for _, length in report.extents) != changed_bytes:
                raise OperatorError("the answer is not what was marked")
            extents = len(report.extents)
        middle = statistics.median
        return Answer(size_bytes, changed_bytes, extents, middle(seconds), middle(cpu), middle(waits), grown)
    finally:
        image.abandon()
        with trio.move_on_after(60, shield=True):
            await trio.to_thread.run_sync(_remove, path, shared)


async def _ask_all(directory: Path, shared: Path, size: int, changed: int, times: int) -> list[Answer]:
    small = max(changed * 4, size // 16)
    return [
        await ask(directory, shared, *figures, times)
        for figures in ((size, changed), (small, changed), (size, MiB))
    ]


@click.command()
@click.option("--size", "size_bytes", default="1TiB", type=SIZE, show_default=True, help="Of the image.")
@click.option("--changed", default="1GiB", type=SIZE, show_default=True, help="Scattered 4 KiB blocks.")
@click.option("--times", default=7, type=click.IntRange(1), show_default=True, help="How often to ask.")
@click.option("--dir", "directory", type=click.Path(path_type=Path), help="Where the image is put.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(size_bytes: int, changed: int, times: int, directory: Path | None, as_json: bool) -> None:
    """Print time and extents of the change query, and the memory of tracking."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    made = Path(tempfile.mkdtemp(prefix="holdfast-bench-", dir=directory))
    shared = Path(tempfile.mkdtemp(prefix="holdfast-bench-", dir="/dev/shm"))
    try:
        answers = trio.run(_ask_all, made, shared, size_bytes, changed, times)
    finally:
        shutil.rmtree(made)
        shutil.rmtree(shared)
    if as_json:
        print_json([attrs.asdict(answer) for answer in answers])
        return
    click.echo("| image | changed | extents | time | CPU | goal | loop held up | memory, per TiB |")
    click.echo("|---|---|---|---|---|---|---|---|")
    for answer in answers:
        per_tib = answer.memory_bytes * TiB / answer.size_bytes / MiB
        click.echo(
            f"| {format_size(answer.size_bytes)} | {format_size(answer.changed_bytes)} | {answer.extents}"
            f" | {answer.median_ms:.1f} ms | {answer.cpu_ms:.1f} ms | {answer.goal_ms:.1f} ms"
            f" | {answer.loop_ms:.1f} ms | {answer.memory_bytes / MiB:.0f} MiB, {per_tib:.0f} MiB |"
        )


if __name__ == "__main__":
    run_main(main)

"""Region size against the cost of first touches against over-report after a power loss: a table in Markdown.

Every row writes to images of its own, in the same process, without NBD: what is measured is a write's way
through tracking to the page cache. The sizes take turns, round by round; shown are medians of the rounds. A
power loss is played: the image is let go as a killed daemon does, and the shared bitmap removed.

- random: 4 KiB writes, one at a time, each to a place of its own.
- sequential: 1 MiB writes through the image, one at a time, in MiB/s. *new*: first touches of a sparse file;
  *cached*: first touches of what lies in the page cache; *open*: the same once more. *alone*: without opening
  regions ahead.
- over-report: bytes reported and not written, per byte written, after a power loss with no flush since (the
  worst moment of `tracking_flush_interval`), and one flush later.
"""

import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Final

import attrs
import click
import structlog
import trio

from daemonkit.cli import SIZE, run_main
from daemonkit.units import GiB, KiB, MiB, format_size
from diskd.shell.image import Image, ImageSettings
from diskd.shell.writer import Writer

REGIONS: Final = (256 * KiB, 1 * MiB, 4 * MiB, 16 * MiB)
HOUR_NS: Final = 3600 * 10**9  # flushes come when they are asked for
POINT: Final = "rp-0000000000000001"
BLOCK: Final = 4 * KiB


@attrs.define
class Seen:
    """One region size, all rounds."""

    first_touch_us: list[float] = attrs.Factory(list)
    random_over: list[float] = attrs.Factory(list)
    random_over_at_rest: list[float] = attrs.Factory(list)
    new_mib_s: dict[bool, list[float]] = attrs.Factory(lambda: {True: [], False: []})  # by "ahead"
    cached_mib_s: dict[bool, list[float]] = attrs.Factory(lambda: {True: [], False: []})
    open_mib_s: list[float] = attrs.Factory(list)
    stream_over: list[float] = attrs.Factory(list)


@attrs.frozen
class Place:
    """Where the images of a run live."""

    directory: Path
    shared: Path

    def settings(self) -> ImageSettings:
        return ImageSettings(tracking_flush_interval_ns=HOUR_NS, shared_dir=self.shared)


def _lose_power(place: Place) -> None:
    for left in place.shared.iterdir():
        left.unlink()


async def _with_image(
    place: Place, size_bytes: int, region_bytes: int, ahead: bool, work: Callable[[Image], Awaitable[int]]
) -> float:
    """Do ``work`` (it returns how many bytes it changed), lose power; over-reported bytes per byte."""
    path = place.directory / "image"
    await Image.create(path, size_bytes, region_bytes=region_bytes)
    settings = place.settings()
    if not ahead:
        settings = attrs.evolve(settings, mark_ahead_bytes_max=0)
    image = await Image.open(path, settings)
    try:
        await image.prepare_cut()
        async with image.held():
            image.freeze(POINT)
        await image.persist_cut()
        await image.validate_point(POINT)
        changed = await work(image)
    finally:
        image.abandon()
    _lose_power(place)
    image = await Image.open(path, settings)
    try:
        report = await image.changes(POINT)
        return (sum(length for _, length in report.extents) - changed) / changed
    finally:
        image.abandon()
        with trio.move_on_after(60, shield=True):
            await trio.to_thread.run_sync(shutil.rmtree, path)
        _lose_power(place)


async def _random(place: Place, region_bytes: int, writes: int, seen: Seen) -> None:
    async def load(image: Image, flush: bool) -> int:
        writer = image.open_writer(lambda: None)
        blocks = Random(1).sample(range(image.size_bytes // BLOCK), writes)
        begun = time.perf_counter()
        for block in blocks:
            await writer.write(block * BLOCK, bytes(BLOCK))
        if flush:
            await image.flush_tracking()
        else:
            seen.first_touch_us.append((time.perf_counter() - begun) / writes * 1e6)
        return writes * BLOCK

    size_bytes = 16 * GiB
    for flush, over in ((False, seen.random_over), (True, seen.random_over_at_rest)):
        over.append(await _with_image(place, size_bytes, region_bytes, True, partial(load, flush=flush)))


async def _stream(writer: Writer, size_bytes: int) -> float:
    data = bytes(MiB)
    begun = time.perf_counter()
    for offset in range(0, size_bytes, MiB):
        if not writer.write_nowait(offset, data):
            await writer.write(offset, data)
    return size_bytes / MiB / (time.perf_counter() - begun)


async def _sequential(place: Place, region_bytes: int, size_bytes: int, seen: Seen) -> None:
    async def new(image: Image, ahead: bool) -> int:
        seen.new_mib_s[ahead].append(await _stream(image.open_writer(lambda: None), size_bytes // 2))
        return size_bytes // 2

    async def cached(image: Image, ahead: bool) -> int:
        writer = image.open_writer(lambda: None)
        await _stream(writer, size_bytes // 2)
        await image.flush()
        await image.flush_tracking()
        seen.cached_mib_s[ahead].append(await _stream(writer, size_bytes // 2))
        seen.open_mib_s.append(await _stream(writer, size_bytes // 2))
        return size_bytes // 2

    for ahead in (True, False):
        over = await _with_image(place, size_bytes, region_bytes, ahead, partial(new, ahead=ahead))
        if ahead:
            seen.stream_over.append(over)
        await _with_image(place, size_bytes, region_bytes, ahead, partial(cached, ahead=ahead))


async def measure(place: Place, rounds: int, writes: int, size_bytes: int) -> dict[int, Seen]:
    """All sizes in turn, in every round in another order."""
    seen = {region_bytes: Seen() for region_bytes in REGIONS}
    for number in range(rounds):
        for region_bytes in REGIONS if number % 2 == 0 else reversed(REGIONS):
            await _random(place, region_bytes, writes, seen[region_bytes])
            await _sequential(place, region_bytes, size_bytes, seen[region_bytes])
    return seen


def table(seen: dict[int, Seen]) -> list[str]:
    """Markdown."""
    lines = [
        "| region | random: first touch | over-report | … a flush later | sequential: new, alone | new, ahead"
        " | cached, alone | cached, ahead | open | over-report |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    middle = statistics.median
    for region_bytes, found in seen.items():
        streams = (
            found.new_mib_s[False], found.new_mib_s[True], found.cached_mib_s[False],
            found.cached_mib_s[True], found.open_mib_s,
        )  # fmt: skip
        lines.append(
            f"| {format_size(region_bytes)} | {middle(found.first_touch_us):.0f} µs"
            f" | {middle(found.random_over):.0f} × | {middle(found.random_over_at_rest):.2f} × | "
            + " | ".join(f"{middle(stream):.0f}" for stream in streams)
            + f" | {middle(found.stream_over):.2f} × |"
        )
    return lines


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1, 1000), help="Rounds.")
@click.option(
    "--writes", default=300, show_default=True, type=click.IntRange(1), help="Random writes a round."
)
@click.option(
    "--size", "size_bytes", default="1GiB", show_default=True, type=SIZE, help="Twice what a stream fills."
)
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path, file_okay=False), help="Where images are put."
)
def main(rounds: int, writes: int, size_bytes: int, directory: Path | None) -> None:
    """Print the table of region sizes."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    shared = Path(tempfile.mkdtemp(prefix="holdfast-bench-", dir="/dev/shm"))
    made = Path(tempfile.mkdtemp(prefix="holdfast-bench-", dir=directory))
    try:
        seen = trio.run(measure, Place(made, shared), rounds, writes, size_bytes)
    finally:
        shutil.rmtree(made)
        shutil.rmtree(shared)
    half = format_size(size_bytes // 2)
    click.echo(f"{rounds} rounds, {writes} random writes over 16GiB, streams through {half}\n")
    click.echo("\n".join(table(seen)))


if __name__ == "__main__":
    run_main(main)

"""`make bench` part `export`: a full backup over TCP beside nbdcopy and qemu-img convert of the same bytes.

All read the same image of the same `diskd` over loopback TCP and write to the same file system; its pages are
cached, so that the copying is measured and not a disk's reading. Two rows per copier: *cached* on tmpfs,
where no disk is waited for, and *durable* on the disk of TMPDIR. What each does besides copying:

    holdfast    a checkpoint, digests at both ends, qcow2, everything read again and verified, fsync
    2 disks     the same of as many bytes in two images of half the size, which are read at once
    zstd        the same with --compress of as many bytes, of which half are random; the others send noise
    nbdcopy     --flush: fsync at the end; a raw file
    qemu-img    convert, -t writeback: flush at the end; a qcow2 file, out of order (-W)

One round visits all of them in turn; the first round warms up and is not counted. What a contender wrote is
removed before the next one runs, and its dirty pages are gone with it. Time for `holdfast` is what the
daemon reports from the request to the acknowledgement; starting Python for `diskctl` is left out.
"""

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import click
from rich.console import Console
from rich.table import Table

from daemonkit.cli import SIZE, run_main
from daemonkit.errors import OperatorError
from daemonkit.units import KiB, MiB, format_size
from holdfast.bench.servers import BenchFailed, cpu_seconds

MEMORY_DIRECTORY = Path("/dev/shm")
COPY_SECONDS_MAX = 300
PIECE_BYTES = 16 * KiB
STOP_SECONDS_MAX = 20.0
BINARIES = Path(sys.executable).parent


@attrs.frozen
class Copied:
    """One copy: how long it took, and the CPU time of everybody who took part."""

    seconds: float
    cpu_seconds: float


Contender = Callable[[], Copied]


@contextlib.contextmanager
def daemon(directory: Path, *arguments: str) -> Iterator[tuple[dict[str, Any], int]]:
    """(ready line, pid) of a `diskd` process."""
    with (directory / f"{arguments[0]}.log").open("wb") as log:
        process = subprocess.Popen([str(BINARIES / "diskd"), *arguments], stdout=subprocess.PIPE, stderr=log)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise BenchFailed(f"diskd {arguments[0]} did not start: see {log.name}")
            yield json.loads(line), process.pid
        finally:
            process.terminate()
            process.wait(STOP_SECONDS_MAX)
            if process.stdout is not None:
                process.stdout.close()


def run(*argv: str) -> str:
    """Its standard output. Raises BenchFailed."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=COPY_SECONDS_MAX)
    if done.returncode:
        raise BenchFailed(f"{argv[0]} failed: {done.stderr.strip()[-300:]}")
    return done.stdout


def fill(path: Path, size_bytes: int, *, random_share: float = 1) -> None:
    """Bytes of which nothing can shorten the random ones, which are spread over small pieces."""
    piece = os.urandom(PIECE_BYTES)
    count = int(PIECE_BYTES * random_share)
    with path.open("wb") as file:
        for _ in range(0, size_bytes, PIECE_BYTES):
            file.write(os.urandom(count) + piece[count:])


def holdfast(
    diskctl: list[str], target: str, repository: Path, pids: tuple[int, int], *options: str
) -> Contender:
    """Full backups; ``options`` name the images."""

    def copy() -> Copied:
        before = sum(map(cpu_seconds, pids))
        backup = ["backup", "--vm", "bench", "--full", "--json", "--target", target]
        report = json.loads(run(*diskctl, *backup, *options).splitlines()[-1])
        used = sum(map(cpu_seconds, pids)) - before
        shutil.rmtree(repository / "bench" / report["point"])
        return Copied(report["seconds"], used)

    return copy


def peer(out: Path, source_pid: int, *argv: str) -> Contender:
    """A command that writes ``out``."""

    def copy() -> Copied:
        before, children = cpu_seconds(source_pid), os.times()
        began = time.perf_counter()
        run(*argv, str(out))
        seconds = time.perf_counter() - began
        after = os.times()
        used = after.children_user + after.children_system - children.children_user - children.children_system
        out.unlink()
        return Copied(seconds, used + cpu_seconds(source_pid) - before)

    return copy


def contenders(directory: Path, size_bytes: int, stack: contextlib.ExitStack) -> dict[str, Contender]:
    """Daemons started, the image filled. Raises BenchFailed."""
    disks, repository, out = directory / "disks", directory / "repository", directory / "copy"
    disks.mkdir()
    repository.mkdir()
    ready, source_pid = stack.enter_context(
        daemon(directory, "run", "--root", str(disks), "--nbd", "127.0.0.1:0", "--control", "127.0.0.1:0")
    )
    target, target_pid = stack.enter_context(
        daemon(directory, "target", "--root", str(repository), "--listen", "127.0.0.1:0")
    )
    diskctl = [str(BINARIES / "diskctl"), "--control", ready["control"]]
    half = max(MiB, size_bytes // 2)
    images = {"disk": (size_bytes, 1.0), "one": (half, 1.0), "two": (half, 1.0), "text": (size_bytes, 0.5)}
    for image, (size, share) in images.items():
        fill(directory / "content", size, random_share=share)
        run(*diskctl, "image", "import", image, str(directory / "content"))
        (directory / "content").unlink()
    uri = f"nbd://{ready['nbd']}/disk"

    ours = partial(holdfast, diskctl, target["listen"], repository, (source_pid, target_pid))
    found: dict[str, Contender] = {
        "holdfast": ours("--image", "disk"),
        "holdfast, 2 disks": ours("--image", "one", "--image", "two"),
        "holdfast, zstd": ours("--image", "text", "--compress"),
    }
    if shutil.which("nbdcopy"):
        found["nbdcopy"] = peer(out, source_pid, "nbdcopy", "--flush", uri)
    if shutil.which("qemu-img"):
        argv = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-t", "writeback", "-W", "-m", "8"]
        found["qemu-img"] = peer(out, source_pid, *argv, uri)
    return found


def measure(size_bytes: int, rounds: int, directory: Path | None = None) -> list[dict[str, object]]:
    """A row per contender. Raises BenchFailed, OSError."""
    with (
        tempfile.TemporaryDirectory(prefix="holdfast-export-", dir=directory) as name,
        contextlib.ExitStack() as stack,
    ):
        by_name = contenders(Path(name), size_bytes, stack)
        samples: dict[str, list[Copied]] = {contender: [] for contender in by_name}
        for number in range(rounds + 1):
            for contender, copy in by_name.items():
                os.sync()
                copied = copy()
                if number:
                    samples[contender].append(copied)
            print(
                f"bench export: round {number} of {rounds}{'' if number else ' (warm-up)'}", file=sys.stderr
            )
    return [_row(contender, taken, samples["holdfast"], size_bytes) for contender, taken in samples.items()]


def _row(name: str, taken: list[Copied], ours: list[Copied], size_bytes: int) -> dict[str, object]:
    seconds = statistics.median(copied.seconds for copied in taken)
    spread = max(copied.seconds for copied in taken) - min(copied.seconds for copied in taken)
    return {
        "copier": name,
        "seconds": round(seconds, 3),
        "bytes_per_second": round(size_bytes / seconds),
        "spread": round(spread / seconds, 2),
        "cpu_seconds": round(statistics.median(copied.cpu_seconds for copied in taken), 2),
        "holdfast_ratio": round(seconds / statistics.median(copied.seconds for copied in ours), 2),
    }


def render(rows: list[dict[str, object]], size_bytes: int, title: str) -> Table:
    """For people."""
    table = Table(
        title=f"{title}: full backup of {format_size(size_bytes)} over TCP; ratio = holdfast / peer"
    )
    for column in ("copier", "seconds", "MiB/s", "spread", "CPU s", "ratio"):
        table.add_column(column, justify="left" if column == "copier" else "right")
    for row in rows:
        rate = row["bytes_per_second"]
        assert isinstance(rate, int)
        table.add_row(
            str(row["copier"]),
            f"{row['seconds']}",
            f"{rate / MiB:,.0f}",
            f"{row['spread']}",
            f"{row['cpu_seconds']}",
            f"{row['holdfast_ratio']}",
        )
    return table


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1, 100), help="Counted rounds.")
@click.option("--size", "size_bytes", default="1GiB", show_default=True, type=SIZE, help="Size of the disk.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of tables.")
def main(rounds: int, size_bytes: int, as_json: bool) -> None:
    """Measure a full backup, digests on and committed, beside nbdcopy and qemu-img convert."""
    places = {"cached": MEMORY_DIRECTORY, "durable": None}
    try:
        found = {title: measure(size_bytes, rounds, place) for title, place in places.items()}
    except (BenchFailed, subprocess.SubprocessError) as error:
        raise OperatorError(str(error)) from error
    if as_json:
        print(json.dumps({"disk_bytes": size_bytes, "rounds": rounds, "rows": found}, indent=2))
        return
    for title, rows in found.items():
        Console().print(render(rows, size_bytes, title))


if __name__ == "__main__":
    run_main(main)

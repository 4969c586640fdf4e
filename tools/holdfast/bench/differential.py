"""A step of `make bench`: the same changes on images of very different sizes.

A differential has to cost what changed, not what the image measures. For each size: a new sparse image, a
full backup (of nothing but holes), then fio writes the same number of random blocks over NBD, then one
differential backup to a target over TCP. The time is what the daemon reports, from the request to the
acknowledgement; the bytes are what left for the target; the files are what the target keeps.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import attrs
import click
from rich.console import Console
from rich.table import Table

from daemonkit.cli import SIZE, run_main
from daemonkit.errors import OperatorError, UsageError
from daemonkit.units import GiB, KiB, TiB, format_size
from holdfast.bench.export import BINARIES, daemon
from holdfast.bench.servers import BenchFailed

JOB_SECONDS_MAX = 900


@attrs.frozen
class Workload:
    """``count`` writes of ``block_bytes`` each, all at different places."""

    block_bytes: int
    total_bytes: int


@attrs.frozen
class Measured:
    size_bytes: int
    block_bytes: int
    write_seconds: float
    query_seconds: float
    extents: int
    changed_bytes: int
    sent_bytes: int
    stored_bytes: int
    seconds: float
    source_memory_bytes: int


SIZES = (16 * GiB, 128 * GiB, TiB)


def workloads(changes_bytes: int) -> tuple[Workload, ...]:
    """Large blocks, and an eighth as much in small ones."""
    return Workload(64 * KiB, changes_bytes), Workload(4 * KiB, changes_bytes // 8)


def run(*argv: str) -> str:
    """Its standard output. Raises BenchFailed."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=JOB_SECONDS_MAX)
    if done.returncode:
        raise BenchFailed(f"{argv[0]} failed: {done.stderr.strip()[-300:]}")
    return done.stdout


def write_blocks(uri: str, size_bytes: int, workload: Workload) -> float:
    """Seconds that fio took."""
    began = time.perf_counter()
    run(
        "fio",
        "--name=changes",
        "--ioengine=nbd",
        f"--uri={uri}",
        "--rw=randwrite",
        "--randseed=1",
        f"--bs={workload.block_bytes}",
        f"--size={size_bytes}",
        f"--io_size={workload.total_bytes}",
        "--iodepth=64",
        "--end_fsync=1",
        "--output=/dev/null",
    )
    return time.perf_counter() - began


def memory_bytes(pid: int) -> int:
    """Resident memory of a process, shared pages included."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * KiB
    return 0


def measure_one(directory: Path, size_bytes: int, workload: Workload) -> Measured:
    """One image, from its creation to its differential. Raises BenchFailed."""
    disks, repository = directory / "disks", directory / "repository"
    with contextlib.ExitStack() as stack:
        for path in (disks, repository):
            path.mkdir(parents=True)
            stack.callback(shutil.rmtree, path)
        addresses = ("--nbd", "127.0.0.1:0", "--control", "127.0.0.1:0")
        ready, pid = stack.enter_context(daemon(directory, "run", "--root", str(disks), *addresses))
        target, _ = stack.enter_context(
            daemon(directory, "target", "--root", str(repository), "--listen", "127.0.0.1:0")
        )
        diskctl = (str(BINARIES / "diskctl"), "--control", ready["control"])

        def asked(*argv: str) -> Any:
            return json.loads(run(*diskctl, *argv, "--json").splitlines()[-1])

        backup = ("backup", "--vm", "bench", "--image", "disk", "--target", target["listen"])
        run(*diskctl, "image", "create", "disk", str(size_bytes))
        full = asked(*backup)
        write_seconds = write_blocks(f"nbd://{ready['nbd']}/disk", size_bytes, workload)
        began = time.perf_counter()
        changes = json.loads(run(*diskctl, "changes", "disk", "--since", full["point"], "--json"))
        query_seconds = time.perf_counter() - began
        report = asked(*backup)
        (disk,) = report["disks"]
        if report["kind"] != "differential" or disk["changed_bytes"] < workload.total_bytes:
            raise BenchFailed(f"that was no differential of {workload.total_bytes} bytes: {report}")
        stored = (repository / "bench" / report["point"] / "disk.qcow2").stat().st_blocks * 512
        return Measured(
            size_bytes=size_bytes,
            block_bytes=workload.block_bytes,
            write_seconds=round(write_seconds, 2),
            query_seconds=round(query_seconds, 3),
            extents=len(changes["extents"]),
            changed_bytes=disk["changed_bytes"],
            sent_bytes=disk["sent_bytes"],
            stored_bytes=stored,
            seconds=report["seconds"],
            source_memory_bytes=memory_bytes(pid),
        )


def render(rows: list[Measured]) -> Table:
    """For people."""
    table = Table(title="Differential of the same changes, by the size of the image")
    columns = ("image", "blocks", "changed", "sent", "stored", "extents", "seconds", "source memory", "fio s")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            format_size(row.size_bytes),
            format_size(row.block_bytes),
            format_size(row.changed_bytes),
            format_size(row.sent_bytes),
            format_size(row.stored_bytes),
            f"{row.extents:,}",
            f"{row.seconds:.2f}",
            format_size(row.source_memory_bytes),
            f"{row.write_seconds:.1f}",
        )
    return table


@click.command()
@click.option(
    "--size", "sizes", multiple=True, type=SIZE, help="Of the image; repeatable. [16GiB 128GiB 1TiB]"
)
@click.option("--changes", "changes_bytes", type=SIZE, default="1GiB", show_default=True,
              help="In blocks of 64 KiB; an eighth of it in blocks of 4 KiB.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
def main(sizes: tuple[int, ...], changes_bytes: int, as_json: bool) -> None:
    """Measure a differential of the same scattered changes (1 GiB in 64 KiB, 128 MiB in 4 KiB) by image size.

    Needs fio with its nbd engine, and about five times --changes free in TMPDIR.
    """
    if changes_bytes % (512 * KiB):
        raise UsageError("--changes is a multiple of 512KiB")
    if shutil.which("fio") is None:
        raise OperatorError("this needs fio (Debian: apt install fio)")
    rows = []
    try:
        for workload in workloads(changes_bytes):
            for size_bytes in sizes or SIZES:
                with tempfile.TemporaryDirectory(prefix="holdfast-differential-") as name:
                    rows.append(measure_one(Path(name), size_bytes, workload))
                print(f"bench differential: {format_size(size_bytes)}: {rows[-1]}", file=sys.stderr)
    except (BenchFailed, subprocess.SubprocessError) as error:
        raise OperatorError(str(error)) from error
    if as_json:
        print(json.dumps([attrs.asdict(row) for row in rows], indent=2))
        return
    Console(width=130).print(render(rows))


if __name__ == "__main__":
    run_main(main)

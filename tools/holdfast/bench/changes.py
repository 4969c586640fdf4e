"""What tracking a large image takes: memory, and the time of "what has changed since".

An image of 1 TiB, sparse, of which 262,144 blocks of 4 KiB change after a reference point: 64 of them, 16 KiB
apart, in each of 4,096 regions all over the image, so that no two are neighbours. Asked for:

    inside        the daemon's own query, by its own code, in a process that opens the image as diskd does
    nbdinfo --map the same changes from the outside: of diskd, and of qemu-nbd, which serves a qcow2 of the
                  same size with a persistent bitmap of the same blocks (a grain of 4 KiB, marked by writing
                  zeroes, so that it takes no space)

The query is made in an empty image of that size too, and in an empty one of a quarter of it: what does not
grow with the image shows there.
"""

import json
import logging
import shutil
import socket
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
import trio

from daemonkit.units import KiB, MiB, TiB
from diskd.shell.image import Image
from diskd.shell.image_settings import ImageSettings
from holdfast.bench.report import Row, markdown
from holdfast.bench.servers import BenchFailed, Place, holdfast, running, wait_listening

SIZE = 1 * TiB
REGIONS = 4096
BLOCKS_PER_REGION = 64
APART = 16 * KiB
BLOCK = 4 * KiB
IN_FLIGHT = 64
MAP_SECONDS_MAX = 300
_WRITE, _DISC, _ZEROES = 1, 2, 6


def offsets() -> list[int]:
    """Of the blocks that change, ascending."""
    distance = SIZE // REGIONS
    return [
        region * distance + block * APART for region in range(REGIONS) for block in range(BLOCKS_PER_REGION)
    ]


def scatter(path: Path, export: str, command: int, order: list[int]) -> None:
    """Change these blocks through a bare NBD client. Raises BenchFailed, OSError."""
    data = b"\xa5" * BLOCK if command == _WRITE else b""
    with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rb") as replies:
        sock.connect(str(path))
        replies.read(18)
        name = export.encode()
        sock.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 1, len(name)) + name)
        if len(replies.read(10)) != 10:
            raise BenchFailed(f"the export {export!r} was refused")
        waiting: list[bytes] = []
        for offset in order:
            waiting.append(struct.pack(">IHHQQI", 0x25609513, 0, command, offset, offset, BLOCK) + data)
            if len(waiting) == IN_FLIGHT:
                sock.sendall(b"".join(waiting))
                for _ in waiting:
                    if replies.read(16)[4:8] != bytes(4):
                        raise BenchFailed(f"a write to {export!r} failed")
                waiting.clear()
        sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, _DISC, 0, 0, 0))


def timed(rounds: int, action: Callable[[], object]) -> float:
    """Median of the seconds that it takes; once more before, to warm up."""
    taken = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def map_extents(uri: str, context: str) -> int:
    """How many changed extents `nbdinfo --map` shows."""
    argv = ["nbdinfo", "--json", f"--map={context}", uri]
    done = subprocess.run(argv, capture_output=True, check=False, timeout=MAP_SECONDS_MAX)
    if done.returncode:
        raise BenchFailed(f"nbdinfo failed: {done.stderr.decode(errors='replace')[-200:]}")
    return done.stdout.count(b'"type": 1') or done.stdout.count(b'"type":1')


def _memory(pid: int) -> tuple[int, int]:
    """(resident bytes, those of them that are shared memory) of a process."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return tuple(int(fields[key].split()[0]) << 10 for key in ("VmRSS", "RssShmem"))  # type: ignore[return-value] # two keys


def _ours(directory: Path, rounds: int) -> Row:
    with holdfast(directory, SIZE, "Unix socket") as server:
        assert server.diskctl is not None
        place = Place("Unix socket", 0, Path(server.uri.rpartition("=")[2]))
        image = server.image
        before = _memory(server.pid)[0]

        def begin() -> Row:
            argv = ["checkpoint", "begin", "--vm", "bench", "--image", image, "--json"]
            begun: Row = json.loads(server.diskctl(*argv))  # type: ignore[misc] # asserted above
            return begun

        first = begin()
        server.diskctl("checkpoint", "end", first["checkpoint"], "--keep-point")
        began = time.perf_counter()
        # One block of every region, then the next: first touches share their syncs.
        order = sorted(offsets(), key=lambda offset: offset % (SIZE // REGIONS))
        scatter(place.path, image, _WRITE, order)
        writing = time.perf_counter() - began
        resident, shared = _memory(server.pid)
        row: Row = {
            "writing_seconds": round(writing, 1),
            "resident_before_bytes": before,
            "resident_bytes": resident,
            "shared_bytes": shared,
            "bitmap_bytes": SIZE // BLOCK // 8,
        }
        if shutil.which("nbdinfo"):
            second = begin()
            uri, context = place.uri(f"{image}:{second['checkpoint']}"), f"qemu:dirty-bitmap:{first['point']}"
            row["extents"] = map_extents(uri, context)
            row["map_seconds"] = round(timed(rounds, lambda: map_extents(uri, context)), 3)
            server.diskctl("checkpoint", "end", second["checkpoint"], "--discard")
    inside = trio.run(_query, directory / "root" / "images" / image, first["point"], rounds)
    row["query_seconds"] = round(inside, 4)
    return row


async def _query(directory: Path, point: str, rounds: int) -> float:
    """The median time of the query in an image that is open here."""
    image = await Image.open(directory, ImageSettings())
    try:
        taken = []
        for _ in range(rounds + 1):
            began = time.perf_counter()
            await image.changes(point)
            taken.append(time.perf_counter() - began)
        return statistics.median(taken[1:])
    finally:
        with trio.move_on_after(60, shield=True):
            await image.close()


async def _query_empty(directory: Path, size_bytes: int, rounds: int) -> float:
    await Image.create(directory, size_bytes)
    image = await Image.open(directory, ImageSettings())
    point = "rp-0000000000000001"
    await image.prepare_cut()
    async with image.held():
        image.freeze(point)
    await image.persist_cut()
    await image.validate_point(point)
    await image.close()
    return await _query(directory, point, rounds)


@contextmanager
def _qemu(directory: Path, path: Path, *arguments: str) -> Iterator[Place]:
    place = Place.make("Unix socket", directory, "qemu")
    argv = ["qemu-nbd", "-t", "-f", "qcow2", "-k", str(place.path), "-x", "disk"]
    with running([*argv, *arguments, str(path)], directory / "qemu.log") as process:
        wait_listening(process, place)
        yield place


def _qemus(directory: Path, rounds: int) -> Row:
    path = directory / "disk.qcow2"
    for argv in (
        ["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(SIZE)],
        ["qemu-img", "bitmap", "--add", "-g", str(BLOCK), str(path), "b"],
    ):
        subprocess.run(argv, check=True)
    began = time.perf_counter()
    with _qemu(directory, path, "--discard=unmap") as place:
        scatter(place.path, "disk", _ZEROES, offsets())
    writing = time.perf_counter() - began
    with _qemu(directory, path, "-r", "-B", "b") as place:
        uri, context = place.uri("disk"), "qemu:dirty-bitmap:b"
        extents = map_extents(uri, context)
        seconds = timed(rounds, lambda: map_extents(uri, context))
    return {"writing_seconds": round(writing, 1), "extents": extents, "map_seconds": round(seconds, 3)}


def measure(rounds: int) -> Row:
    """All of it. Raises BenchFailed."""
    # The images that are opened here log to standard output, which is the report's.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as name:
        directory = Path(name)
        for part in ("ours", "qemu"):
            (directory / part).mkdir()
        found: Row = {"diskd": _ours(directory / "ours", rounds)}
        if shutil.which("qemu-nbd") and shutil.which("nbdinfo"):
            found["qemu-nbd"] = _qemus(directory / "qemu", rounds)
        empty = {"1 TiB": SIZE, "256 GiB": SIZE // 4}
        found["empty_query_seconds"] = {
            title: round(trio.run(_query_empty, directory / title, size, rounds), 4)
            for title, size in empty.items()
        }
        found["goal_seconds"] = round(0.010 + 1e-6 * REGIONS * BLOCKS_PER_REGION, 3)
    return found


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms"


def render(found: Row) -> str:
    """Markdown."""
    ours, peer = found["diskd"], found.get("qemu-nbd", {})
    lines = [
        ["the query inside the daemon", _milliseconds(ours["query_seconds"]), ""],
        ["goal: 10 ms + 1 µs per extent", _milliseconds(found["goal_seconds"]), ""],
    ]
    for title, seconds in found["empty_query_seconds"].items():
        lines.append([f"the same of an empty image of {title}", _milliseconds(seconds), ""])
    if "map_seconds" in ours:
        theirs = _milliseconds(peer["map_seconds"]) if peer else ""
        lines.append(["`nbdinfo --map`, from the outside", _milliseconds(ours["map_seconds"]), theirs])
        lines.append(["changed extents that it shows", f"{ours['extents']:,}", f"{peer.get('extents', 0):,}"])
    for title, key in (
        ("resident, before the changes", "resident_before_bytes"),
        ("resident, after them", "resident_bytes"),
        ("of which shared memory", "shared_bytes"),
        ("the bitmap's size", "bitmap_bytes"),
    ):
        lines.append([title, f"{ours[key] / MiB:,.0f} MiB", ""])
    return markdown("1 TiB with 1 GiB of scattered 4 KiB changes", ["", "diskd", "qemu-nbd"], lines)

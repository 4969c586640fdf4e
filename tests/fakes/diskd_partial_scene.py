"""An export of many frames over two disks, sent in pieces to a repository whose machine loses its power."""

import random

import numpy as np
import trio
from diskd_frozen import MemoryLibrary
from diskd_repository_scene import Crash, CrashingFiles
from diskd_target import interleaved, receive_all, stream_of

from daemonkit.diskd_api import BackupDisk
from diskd.core.stream import FRAME, Frame, StreamDecoder
from diskd.core.stream_frames import ROW, FrameBatch, by_disk
from diskd.shell.repository import open_repository

KiB = 1 << 10
VM = "web"


class PowerLossFiles(CrashingFiles):
    """Stops before step ``at``. ``lose`` then leaves of every file what its last sync found, and of the names
    those whose directory was synced: the most that a power loss can take."""

    def __init__(self, at=None):
        super().__init__(at)
        self.paths, self.synced, self.unnamed = {}, {}, set()

    def create(self, path):
        descriptor = super().create(path)
        self.paths[descriptor] = path
        self.synced[path] = b""
        self.unnamed.add(path)
        return descriptor

    def reopen(self, path):
        descriptor = super().reopen(path)
        self.paths[descriptor] = path
        self.synced.setdefault(path, path.read_bytes())
        return descriptor

    def _count(self):
        if self.steps == self.at:
            raise Crash
        self.steps += 1

    def sync(self, descriptor):
        path = self.paths[descriptor]
        self._count()
        self.synced[path] = path.read_bytes()

    def sync_directory(self, path):
        self._count()
        self.unnamed = {name for name in self.unnamed if name.parent != path}

    def lose(self):
        for path, content in self.synced.items():
            if path in self.unnamed:
                path.unlink(missing_ok=True)
            elif path.exists():
                path.write_bytes(content)


def scattered():
    """(stream of a full, stream of a differential with many small frames of every kind)."""
    library = MemoryLibrary(system=900 * KiB, journal=300 * KiB)
    disks = [BackupDisk("system", "system"), BackupDisk("journal", "journal")]
    system, journal = library.images["system"], library.images["journal"]
    chance = random.Random(7)
    system.write(0, chance.randbytes(500 * KiB))
    journal.write(40 * KiB, chance.randbytes(60 * KiB))
    streams, names = [], []

    async def take(base):
        frozen = await library.begin_checkpoint(VM, disks, "name = 'web'\n")
        streams.append(stream_of(frozen, base))
        names.append(frozen.point)
        await frozen.end("keep")

    trio.run(take, None)
    for disk, size in ((system, 900), (journal, 300)):
        for block in range(0, size // 4, 3):
            if chance.random() < 0.3:
                disk.trim(block * 4 * KiB, 4 * KiB)
            elif chance.random() < 0.2:
                disk.write(block * 4 * KiB, bytes(4 * KiB))
            else:
                disk.write(block * 4 * KiB, chance.randbytes(4 * KiB))
    trio.run(take, names[0])
    return streams


def shuffled(stream, seed):
    """The same export with the frames of its disks in another order among each other."""
    data, events, opening = stream
    frames = in_another_order(events[1:-1], random.Random(seed))
    return data, [events[0], *frames, events[-1]], opening


def in_another_order(frames, chance):
    """The frames of each disk in order, those of different disks shuffled."""
    disks = sorted({frame.header.disk for frame in frames})
    return list(interleaved([[f for f in frames if f.header.disk == disk] for disk in disks], chance))


def batch_of(events):
    """(batch, rows) as the receiver hands them over."""
    parts = [event.header.pack() + event.data for event in events]
    view = memoryview(b"".join(parts))
    starts, position = [], 0
    for part in parts:
        starts.append(position)
        position += len(part)
    packed = b"".join(event.header.pack() for event in events)
    return FrameBatch(view, starts, packed, position), np.frombuffer(packed, dtype=ROW)


def send(incoming, events, *, first=0, portion=5, keep=True):
    """Everything from frame ``first`` on, in portions, with a durable record after each."""
    frames = [event for event in events if isinstance(event, Frame)]
    for start in range(first, len(frames), portion):
        incoming.batch(*batch_of(frames[start : start + portion]))
        if keep and (snapshot := incoming.snapshot()) is not None:
            incoming.keep(snapshot)


def commit(incoming, events):
    incoming.commit(
        events[-1],
        source_digest=events[-1].digest.hex(),
        committed_at="2026-01-01T00:00:00+00:00",
        poll=lambda: None,
    )
    incoming.publish()


def take_whole(incoming, stream, **options):
    """The rest of a stream, as a source sends it that was told what is known, the disks in an order of its
    own; how much was known."""
    _, events, opening = stream
    decoder = StreamDecoder()
    decoder.feed(opening)
    assert decoder.next_event() == events[0]
    known = b"".join(incoming.known())
    decoder.known(known)
    counts = {disk: len(known_rows) for disk, known_rows in _split(known)}
    rest = []
    for disk in range(len(events[0].disks)):
        frames = [event for event in events[1:-1] if event.header.disk == disk]
        body = b"".join(frame.header.pack() for frame in frames)
        mine = dict(_split(known)).get(disk, np.frombuffer(b"", dtype=ROW))
        assert body.startswith(mine.tobytes()), "what is known is not how the disk begins"
        rest += frames[counts.get(disk, 0) :]
    if len(counts) > 1:
        rest = in_another_order(rest, random.Random(len(rest)))
    send(incoming, [events[0], *rest, events[-1]], **options)
    commit(incoming, events)
    return len(known) // FRAME.size


def _split(packed):
    rows = np.frombuffer(packed, dtype=ROW)
    return [(disk, rows[places]) for disk, places in by_disk(rows)]


def content_of(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def receive_base(root, streams):
    with open_repository(root) as repository:
        receive_all(repository, streams[0])

"""A VM in memory, the streams of three backups; file operations that stop, or lose what was not synced."""

import trio
from diskd_frozen import MemoryLibrary
from diskd_target import receive_all, stream_of

from daemonkit.diskd_api import BackupDisk
from diskd.shell.repository import open_repository
from diskd.shell.repository_files import RepositoryFiles

KiB = 1 << 10
DISKS = [BackupDisk("system", "system"), BackupDisk("journal", "journal")]
CONFIG = 'name = "web"\n'


class Crash(BaseException):
    """The process ends here; nothing after it runs."""


STEPS = [
    "make_directory",
    "create",
    "write",
    "set_size",
    "clone",
    "sync",
    "sync_directory",
    "publish",
    "exchange",
    "retire",
    "remove_tree",
]


class CrashingFiles(RepositoryFiles):
    """Stops before step ``at`` (counted from 0), or never; with an ``error`` only step ``at`` (from 1) fails,
    and ``failed`` says which that was."""

    def __init__(self, at=None, error=None):
        self.at, self.steps, self.error, self.failed = at, 0, error, None


def _step(name):
    real = getattr(RepositoryFiles, name)

    def step(self, *arguments):
        if self.steps == self.at and self.error is None:
            raise Crash  # And again at every later step: a dead process does nothing.
        self.steps += 1
        if self.error is not None and self.steps == self.at:
            self.failed = name
            raise self.error
        return real(self, *arguments)

    return step


for _name in STEPS:
    setattr(CrashingFiles, _name, _step(_name))


class LossyFiles(CrashingFiles):
    """A power loss at the crash: what was not synced is gone, whether bytes or names.

    A commit or an exchange stays although its directory was not synced: the harder case, since then
    the commit is there and everything below it had better be. Where a point lost its name, that is taken
    back: then its files had better be there.
    """

    def __init__(self, at):
        super().__init__(at)
        self.unsynced, self.unnamed, self.open = set(), set(), {}
        self.retired = {}

    def create(self, path):
        descriptor = super().create(path)
        self.open[descriptor] = path
        self.unnamed.add(path)
        return descriptor

    def write(self, descriptor, offset, data):
        super().write(descriptor, offset, data)
        self.unsynced.add(self.open[descriptor])

    def set_size(self, descriptor, size):
        super().set_size(descriptor, size)
        self.unsynced.add(self.open[descriptor])

    def clone(self, source, offset, descriptor, to, length):
        self.unsynced.add(self.open[descriptor])
        return super().clone(source, offset, descriptor, to, length)

    def sync(self, descriptor):
        super().sync(descriptor)
        self.unsynced.discard(self.open[descriptor])

    def sync_directory(self, path):
        super().sync_directory(path)
        self.unnamed = {name for name in self.unnamed if name.parent != path}
        self.retired = {old: new for old, new in self.retired.items() if old.parent != path}

    def publish(self, temporary, final):
        super().publish(temporary, final)
        self._moved(temporary, final)

    def exchange(self, one, other):
        super().exchange(one, other)
        self._moved(one, other)

    def retire(self, point, temporary):
        self.retired[point] = temporary
        super().retire(point, temporary)

    def _moved(self, old, new):
        for names in (self.unsynced, self.unnamed):
            moved = {new / name.name if name.parent == old else name for name in names}
            names.clear()
            names.update(moved)

    def lose(self):
        for point, temporary in self.retired.items():
            if temporary.exists():
                temporary.rename(point)
            elif not point.exists():
                point.mkdir()
        for path in self.unsynced | self.unnamed:
            if path.exists() and path in self.unnamed:
                path.unlink()
            elif path.exists():
                path.write_bytes(b"")


def poll():
    pass


async def _frozen(library):
    return await library.begin_checkpoint("web", DISKS, CONFIG)


class Scene:
    """A VM in memory with the streams of a full and of two differentials, and what the disks held then."""

    def __init__(self):
        self.library = MemoryLibrary(system=600 * KiB, journal=64 * KiB)
        self.streams, self.contents, self.names = [], [], []
        disk = self.library.images["system"]
        disk.write(0, bytes(range(256)) * 1200)
        self.library.images["journal"].write(8192, b"journal" * 1000)
        self._take(None)
        disk.write(100 * KiB, b"2" * 5000)
        disk.trim(200 * KiB, 72 * KiB)
        self._take(self.names[-1])
        disk.write(500 * KiB, b"3" * 9000)
        disk.write(220 * KiB, b"4" * 4096)
        self._take(self.names[-1])

    def _take(self, base):
        async def take():
            frozen = await _frozen(self.library)
            self.streams.append(stream_of(frozen, base))
            self.contents.append({name: bytes(d.data) for name, d in self.library.images.items()})
            self.names.append(frozen.point)
            await frozen.end("keep")

        trio.run(take)

    def fill(self, root, count=3):
        with open_repository(root) as repository:
            for stream in self.streams[:count]:
                receive_all(repository, stream)

    def check(self, root, count):
        """Exactly the first ``count`` points are there, whole and verified, and nothing else."""
        with open_repository(root) as repository:
            listed = [p for p in repository.listing(None) if p.damaged is None]
            assert [p.point for p in listed] == self.names[:count]
            for number, name in enumerate(self.names[:count]):
                assert repository.verify("web", name, poll).problems == []
                with repository.open("web", name) as opened:
                    for disk, content in self.contents[number].items():
                        assert opened.views[disk].read(0, len(content)) == content
            if (root / "web").is_dir():
                assert sorted(p.name for p in (root / "web").iterdir()) == sorted(self.names[:count])

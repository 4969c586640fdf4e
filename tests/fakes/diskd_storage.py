"""Several diskd over one directory: hosts of one test, each with its own shared memory, boot and machine."""

import contextlib
import shutil
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeVar

import pytest
import trio
from diskd_process import SECONDS_MAX, DiskdProcess, new_shared_dir
from programs import good

from daemonkit.diskd_api import LEASE_ACQUIRE, BackupDisk, ImageName, LeaseRequest
from daemonkit.methods import Method
from daemonkit.ports import Address
from daemonkit.rpc import CallRefused, connect
from diskd.core import calls
from diskd.core.inventory import ChangesInfo, ImageInfo

P = TypeVar("P")
R = TypeVar("R")


class Host:
    """What tells one host from another, and survives a kill of its daemons but not ``reboot``."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        self.shared = new_shared_dir()
        self._boot_id = directory / f"{name}.boot-id"
        self._machine_id = directory / f"{name}.machine-id"
        self._machine_id.write_text(f"{uuid.uuid4().hex}\n")
        self._boot_id.write_text(f"{uuid.uuid4()}\n")

    @property
    def boot_id(self) -> str:
        return self._boot_id.read_text().strip()

    def reboot(self) -> None:
        self._boot_id.write_text(f"{uuid.uuid4()}\n")
        for path in self.shared.iterdir():
            path.unlink()

    def settings(self) -> list[str]:
        """Of every diskd of this host, for its command line."""
        values = {
            "host_name": self.name,
            "shared_dir": self.shared,
            "boot_id_file": self._boot_id,
            "machine_id_file": self._machine_id,
        }
        return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


class Storage:
    """The directory ``root``, its hosts by name, and the daemons that were started on it."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self.root.mkdir()
        self._directory = directory
        self._daemons: list[DiskdProcess] = []
        self.hosts: dict[str, Host] = {}

    def host(self, name: str) -> Host:
        if name not in self.hosts:
            self.hosts[name] = Host(self._directory, name)
        return self.hosts[name]

    def daemon(self, name: str, host: str, *arguments: str) -> DiskdProcess:
        """Not started yet."""
        daemon = DiskdProcess(self.root, "--name", name, *self.host(host).settings(), *arguments)
        self._daemons.append(daemon)
        return daemon

    async def start(self, name: str, host: str, *arguments: str) -> DiskdProcess:
        daemon = self.daemon(name, host, *arguments)
        await daemon.start()
        return daemon

    async def end(self) -> None:
        for daemon in self._daemons:
            if daemon._process is not None and daemon._process.returncode is None:
                daemon._process.kill()
                with trio.move_on_after(SECONDS_MAX, shield=True):
                    await daemon._process.wait()
        for host in self.hosts.values():
            shutil.rmtree(host.shared)


@contextlib.asynccontextmanager
async def storage(directory: Path) -> AsyncIterator[Storage]:
    """Its daemons are killed at the end if they still run."""
    made = Storage(directory)
    try:
        yield made
    finally:
        await made.end()


async def qemu_io(url: str, *commands: str) -> None:
    arguments = [part for command in commands for part in ("-c", command)]
    await good("qemu-io", "-f", "raw", *arguments, url)


class Control:
    """A daemon's control, asked from within the test: a diskctl takes most of a second to start."""

    def __init__(self, daemon: DiskdProcess) -> None:
        self.daemon = daemon

    async def ask(self, method: Method[P, R], params: P) -> R:
        with trio.fail_after(SECONDS_MAX):
            async with connect(Address.parse(self.daemon.ready["control"])) as client:
                return await client.call(method, params)

    async def refuses(self, method: Method[P, R], params: P) -> str:
        """What it says, in one line; it must refuse."""
        with pytest.raises(CallRefused) as caught:
            await self.ask(method, params)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    async def create(self, image: str, size_bytes: int) -> None:
        await self.ask(calls.IMAGE_CREATE, calls.CreateImage(image, size_bytes))

    async def open(self, image: str, fenced: str | None = None) -> None:
        await self.ask(calls.IMAGE_OPEN, calls.OpenImage(image, fenced))

    async def refuses_open(self, image: str, fenced: str | None = None) -> str:
        return await self.refuses(calls.IMAGE_OPEN, calls.OpenImage(image, fenced))

    async def release(self, image: str) -> None:
        await self.ask(calls.IMAGE_RELEASE, ImageName(image))

    async def show(self, image: str) -> ImageInfo:
        return await self.ask(calls.IMAGE_SHOW, ImageName(image))

    async def images(self) -> list[ImageInfo]:
        return (await self.ask(calls.IMAGE_LIST, calls.Nothing())).images

    async def acquire(self, image: str, epoch: int, holder: str = "n/web") -> None:
        await self.ask(LEASE_ACQUIRE, LeaseRequest(image, epoch, holder))

    async def take(self, image: str, epoch: int, *dead_boots: str) -> None:
        """As clusterd does for a run that it starts on this daemon's host."""
        await self.ask(LEASE_ACQUIRE, LeaseRequest(image, epoch, "n/web", list(dead_boots)))

    async def refuses_take(self, image: str, epoch: int, *dead_boots: str, holder: str = "n/web") -> str:
        return await self.refuses(LEASE_ACQUIRE, LeaseRequest(image, epoch, holder, list(dead_boots)))

    async def refuses_acquire(self, image: str, epoch: int, holder: str = "x") -> str:
        return await self.refuses(LEASE_ACQUIRE, LeaseRequest(image, epoch, holder))

    async def point(self, *images: str) -> str:
        """A new reference point of a VM with these images."""
        disks = [BackupDisk(image, image) for image in images]
        begun = await self.ask(calls.CHECKPOINT_BEGIN, calls.BeginCheckpoint("vm", disks))
        await self.ask(calls.CHECKPOINT_END, calls.EndCheckpoint(begun.checkpoint, "keep"))
        return begun.point

    async def changes(self, image: str, point: str) -> ChangesInfo:
        return await self.ask(calls.CHANGES, calls.PointName(image, point))

    async def exact(self, image: str, point: str) -> list[tuple[int, int]]:
        """The changes, which must be exact."""
        changes = await self.changes(image, point)
        assert (changes.exact, changes.over_report_bytes) == (True, 0)
        return [(offset, length) for offset, length in changes.extents]

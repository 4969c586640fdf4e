"""Several diskd over one directory: hosts of one test, each with its own shared memory, boot and machine."""

import contextlib
import shutil
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import trio
from diskd_process import SECONDS_MAX, DiskdProcess, new_shared_dir
from programs import good


class Host:
    """What tells one host from another, and survives a kill of its daemons but not ``reboot``."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        self.shared = new_shared_dir()
        self._boot_id = directory / f"{name}.boot-id"
        self._machine_id = directory / f"{name}.machine-id"
        self._machine_id.write_text(f"{uuid.uuid4().hex}\n")
        self._boot_id.write_text(f"{uuid.uuid4()}\n")

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


async def point_of(daemon: DiskdProcess, *images: str) -> str:
    """A new reference point of a VM with these images, with ``daemon``."""
    options = [part for image in images for part in ("--image", image)]
    begun = await daemon.json("checkpoint", "begin", "--vm", "vm", *options)
    await daemon.do("checkpoint", "end", begun["checkpoint"], "--keep-point")
    return str(begun["point"])

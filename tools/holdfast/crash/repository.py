"""A `diskd target` behind a link that can be cut, and its repository as stock tools see it."""

import contextlib
import secrets
import socket
from pathlib import Path
from random import Random
from typing import Final, TypeVar

import trio

from daemonkit.cli import call_once
from daemonkit.methods import Method
from daemonkit.ports import Address
from holdfast.crash import power
from holdfast.crash.journal import Place
from holdfast.crash.oracle import Violation
from holdfast.crash.process import DISKD, DaemonProcess
from holdfast.crash.small_disk import SmallDisk
from holdfast.lab.links import LINKS_HEAL, LINKS_RESET, LINKS_SET, LinkChange, LinkNames, both_ways
from holdfast.lab.proxy import LinkProxies, ProxyConfig, Route

P = TypeVar("P")
R = TypeVar("R")

CALL_SECONDS_MAX: Final = 120.0
PROGRAM_SECONDS_MAX: Final = 120.0
VM: Final = "web"
_SMALL: Final = "size=400m"
_LINKS: Final = both_ways("diskd", "target")


class Target:
    """``directory`` holds the repository's file system, a small one where root may mount it."""

    def __init__(self, directory: Path, *, can_lose_power: bool) -> None:
        self.can_lose_power = can_lose_power
        place = directory / "target"
        self.root = place / "repository"
        self._process = DaemonProcess(directory / "target.log")
        self._address = _free_address()
        self.link = _free_address()  # as diskd knows it
        self._control: Address | None = None
        place.mkdir()
        self.disk = SmallDisk(place, _SMALL)
        self.root.mkdir()
        self._place = Place(directory / "target-power", place / "power")
        self._place.make()

    @property
    def is_running(self) -> bool:
        return self._process.is_running

    def log(self) -> str:
        return self._process.log()

    async def start(self) -> None:
        arguments = ["target", "--root", str(self.root), "--listen", str(self._address)]
        place, near = str(self._place.directory), str(self._place.near)
        journal = ("-m", "holdfast.crash.daemon", place, near, str(self.root), "--")
        await self._process.start([*(journal if self.can_lose_power else DISKD), *arguments])

    async def kill(self) -> None:
        await self._process.kill()

    async def stop(self) -> None:
        await self._process.stop()

    def lose_power(self, rng: Random, keep: power.Keep | None = None) -> None:
        """It was killed a moment ago."""
        power.fail(self._place, self.root, rng, keep)

    async def close(self) -> None:
        """Whatever happened."""
        await self._process.close()
        await self.disk.close()

    async def call(self, method: Method[P, R], params: P) -> R:
        """Past the link. Raises CallRefused, or CallFailed where the target is gone."""
        return await call_once(self._address, method, params, seconds_max=CALL_SECONDS_MAX)

    # --- faults

    async def serve_link(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The link's proxy, until cancelled."""
        route = Route("diskd", "target", "tcp", str(self.link), str(self._address))
        config = ProxyConfig(["diskd", "target"], "127.0.0.1:0", [route])
        async with trio.open_nursery() as nursery:
            self._control = await nursery.start(LinkProxies(config).serve)
            task_status.started()

    async def cut(self) -> None:
        """Silence, until ``heal``."""
        await self._link(LINKS_SET, LinkChange(_LINKS, is_cut=True))

    async def reset(self) -> None:
        """Every connection of this moment ends."""
        await self._link(LINKS_RESET, LinkNames(None))

    async def heal(self) -> None:
        await self._link(LINKS_HEAL, LinkNames(None))

    async def _link(self, method: Method[P, R], params: P) -> None:
        assert self._control is not None
        await call_once(self._control, method, params, seconds_max=CALL_SECONDS_MAX)

    # --- what stock tools say

    async def content(self, point: str, disk: str) -> bytes:
        """A disk of a point, read by qemu-img, once that finds the file clean."""
        path = self.root / VM / point / f"{disk}.qcow2"
        return await self.convert(path, "qcow2")

    async def convert(self, path: Path, disk_format: str) -> bytes:
        """What qemu-img reads from a disk's file, once it finds a qcow2 file clean."""
        if disk_format == "qcow2":
            await run("qemu-img", "check", "-q", "-U", str(path))
        out = self.root.parent.parent / "converted.raw"
        try:
            await run("qemu-img", "convert", "-U", "-f", disk_format, "-O", "raw", str(path), str(out))
            return out.read_bytes()
        finally:
            out.unlink(missing_ok=True)

    def left_over(self) -> list[str]:
        """What lies in the repository besides points and the repository's own two files."""
        found = [path.name for path in self.root.iterdir() if path.name not in (VM, ".id", ".lock")]
        points = list((self.root / VM).iterdir()) if (self.root / VM).exists() else []
        found += [path.name for path in points if not path.name.startswith("rp-")]
        for point in points:
            found += [
                f"{point.name}/{path.name}"
                for path in point.iterdir()
                if path.name not in ("manifest.json", "vm.toml", "export.index") and path.suffix != ".qcow2"
            ]
        return sorted(found)


async def run(*argv: str) -> None:
    """Raises Violation where it fails."""
    with trio.fail_after(PROGRAM_SECONDS_MAX):
        done = await trio.run_process(argv, capture_stdout=True, capture_stderr=True, check=False)
    if done.returncode != 0:
        said = (done.stdout + done.stderr).decode(errors="replace")[-1500:]
        raise Violation(f"{' '.join(argv)}: exit {done.returncode}: {said}")


def _free_address() -> Address:
    """For good: a daemon that is started again listens where it did before. Below the ports that the system
    gives to whoever asks for any."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return Address("127.0.0.1", port)

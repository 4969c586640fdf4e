"""A witness and a few real clusterd processes on loopback, for the tests beside this file."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

import attrs
import trio
from diskd_process import new_shared_dir

from clusterd.cli.ctl_client import Cluster
from clusterd.core import calls
from clusterd.core.commands import SetProperty
from daemonkit.ports import Address

DEADLINE_S = 30
POLL_S = 0.05
FAST = {"heartbeat_interval": "100ms", "heartbeat_threshold": "8", "store_session": "2s"}
BIN = Path(sys.executable).parent


def free_ports(count: int, kind: socket.SocketKind) -> list[int]:
    """Ports that were free a moment ago, all different."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket(socket.AF_INET, kind)) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def tail(log: Path) -> str:
    return log.read_text()[-3000:]


async def start(argv: list[str], log: Path) -> tuple[trio.Process, dict[str, Any]]:
    """Start a daemon in a session of its own and read its ready line."""
    with log.open("ab") as errors:
        process = await trio.lowlevel.open_process(
            argv, stdin=DEVNULL, stdout=PIPE, stderr=errors, start_new_session=True
        )
    assert process.stdout is not None
    line = b""
    with trio.move_on_after(DEADLINE_S):
        while not line.endswith(b"\n") and (data := await process.stdout.receive_some()):
            line += data
    assert line, f"{argv[:2]} did not become ready: {tail(log)}"
    await process.stdout.aclose()
    return process, json.loads(line)


@attrs.define
class Member:
    """One node: its files, its address, and its process while it runs."""

    name: str
    directory: Path
    control: str
    config: Path
    process: trio.Process | None = None

    @property
    def log(self) -> Path:
        return self.directory / "clusterd.log"

    def boot(self) -> None:
        """A new boot id, as after a power cut."""
        (self.directory / "boot_id").write_text(secrets.token_hex(8))

    async def start(self) -> None:
        argv = [str(BIN / "clusterd"), "run", "--config", str(self.config)]
        self.process, ready = await start(argv, self.log)
        assert ready["control"] == self.control

    async def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        """End clusterd alone; its VMs go on. Returns the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        with trio.fail_after(DEADLINE_S):
            code = await self.process.wait()
        self.process = None
        return code

    def vm_pids(self) -> list[int]:
        """The processes whose environment says that they run for this node."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    environment = (entry / "environ").read_bytes().split(b"\0")
                    wanted = {f"HOLDFAST_HOST={self.name}".encode(), f"TRIO={self.directory.parent}".encode()}
                    if wanted <= set(environment):
                        found.append(int(entry.name))
        return found

    async def power_off(self) -> None:
        """clusterd and every VM of this node, at once; the next start is a new boot."""
        if self.process is not None:
            await self.kill()
        for pid in self.vm_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.boot()


@attrs.define
class Trio:
    """The cluster. ``ctl`` runs clusterctl against whichever node answers."""

    directory: Path
    members: dict[str, Member]
    store: trio.Process
    diskd: str | None = None
    daemons: list[trio.Process] = attrs.field(factory=list)

    async def ctl(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        addresses = " ".join(member.control for member in self.members.values() if member.process)
        with trio.fail_after(DEADLINE_S):
            return await trio.run_process(
                [str(BIN / "clusterctl"), *words],
                env=os.environ | {"HOLDFAST_NODE": addresses},
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )

    async def diskctl(self, *words: str) -> str:
        assert self.diskd is not None
        argv = [str(BIN / "diskctl"), "--control", self.diskd, *words]
        with trio.fail_after(DEADLINE_S):
            done = await trio.run_process(argv, capture_stdout=True)
        return done.stdout.decode()

    async def ok(self, *words: str) -> str:
        done = await self.ctl(*words)
        assert done.returncode == 0, f"clusterctl {' '.join(words)}: {done.stderr.decode()}"
        return done.stdout.decode()

    def reach(self, of: str | None = None) -> Cluster:
        """What clusterctl would ask, without a process of its own for each of many questions."""
        asked = [self.members[of]] if of else [member for member in self.members.values() if member.process]
        return Cluster(tuple(Address.parse(member.control) for member in asked), None)

    async def status(self, *, of: str | None = None) -> dict[str, Any]:
        return (await self.reach(of).ask(calls.STATUS, calls.Nothing(), repeatable=True)).document

    async def set(self, **properties: str) -> None:
        for name, value in properties.items():
            await self.reach().ask(calls.PROPERTY_SET, SetProperty(name, value), repeatable=False)

    async def until(
        self, holds: Callable[[dict[str, Any]], object], what: str, *, of: str | None = None
    ) -> dict[str, Any]:
        """The first status of which it holds; each wait has a deadline, none has a fixed length."""
        document: dict[str, Any] = {}
        with trio.move_on_after(DEADLINE_S):
            while True:
                document = await self.status(of=of)
                if holds(document):
                    return document
                await trio.sleep(POLL_S)
        logs = {name: tail(member.log) for name, member in self.members.items()}
        raise AssertionError(f"{what} did not come true: {json.dumps(document, indent=1)}\n{logs}")

    def vm_file(self, name: str, *, extra: str = "") -> Path:
        path = self.directory / f"{name}.toml"
        path.write_text(f'name = "{name}"\nargv = ["sleep", "100000"]\nmemory = "16MiB"\n{extra}')
        return path


def all_up(document: dict[str, Any]) -> bool:
    return all(node["state"] == "up" for node in document["nodes"].values()) and bool(document["leader"])


def vm_is(name: str, state: str, **facts: object) -> Callable[[dict[str, Any]], bool]:
    def holds(document: dict[str, Any]) -> bool:
        vm = document["vms"].get(name)
        return vm is not None and vm["state"] == state and all(vm[key] == facts[key] for key in facts)

    return holds


def write_members(
    directory: Path, count: int, witness: str, diskd: dict[str, Any] | None = None
) -> dict[str, Member]:
    names = [f"n{number}" for number in range(1, count + 1)]
    controls = dict(zip(names, free_ports(count, socket.SOCK_STREAM), strict=True))
    beats = dict(zip(names, free_ports(count, socket.SOCK_DGRAM), strict=True))
    (directory / "key").write_text(secrets.token_hex(32))
    members = {}
    for name in names:
        home = directory / name
        home.mkdir()
        text = f"""
name = "{name}"
cluster = "e2e"
key_files = ["../key"]
control = "127.0.0.1:{controls[name]}"
store = ["{witness}"]
memory = "1GiB"
vcpus = 4
data_dir = "data"
boot_id_file = "boot_id"
[[networks]]
name = "a"
listen = "127.0.0.1:{beats[name]}"
"""
        for peer in names:
            if peer != name:
                text += (
                    f'[peers.{peer}]\ncontrol = "127.0.0.1:{controls[peer]}"\n'
                    f'networks.a = "127.0.0.1:{beats[peer]}"\n'
                )
        if diskd is not None:
            text += f'[diskd.main]\nnbd = "{diskd["nbd"]}"\ncontrol = "{diskd["control"]}"\n'
        (home / "node.toml").write_text(text)
        members[name] = Member(name, home, f"127.0.0.1:{controls[name]}", home / "node.toml")
        members[name].boot()
    return members


@contextlib.asynccontextmanager
async def running_trio(directory: Path, count: int = 3, *, disks: bool = False) -> AsyncIterator[Trio]:
    """All of them up with fast heartbeats; afterwards none of them, and none of their VMs, is left.

    ``disks``: with a diskd that every node reaches under the name ``main``.
    """
    os.environ["TRIO"] = str(directory)
    shared = new_shared_dir()
    daemons: list[trio.Process] = []
    members: dict[str, Member] = {}
    try:
        listen = ("--listen", "127.0.0.1:0")
        argv = [str(BIN / "clusterd"), "witness", "--data", str(directory / "store"), *listen]
        store, ready = await start(argv, directory / "witness.log")
        daemons.append(store)
        diskd = await start_diskd(directory, shared, daemons) if disks else None
        members |= write_members(directory, count, ready["url"], diskd)
        cluster = Trio(directory, members, store, diskd["control"] if diskd else None, daemons)
        async with trio.open_nursery() as nursery:
            for member in members.values():
                nursery.start_soon(member.start)
        await cluster.until(lambda document: len(document["nodes"]) == count and all_up(document), "all up")
        await cluster.set(**FAST)
        yield cluster
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + DEADLINE_S):
            for member in members.values():
                await member.power_off()
            for daemon in daemons:
                daemon.kill()
                await daemon.wait()
            shutil.rmtree(shared)


def make_directory(path: Path) -> None:
    path.mkdir()


async def start_diskd(directory: Path, shared: Path, daemons: list[trio.Process]) -> dict[str, Any]:
    make_directory(directory / "diskd")
    argv = [str(BIN / "diskd"), "run", "--root", str(directory / "diskd")]
    argv += ["--nbd", "127.0.0.1:0", "--control", "127.0.0.1:0", "--set", f"shared_dir={shared}"]
    process, ready = await start(argv, directory / "diskd.log")
    daemons.append(process)
    return ready

"""A lab: a whole cluster of separate processes on one machine, every link of it through the proxies.

    lab up      proxy, then store, diskd and target, then the nodes; done when every node is up
    lab down    the nodes, their VMs, diskd and target, the store, the proxy: whatever carries this lab's id

Each method is one verb of the command line, and needs the lab's lock (``Lab.locked``) if it changes
processes. A killed *host* has no power: its links fall silent first, then its clusterd and its VMs die,
and when it is started again it has a new boot id.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from clusterd.core.calls import HOLD_RELEASE, PROPERTY_SET
from clusterd.core.commands import ReleaseHold, SetProperty
from daemonkit.cli import call_once
from daemonkit.durable import replace_file
from daemonkit.errors import OperatorError
from daemonkit.methods import Method
from daemonkit.ports import Address
from daemonkit.rpc import CallFailed
from daemonkit.schema import unstructure
from daemonkit.units import SECOND, format_duration, parse_duration
from holdfast.lab import links, processes, state, views
from holdfast.lab.layout import Layout, node_document, plan, to_toml
from holdfast.lab.links import DISKD, STORAGE, STORE, TARGET, Link, LinkChange, LinkNames, LinkReport, Power
from holdfast.lab.processes import ProcessRecord
from holdfast.lab.state import PROXY, LabState

UP_SECONDS_MAX: Final = 60.0
KEY_BYTES: Final = 32
# A lab shows in seconds what a real cluster does in minutes; the session follows from the first two.
LAB_PROPERTIES: Final = {"heartbeat_interval": "200ms", "heartbeat_threshold": "5"}
SESSION_NS_MIN: Final = 2 * SECOND


@attrs.frozen
class UpOptions:
    """``properties``: name -> value, over the lab's own defaults. ``diskd_per_node``: see layout.Layout."""

    nodes: int = 3
    networks: int = 1
    properties: dict[str, str] = attrs.field(factory=dict)
    seed: int = 0
    diskd_per_node: bool = False


def effective_properties(given: dict[str, str]) -> dict[str, str]:
    """The lab's defaults, what was given, and store_session = max(2 s, 2 × isolation time) unless given."""
    properties = {**LAB_PROPERTIES, **given}
    if "store_session" not in properties:
        with contextlib.suppress(ValueError):  # clusterd says better what is wrong with a value
            interval_ns = parse_duration(properties["heartbeat_interval"])
            isolation_ns = interval_ns * int(properties["heartbeat_threshold"])
            properties["store_session"] = format_duration(max(SESSION_NS_MIN, 2 * isolation_ns))
    return properties


@attrs.define
class Lab:
    """One lab that was brought up: its directory and what is remembered of it."""

    directory: Path
    state: LabState

    @classmethod
    def load(cls, directory: Path) -> "Lab":
        """The lab in ``directory``, up or down. Raises OperatorError."""
        directory = Path(os.path.abspath(directory))  # the processes have other working directories
        return cls(directory, state.read_state(directory))

    @property
    def layout(self) -> Layout:
        return self.state.layout

    @property
    def nodes(self) -> list[str]:
        return self.layout.nodes

    @property
    def is_up(self) -> bool:
        return self.state.pid(PROXY) is not None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Alone, and with what the previous command left in state.json."""
        descriptor = state.lock_directory(self.directory)
        try:
            self.state = state.read_state(self.directory)
            yield
        finally:
            os.close(descriptor)

    def require_up(self) -> None:
        if not self.is_up:
            raise OperatorError(f"the lab in {self.directory} is down: `lab up` brings one up")

    def document(self) -> dict[str, Any]:
        """What lab.json says."""
        return state.lab_document(self.state)

    def environment(self) -> dict[str, str]:
        """The three variables that stand for --node, --control and --target.

        The target is named as diskd reaches it, since it is diskd that dials it for a backup: so
        `lab cut diskd target` cuts a backup that was started with these.
        """
        direct = self.layout.direct
        return {
            "HOLDFAST_NODE": ",".join(direct[f"{node}.control"] for node in self.nodes),
            "HOLDFAST_DISKD": direct["diskd.control"],
            "HOLDFAST_TARGET": self.layout.proxied(DISKD, "target"),
        }

    # ---- starting

    async def start_process(self, name: str) -> None:
        """Start one of proxy, store, diskd, target, or a node's clusterd (by the node's name)."""
        if self.state.pid(name) is not None:
            raise OperatorError(f"{name} runs already")
        record = await processes.spawn(
            name,
            self._argv(name),
            log=self.directory / "log" / f"{name}.log",
            environment={
                **os.environ,
                processes.LAB_ID: self.state.lab_id,
                "HOLDFAST_KEY_FILE": str(self.directory / "key"),
            },
        )
        self._remember({**self.state.processes, name: record})

    def _argv(self, name: str) -> list[str]:
        direct, directory = self.layout.direct, self.directory
        if name == PROXY:
            return [
                *processes.interpreter(),
                "-m",
                "holdfast.lab.proxy",
                "--config",
                str(directory / "proxy.json"),
            ]
        if name == STORE:
            data = str(directory / "store")
            return [*processes.program("clusterd"), "witness", "--data", data, "--listen", direct["store"]]
        if name == DISKD or name.endswith(f".{DISKD}"):
            listen = ["--nbd", direct[f"{name}.nbd"], "--control", direct[f"{name}.control"]]
            settings: dict[str, str | Path] = {"shared_dir": self._shared_dir(name)}
            if name != DISKD:
                node = name.partition(".")[0]
                settings |= {"daemon_name": node, "host_name": node}
                settings |= {f"{kind}_file": directory / node / kind for kind in ("boot_id", "machine_id")}
            chosen = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
            return [*processes.program("diskd"), "run", "--root", str(directory / "diskd"), *listen, *chosen]
        if name == TARGET:
            root = str(directory / "target")
            return [*processes.program("diskd"), "target", "--root", root, "--listen", direct["target"]]
        return [*processes.program("clusterd"), "run", "--config", str(directory / name / "node.toml")]

    def _shared_dir(self, diskd: str) -> Path:
        """Of the lab's own diskd, or of a node's: that of a host is gone when the host is."""
        node, _, rest = diskd.partition(".")
        return self.state.shared_dir / node if rest else self.state.shared_dir

    def _node_diskds(self, node: str) -> list[str]:
        return [f"{node}.{DISKD}"] if self.layout.diskd_per_node else []

    def _remember(self, records: dict[str, ProcessRecord]) -> None:
        self.state = attrs.evolve(self.state, processes=records)
        state.write_state(self.directory, self.state)

    def _forget(self, names: list[str]) -> None:
        self._remember({name: record for name, record in self.state.processes.items() if name not in names})

    def _boot(self, node: str) -> None:
        """A host that is switched on has a boot id of its own, and nothing in memory."""
        replace_file(self.directory / node / "boot_id", f"{uuid.uuid4()}\n".encode())
        for diskd in self._node_diskds(node):
            shutil.rmtree(self._shared_dir(diskd), ignore_errors=True)
            self._shared_dir(diskd).mkdir()

    # ---- links

    async def _proxy(self, method: Method[Any, LinkReport], params: object) -> LinkReport:
        self.require_up()
        return await call_once(Address.parse(self.layout.direct["proxy"]), method, params)

    async def change_links(self, change: LinkChange) -> LinkReport:
        if change.network is not None and change.network not in self.layout.networks:
            raise OperatorError(
                f"no network {change.network!r} (there are {', '.join(self.layout.networks)})"
            )
        return await self._proxy(links.LINKS_SET, change)

    async def cut(self, a: str, b: str, *, one_way: bool = False, network: str | None = None) -> LinkReport:
        chosen = [Link(a, b)] if one_way else links.both_ways(a, b)
        return await self.change_links(LinkChange(chosen, network=network, is_cut=True))

    async def isolate(self, node: str, *, storage: bool = False) -> LinkReport:
        """Cut every link of a node; those to diskd and target only with ``storage``."""
        self.check_node(node)
        chosen = links.links_of(node, self.layout.ends, without=() if storage else STORAGE)
        return await self.change_links(LinkChange(chosen, is_cut=True))

    async def heal(self, a: str | None = None, b: str | None = None) -> LinkReport:
        """All links; all of one end; or those between two."""
        chosen = None
        if a is not None:
            chosen = links.links_of(a, self.layout.ends) if b is None else links.both_ways(a, b)
        return await self._proxy(links.LINKS_HEAL, LinkNames(chosen))

    async def reset(self, a: str, b: str) -> LinkReport:
        return await self._proxy(links.LINKS_RESET, LinkNames(links.both_ways(a, b)))

    async def link_report(self) -> LinkReport:
        return await self._proxy(links.LINKS_SHOW, LinkNames(None))

    async def power(self, node: str, *, is_on: bool) -> LinkReport:
        return await self._proxy(links.LINKS_POWER, Power(node, is_on))

    # ---- processes

    def check_node(self, node: str) -> None:
        if node not in self.nodes:
            raise OperatorError(f"no node {node!r} in this lab (there are {', '.join(self.nodes)})")

    def vm_processes(self, node: str, vm: str | None = None) -> list[ProcessRecord]:
        """What runs as a VM of this node, of whatever run."""
        return [
            one.record
            for one in processes.marked(self.state.lab_id)
            if one.host == node and one.vm is not None and vm in (None, one.vm)
        ]

    def records_of(self, process: str) -> list[ProcessRecord]:
        """The live processes that PROCESS means: n1, n1.clusterd, n1.VM, diskd, store, target."""
        name, _, part = process.partition(".")
        if name in self.nodes and part and part != "clusterd" and process not in self._node_diskds(name):
            found = self.vm_processes(name, part)
            if not found:
                raise OperatorError(f"no VM {part!r} runs on {name}")
            return found
        names = [self._name(process)]
        if name in self.nodes and not part:
            names += self._node_diskds(name)
        own = [record for record in map(self.state.processes.get, names) if record]
        if name in self.nodes and not part:
            own += self.vm_processes(name)
        alive = [record for record in own if processes.lives(record)]
        if not alive:
            raise OperatorError(f"{process} does not run")
        return alive

    def _name(self, process: str) -> str:
        """The process that the lab itself starts for PROCESS. Raises OperatorError for anything else."""
        name, dot, part = process.partition(".")
        if name in self.nodes and part in ("", "clusterd") and (part or not dot):
            return name
        if name in self.nodes and process in self._node_diskds(name):
            return process
        if name == STORE and part:
            raise OperatorError(f"{process}: this lab's store is one process, `store`")
        if process in (STORE, DISKD, TARGET):
            return process
        known = "NODE, NODE.clusterd, NODE.VM, diskd, store or target"
        raise OperatorError(f"{process!r} is no process of this lab: use {known}")

    async def kill(self, process: str) -> None:
        """kill -9. A whole host falls silent first, so that nobody is told."""
        records = self.records_of(process)
        if process in self.nodes:
            await self.power(process, is_on=False)
        for record in records:
            processes.send(record, signal.SIGKILL)
        if await processes.wait_gone(records, 10.0):
            raise OperatorError(f"{process} does not end even when killed")
        with contextlib.suppress(OperatorError):
            host = self._node_diskds(process) if process in self.nodes else []
            self._forget([self._name(process), *host])

    async def start(self, process: str) -> None:
        """Start again what was killed, at its old addresses; a host boots anew."""
        name, _, part = process.partition(".")
        if name in self.nodes and part and part != "clusterd" and process not in self._node_diskds(name):
            raise OperatorError(f"{process}: a VM is started by the cluster: `clusterctl vm start {part}`")
        own = self._name(process)
        is_off = own in (await self.link_report()).off
        if process in self.nodes:
            if self.state.pid(own) is not None:
                raise OperatorError(f"{process} runs already")
            self._boot(process)
            await self.power(process, is_on=True)
            for diskd in self._node_diskds(process):
                await self.start_process(diskd)
        elif is_off:
            raise OperatorError(f"host {own} has no power: `lab start {own}` switches it on")
        await self.start_process(own)

    async def pause(self, process: str) -> None:
        for record in self.records_of(process):
            processes.send(record, signal.SIGSTOP)

    async def resume(self, process: str) -> None:
        for record in self.records_of(process):
            processes.send(record, signal.SIGCONT)

    # ---- the cluster

    @property
    def controls(self) -> list[str]:
        return [self.layout.direct[f"{node}.control"] for node in self.nodes]

    async def answers(self) -> list[views.Status]:
        return await views.ask_all(
            self.layout.direct[f"{node}.control"] for node in self.nodes if self.state.pid(node) is not None
        )

    async def cluster_status(self, *, but: str | None = None) -> views.Status:
        """What the cluster says; ``but``: as somebody else than this node sees it."""
        status = views.best(await self.answers(), but=but)
        if status is None:
            raise views.NotReached("no node answers")
        return status

    async def wait_up(self, seconds_max: float = UP_SECONDS_MAX) -> None:
        """Until every node is up, as every node sees it. Raises OperatorError."""
        answers: list[views.Status] = []
        with trio.move_on_after(seconds_max):
            while True:
                answers = await self.answers()
                if views.all_up(answers, self.nodes):
                    return
                await trio.sleep(views.POLL_SECONDS)
        missing = views.describe_missing(answers, self.nodes)
        raise OperatorError(
            f"the cluster is not up after {seconds_max:g} s: {missing}; see {self.directory}/log"
        )

    async def ask_cluster(self, method: Method[Any, Any], params: object) -> Any:
        """A command to the first node that answers at all; its refusal is final."""
        last: CallFailed | None = None
        for control in self.controls:
            try:
                return await call_once(Address.parse(control), method, params)
            except CallFailed as error:
                last = error
        raise last or views.NotReached("the lab has no nodes")

    async def release_hold(self, hold_id: str) -> None:
        """``clusterctl hold release``, at a node that is not cut off. Raises OperatorError."""
        node = (await self.cluster_status())["answered_by"]
        control = Address.parse(self.layout.direct[f"{node}.control"])
        await call_once(control, HOLD_RELEASE, ReleaseHold(hold_id))

    async def set_properties(self, properties: dict[str, str]) -> None:
        for name, value in properties.items():
            await self.ask_cluster(PROPERTY_SET, SetProperty(name, value))

    # ---- the end

    async def down(self) -> None:
        """End everything that carries this lab's id, gently where possible; harmless when it is down."""
        records = self.state.processes
        own = {name: record for name, record in records.items() if processes.lives(record)}
        await processes.end([own[node] for node in self.nodes if node in own], seconds_max=5.0)
        known = set(own.values())
        vms = [one.record for one in processes.marked(self.state.lab_id) if one.record not in known]
        await processes.end(vms, seconds_max=3.0)
        diskds = [diskd for node in self.nodes for diskd in self._node_diskds(node)]
        for names in ((*diskds, DISKD, TARGET), (STORE,), (PROXY,)):
            await processes.end([own[name] for name in names if name in own], seconds_max=10.0)
        await processes.end([one.record for one in processes.marked(self.state.lab_id)], seconds_max=1.0)
        self._remember({})
        shutil.rmtree(self.state.shared_dir, ignore_errors=True)
        (self.directory / "lab.json").unlink(missing_ok=True)


def prepare_directory(directory: Path) -> None:
    """An empty directory, or one whose lab is down: then what that lab left is removed."""
    if directory.exists() and not directory.is_dir():
        raise OperatorError(f"{directory} is not a directory")
    if (directory / "state.json").exists():
        old = Lab.load(directory)
        if processes.marked(old.state.lab_id):
            raise OperatorError(f"a lab is up in {directory}: `lab down` first, or use another --dir")
        shutil.rmtree(old.state.shared_dir, ignore_errors=True)
        for entry in directory.iterdir():
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    elif directory.exists() and any(entry.name != "lock" for entry in directory.iterdir()):
        raise OperatorError(f"{directory} is not empty, and no lab: choose another --dir")


def _write_files(directory: Path, layout: Layout, seed: int) -> None:
    for name in ("log", "store", "diskd", "target", "guests", *layout.nodes):
        (directory / name).mkdir(exist_ok=True)
    key = directory / "key"
    replace_file(key, secrets.token_hex(KEY_BYTES).encode() + b"\n", mode=0o600)
    replace_file(directory / "proxy.json", json.dumps(unstructure(layout.proxy_config(seed))).encode())
    for node in layout.nodes:
        home = directory / node
        document = node_document(
            layout, node, key_file=str(key), data_dir=str(home), boot_id_file=str(home / "boot_id")
        )
        replace_file(home / "node.toml", to_toml(document).encode())
        replace_file(home / "machine_id", f"{uuid.uuid4().hex}\n".encode())


@contextlib.asynccontextmanager
async def _undone_on_failure(lab: Lab) -> AsyncIterator[None]:
    """A lab comes up whole, or leaves no process behind (its logs stay)."""
    try:
        yield
    except BaseException:
        with trio.move_on_after(60, shield=True):
            await lab.down()
        raise


async def bring_up(directory: Path, options: UpOptions, *, is_remembered: bool = True) -> Lab:
    """A new lab in ``directory``, every node up. Raises OperatorError, nothing left running.

    ``is_remembered``: it becomes the lab that commands without --dir mean.
    """
    directory = Path(os.getcwd()) / directory
    ports = processes.free_ports(secrets.randbelow)
    layout = plan(options.nodes, options.networks, ports, diskd_per_node=options.diskd_per_node)
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = state.lock_directory(directory)
    try:
        prepare_directory(directory)
        _write_files(directory, layout, options.seed)
        lab = Lab(directory, LabState(uuid.uuid4().hex, layout))
        if is_remembered:
            state.remember_directory(directory)  # also if this is interrupted: `lab down` then finds it
        async with _undone_on_failure(lab):
            lab.state.shared_dir.mkdir()
            await lab.start_process(PROXY)
            for node in lab.nodes:
                lab._boot(node)
            diskds = [diskd for node in lab.nodes for diskd in lab._node_diskds(node)]
            await _start_all(lab, [STORE, DISKD, *diskds, TARGET])
            await _start_all(lab, lab.nodes)
            await lab.wait_up()
            await lab.set_properties(effective_properties(options.properties))
            await lab.wait_up()
        return lab
    finally:
        os.close(descriptor)


async def _start_all(lab: Lab, names: list[str]) -> None:
    """At once: most of their time is the interpreter's start."""
    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(lab.start_process, name)

"""``clusterd run``: puts one node together, and takes it apart again without touching a VM.

Start: the data directory is locked, the state file read and durably given the next incarnation, sockets
are bound; then the core begins. Shutdown (SIGTERM, SIGINT) is the goodbye ``restart``: the core tells the
cluster, then the process ends and its VMs go on. The nurseries nest so that what others need stops last:
store and driver outlive the acts, the acts outlive the loop.
"""

import contextlib
import os
import secrets
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import structlog
import trio

from clusterd.config import NodeConfig
from clusterd.core.events import ShutdownRequested
from clusterd.core.node import NodeCore
from clusterd.core.state import NodeState, begin_incarnation, decode_state, encode_state
from clusterd.core.types import Identity
from clusterd.shell.acts import Acts
from clusterd.shell.control import Control
from clusterd.shell.diskds import Diskds
from clusterd.shell.drivers.port import Surroundings
from clusterd.shell.drivers.process import ProcessDriver
from clusterd.shell.event_log import EventLog
from clusterd.shell.loop import CoreLoop
from clusterd.shell.picture_file import PictureFile, read_picture
from clusterd.shell.recovery import StoreRecovery
from clusterd.shell.store import StoreClient
from clusterd.shell.udp import Heartbeats
from daemonkit.cli import read_key
from daemonkit.durable import lock_file, read_small_file, replace_file
from daemonkit.errors import OperatorError
from daemonkit.ports import Address
from daemonkit.rpc import serve
from daemonkit.service import notify_stopping

STATE_BYTES_MAX: Final = 64 << 20
BOOT_ID_BYTES_MAX: Final = 128
PICTURE_NAME: Final = "picture.json"
GOODBYE_SECONDS_MAX: Final = 4.0  # the core says Exit within 3 s

log = structlog.get_logger("daemon")


@attrs.frozen
class Node:
    """What is fixed once the node's files have been read."""

    identity: Identity
    state: NodeState
    state_path: Path


def prepare(config: NodeConfig) -> Node:
    """Read keys, boot id and state; durably begin the next incarnation. Raises OperatorError."""
    keys = tuple(key for path in config.key_files if (key := read_key(str(path))) is not None)
    state_path = config.data_dir / "state.json"
    try:
        document: bytes | None = read_small_file(state_path, size_bytes_max=STATE_BYTES_MAX)
    except FileNotFoundError:
        document = None
    try:
        state = begin_incarnation(decode_state(document))
    except OperatorError as error:
        raise OperatorError(f"{state_path}: {error}") from error
    replace_file(state_path, encode_state(state))
    identity = Identity(
        name=config.name,
        cluster=config.cluster,
        boot_id=_boot_id(config.boot_id_file),
        keys=keys,
        peers=tuple(sorted(config.peers)),
        networks=tuple(config.networks),
        memory_bytes=config.memory_bytes,
        vcpus=config.vcpus,
        has_references=bool(config.reference_addresses),
        control=str(config.control),
        fresh_id=secrets.token_hex(16),
    )
    return Node(identity, state, state_path)


def _boot_id(path: Path) -> str:
    try:
        text = read_small_file(path, size_bytes_max=BOOT_ID_BYTES_MAX).decode("ascii").strip()
    except OSError as error:
        raise OperatorError(f"boot_id_file {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        text = ""
    if not text or not text.isprintable():
        raise OperatorError(f"boot_id_file {path}: holds no boot id")
    return text


@contextlib.contextmanager
def _claimed(data_dir: Path) -> Iterator[None]:
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = lock_file(data_dir / "lock")
    except OSError as error:
        raise OperatorError(f"data_dir {data_dir}: cannot be used: {error.strerror}") from error
    try:
        yield
    finally:
        os.close(lock)


def _heartbeats(config: NodeConfig, wake: Callable[[], None]) -> Heartbeats:
    peers: dict[str, list[Address]] = {network: [] for network in config.networks}
    for peer in config.peers.values():
        for network, address in peer.networks.items():
            peers[network].append(address)
    return Heartbeats(config.networks, peers, wake)


@contextlib.asynccontextmanager
async def _store(config: NodeConfig) -> AsyncIterator[StoreClient]:
    client = StoreClient(config.store)
    try:
        yield client
    finally:
        with trio.move_on_after(1, shield=True):
            await client.aclose()


async def run_node(config: NodeConfig, announce: Callable[..., Any]) -> None:
    """Serve until told to end; ``announce`` is called once with the bound addresses."""
    with _claimed(config.data_dir):
        node = prepare(config)
        kept = read_picture(config.data_dir / PICTURE_NAME)
        core = NodeCore(node.identity, node.state, kept)
        loop = CoreLoop(core, node.state_path)
        with contextlib.closing(_heartbeats(config, loop.wake)) as heartbeats:
            async with _store(config) as store:
                await _run(config, node, core, loop, heartbeats, store, announce)


async def _run(
    config: NodeConfig,
    node: Node,
    core: NodeCore,
    loop: CoreLoop,
    heartbeats: Heartbeats,
    store: StoreClient,
    announce: Callable[..., Any],
) -> None:
    key = node.identity.keys[0]
    event_log = EventLog(config.name)
    diskds = Diskds(config.diskd, key)
    nbd = {name: addresses.nbd for name, addresses in config.diskd.items()}
    recovery = StoreRecovery(core, store, diskds, config.peers, key)
    control = Control(core, loop, event_log, diskds, recovery, peers=config.peers, key=key)
    picture_file = PictureFile(config.data_dir / PICTURE_NAME)

    async def serve_control(task_status: trio.TaskStatus[Address]) -> None:
        await serve(control.registry(), config.control, keys=node.identity.keys, task_status=task_status)

    with contextlib.ExitStack() as closing:
        async with trio.open_nursery() as supervisor:
            driver = ProcessDriver(config.data_dir, Surroundings(config.name, nbd), loop.post, supervisor)
            closing.callback(driver.close)
            await supervisor.start(_until_signalled, loop)
            supervisor.start_soon(heartbeats.receive)
            supervisor.start_soon(picture_file.run)
            bound = await supervisor.start(serve_control)
            async with trio.open_nursery() as acts_nursery:
                acts = Acts(
                    config,
                    store,
                    diskds,
                    driver,
                    event_log,
                    key=key,
                    post=loop.post,
                    answer_command=control.answer_command,
                    keep_picture=picture_file.keep,
                    acts_nursery=acts_nursery,
                )
                log.info("clusterd.serving", node=config.name, incarnation=node.state.incarnation)
                announce(
                    control=str(bound),
                    node=config.name,
                    incarnation=node.state.incarnation,
                    networks=heartbeats.addresses,
                )
                reason = await loop.run(heartbeats, acts.carry_out)
                log.info("clusterd.exit", reason=reason)
                acts_nursery.cancel_scope.cancel(reason="exit")
            supervisor.cancel_scope.cancel(reason="exit")


async def _until_signalled(
    loop: CoreLoop, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """The first signal asks the core for its goodbye; a second one, or none said in time, ends it at once."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        await anext(signals)
        notify_stopping("saying goodbye to the cluster")
        loop.post(ShutdownRequested())
        with trio.move_on_after(GOODBYE_SECONDS_MAX):
            await anext(signals)
        loop.end("no goodbye could be said")

"""Guests worth protecting: a VM that keeps a journal on its disk, and the verdict on it afterwards.

    add     an image and a VM of one name, running the journal guest; done when it is online and has written
    check   copy the acknowledgements, then freeze the disk with a checkpoint of our own, compare, discard it

The order in ``check`` matters: everything in the copy was flushed before the checkpoint was cut, so all of
it has to be there, while the guest runs on.
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from clusterd.core.calls import VM_ADD, VmFile
from daemonkit.durable import replace_file
from daemonkit.errors import OperatorError
from daemonkit.rpc import CallRefused
from daemonkit.units import MiB
from holdfast.checker.disk import open_disk
from holdfast.checker.verdict import Verdict, judge
from holdfast.guest.acks import ACKS_BYTES_MAX, AcksError, parse_acks
from holdfast.guest.journal import JournalError
from holdfast.guest.nbd import NbdError
from holdfast.lab import processes
from holdfast.lab.cluster import Lab
from holdfast.lab.layout import DISKD_NAME, to_toml

DISK: Final = "journal"
ONLINE_SECONDS_MAX: Final = 30.0
TOOL_SECONDS_MAX: Final = 60.0
POLL_SECONDS: Final = 0.05


@attrs.frozen
class GuestOptions:
    """``rate``: records per second; ``size_load``: extra blocks of 4 KiB per second. ``disks``: at least one;
    the journal is on the first, the others stay as they are."""

    on: str | None = None
    size_bytes: int = 64 * MiB
    rate: float = 50.0
    size_load: float = 0.0
    memory: str = "64MiB"
    disks: int = 1
    priority: int = 0
    resiliency_period: str | None = None


async def run_tool(lab: Lab, name: str, *argv: str) -> str:
    """stdout of one of our command lines, with the lab's addresses. Raises OperatorError with its line."""
    environment = {**os.environ, **lab.environment(), "HOLDFAST_KEY_FILE": str(lab.directory / "key")}
    try:
        with trio.fail_after(TOOL_SECONDS_MAX):
            done = await trio.run_process(
                [*processes.program(name), *argv],
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                env=environment,
            )
    except trio.TooSlowError as error:
        raise OperatorError(f"{name} {argv[0]} did not finish within {TOOL_SECONDS_MAX:g} s") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise OperatorError(said[-1] if said else f"{name} {' '.join(argv)} exited {done.returncode}")
    return done.stdout.decode(errors="replace")


def acks_path(lab: Lab, name: str) -> Path:
    """Outside the image, and the same file for every node of the lab."""
    return lab.directory / "guests" / f"{name}.acks"


def vm_document(lab: Lab, name: str, options: GuestOptions) -> dict[str, Any]:
    """The VM file of a guest."""
    argv = [sys.executable, "-m", "holdfast.guest", "--disk", f"{{disk:{DISK}}}"]
    argv += ["--acks", str(acks_path(lab, name)), "--epoch", "{epoch}", "--node", "{node}"]
    argv += ["--rate", f"{options.rate:g}", "--size-load", f"{options.size_load:g}"]
    document: dict[str, Any] = {
        "name": name,
        "driver": "process",
        "argv": argv,
        "memory": options.memory,
        "vcpus": 1,
        "priority": options.priority,
    }
    if options.on is not None:
        document["preferred_nodes"] = [options.on]
    if options.resiliency_period is not None:
        document["resiliency_period"] = options.resiliency_period
    document["disks"] = [
        {"name": DISK if number == 0 else f"disk{number}", "image": image, "diskd": DISKD_NAME}
        for number, image in enumerate(image_names(name, options.disks))
    ]
    return document


def image_names(name: str, disks: int) -> list[str]:
    return [name if number == 0 else f"{name}-{number}" for number in range(disks)]


async def add_guest(lab: Lab, name: str, options: GuestOptions) -> dict[str, Any]:
    """Create, start, wait until it writes; its entry in the cluster's status. Raises OperatorError."""
    lab.require_up()
    if options.on is not None:
        lab.check_node(options.on)
    if options.disks < 1:
        raise OperatorError("a guest has at least one disk, for its journal")
    path = acks_path(lab, name)
    if path.exists():
        raise OperatorError(f"a guest {name!r} was added before: choose another name")
    images: list[str] = []
    refused: CallRefused | None = None
    try:
        for image in image_names(name, options.disks):
            await run_tool(lab, "diskctl", "image", "create", image, str(options.size_bytes))
            images.append(image)
        path.touch()
        text = to_toml(vm_document(lab, name, options))
        replace_file(lab.directory / "guests" / f"{name}.toml", text.encode())
        await lab.ask_cluster(VM_ADD, VmFile(text))
    except CallRefused as error:
        refused = error
    if refused is not None:
        path.unlink(missing_ok=True)
        for image in images:
            with contextlib.suppress(OperatorError):
                await run_tool(lab, "diskctl", "image", "delete", image)
        raise refused
    return await _wait_writing(lab, name)


async def _wait_writing(lab: Lab, name: str) -> dict[str, Any]:
    vm: dict[str, Any] = {}
    with trio.move_on_after(ONLINE_SECONDS_MAX):
        while True:
            vm = (await lab.cluster_status())["vms"].get(name, {})
            if vm.get("state") == "online" and acks_path(lab, name).stat().st_size:
                return vm
            await trio.sleep(POLL_SECONDS)
    seen = f"{vm.get('state')}: {vm.get('reason')}" if vm else "not in the cluster's status"
    raise OperatorError(f"guest {name} does not write after {ONLINE_SECONDS_MAX:g} s ({seen})")


async def _diskd_of(lab: Lab, image: str) -> tuple[str, str]:
    """Where the diskd that has an image now is asked, and serves it."""
    direct = lab.layout.direct
    if lab.layout.diskd_per_node:
        shown = json.loads(await run_tool(lab, "diskctl", "image", "show", image, "--json"))
        owner = shown["owner"] or {}
        for node in lab.nodes:
            if owner.get("control") == direct[f"{node}.diskd.control"]:
                return direct[f"{node}.diskd.control"], direct[f"{node}.diskd.nbd"]
    return direct["diskd.control"], direct["diskd.nbd"]


async def check_guest(lab: Lab, name: str) -> Verdict:
    """The verdict on everything that the guest has acknowledged until now. Raises OperatorError."""
    lab.require_up()
    path = acks_path(lab, name)
    try:
        with path.open("rb") as file:
            data = file.read(ACKS_BYTES_MAX)
        lines = parse_acks(data)
    except FileNotFoundError:
        raise OperatorError(f"no guest {name!r} was added: `lab guest add {name}`") from None
    except AcksError as error:
        raise OperatorError(f"{path}: {error}") from error
    control, nbd = await _diskd_of(lab, name)
    ask = ("--control", control, "checkpoint")
    begun = await run_tool(lab, "diskctl", *ask, "begin", "--vm", name, "--image", name, "--json")
    checkpoint = json.loads(begun)
    try:
        uri = f"nbd://{nbd}/{checkpoint['exports'][name]}"

        def compare() -> Verdict:
            with open_disk(uri) as disk:
                return judge(lines, disk.read, disk.size_bytes)

        return await trio.to_thread.run_sync(compare)
    except (NbdError, JournalError, OSError) as error:
        raise OperatorError(f"guest {name}: its disk cannot be read: {error}") from error
    finally:
        with trio.move_on_after(TOOL_SECONDS_MAX, shield=True):
            await run_tool(lab, "diskctl", *ask, "end", checkpoint["checkpoint"], "--discard")

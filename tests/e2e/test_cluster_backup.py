"""Backups through the cluster: they follow the VM over a move and a failover, and bring it back."""

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from lab_until import until

from daemonkit.errors import OperatorError
from daemonkit.units import MILLISECOND
from holdfast.guest.acks import parse_acks
from holdfast.lab import links, processes
from holdfast.lab.cluster import Lab
from holdfast.lab.guests import GuestOptions, acks_path, add_guest, check_guest, run_tool
from holdfast.lab.links import LinkChange

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
OPTIONS = GuestOptions(on="n1", size_bytes=32 << 20, rate=50.0, size_load=50.0)


async def vm_until(lab: Lab, name: str, **wanted: Any) -> dict[str, Any]:
    """The VM's entry, once it is as wanted."""

    async def seen() -> dict[str, Any] | None:
        entry: dict[str, Any] = (await lab.cluster_status())["vms"].get(name) or {}
        return entry if all(entry.get(key) == value for key, value in wanted.items()) else None

    found: dict[str, Any] = await until(f"{name} is {wanted}", seen)
    return found


async def written(lab: Lab, more: int = 5) -> None:
    """The guest has acknowledged some more."""
    known = len(parse_acks(acks_path(lab, "web").read_bytes()))

    async def seen() -> bool:
        return len(parse_acks(acks_path(lab, "web").read_bytes())) >= known + more

    await until("the guest writes", seen)


async def ctl(lab: Lab, *argv: str) -> dict[str, Any]:
    """The last line of JSON of ``clusterctl``."""
    result: dict[str, Any] = json.loads((await run_tool(lab, "clusterctl", *argv, "--json")).splitlines()[-1])
    return result


@asynccontextmanager
async def backing_up(lab: Lab) -> AsyncIterator[trio.Process]:
    """`clusterctl vm backup web` that has frozen the disks, and whose way to the target was then cut."""
    slow = LinkChange(links.both_ways("diskd", "target"), delay_ns=300 * MILLISECOND)
    await lab.change_links(slow)
    process = await trio.lowlevel.open_process(
        [*processes.program("clusterctl"), "vm", "backup", "web", "--json"],
        stdout=-1,
        stderr=-1,
        env={**os.environ, **lab.environment(), "HOLDFAST_KEY_FILE": str(lab.directory / "key")},
    )
    try:
        assert process.stdout is not None
        seen = b""
        with trio.fail_after(25):
            while b'"frozen"' not in seen:
                data = await process.stdout.receive_some()
                assert data, (seen, await process.stderr.receive_some() if process.stderr else b"")
                seen += data
        await lab.cut("diskd", "target")
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            await trio.aclose_forcefully(stream)


@pytest.mark.lab(nodes=3, properties={"resiliency_period": "2s"})
async def test_backups_follow_the_vm_and_restore_it(lab: Lab, tmp_path: Path) -> None:
    first = await add_guest(lab, "web", OPTIONS)
    full = await ctl(lab, "vm", "backup", "web")
    assert (full["kind"], full["base"], full["vm"]) == ("full", None, "web")

    await run_tool(lab, "clusterctl", "vm", "move", "web", "n2")
    moved = await vm_until(lab, "web", state="online", owner="n2")
    assert moved["epoch"] > first["epoch"]
    await written(lab)
    after_move = await ctl(lab, "vm", "backup", "web", "--compress")  # passed on by the node that is asked
    assert all(disk["sent_bytes"] < disk["changed_bytes"] for disk in after_move["disks"])
    assert (after_move["kind"], after_move["base"]) == ("differential", full["point"])
    assert all(disk["exact"] for disk in after_move["disks"])

    # A failover in the middle of a backup: that one fails and says why; nothing of the tracking is lost.
    async with backing_up(lab) as process:
        await lab.kill("n2")
        await vm_until(lab, "web", state="online", owner="n1")
        assert process.stderr is not None
        said = b""
        with trio.fail_after(30):
            while data := await process.stderr.receive_some():
                said += data
            assert await process.wait() == 1
        assert said.count(b"\n") == 1 and b"run it again" in said, said
    await lab.heal()
    await lab.start("n2")
    await written(lab)
    await until("the given up checkpoint is merged", lambda: no_checkpoint(lab))
    after_failover = await ctl(lab, "vm", "backup", "web")
    assert (after_failover["kind"], after_failover["base"]) == ("differential", after_move["point"])
    assert all(disk["exact"] for disk in after_failover["disks"])
    await _restored(lab, tmp_path)


async def no_checkpoint(lab: Lab) -> bool:
    return json.loads(await run_tool(lab, "diskctl", "checkpoint", "list", "--json")) == []


async def _restored(lab: Lab, tmp_path: Path) -> None:
    """Beside the running one, then in its place."""
    await run_tool(lab, "clusterctl", "vm", "stop", "web")
    await vm_until(lab, "web", state="offline")
    last = await ctl(lab, "vm", "backup", "web")  # of a VM that runs nowhere
    assert last["kind"] == "differential"
    with pytest.raises(OperatorError, match="VM web exists"):
        await ctl(lab, "vm", "restore", "web", last["point"])
    with pytest.raises(OperatorError, match="no point"):
        await ctl(lab, "vm", "restore", "web", "rp-" + 16 * "0", "--as", "other")

    beside = await ctl(lab, "vm", "restore", "web", last["point"], "--as", "web2")
    assert beside["images"] == {"journal": "web2"}
    assert (await vm_until(lab, "web2"))["state"] == "offline"
    shown = json.loads(await run_tool(lab, "clusterctl", "vm", "show", "web2", "--json"))
    assert shown["config"]["name"] == "web2" and shown["config"]["disks"][0]["image"] == "web2"
    for name in ("web", "web2"):
        await run_tool(lab, "diskctl", "export", name, "--full", "-o", str(tmp_path / f"{name}.export"))
        await run_tool(
            lab, "diskctl", "apply", str(tmp_path / f"{name}.export"), str(tmp_path / f"{name}.raw")
        )
    assert (tmp_path / "web.raw").read_bytes() == (tmp_path / "web2.raw").read_bytes()

    await run_tool(lab, "clusterctl", "vm", "remove", "web")
    with pytest.raises(OperatorError, match="image web exists already"):
        await ctl(lab, "vm", "restore", "web", last["point"])
    await run_tool(lab, "diskctl", "image", "delete", "web")
    again = await ctl(lab, "vm", "restore", "web", last["point"], "--start")
    assert again["images"] == {"journal": "web"}
    await vm_until(lab, "web", state="online")
    await written(lab)
    verdict = await check_guest(lab, "web")
    assert (verdict.lost, verdict.overlaps) == (0, 0) and verdict.records > 0

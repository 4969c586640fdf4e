"""Whole clusters of real processes: cables pulled, daemons and hosts killed, the journal judged."""

from typing import Any

import pytest
from lab_until import until

from holdfast.guest.acks import Line, parse_acks
from holdfast.lab import processes
from holdfast.lab.cluster import Lab
from holdfast.lab.guests import GuestOptions, acks_path, add_guest, check_guest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
OPTIONS = GuestOptions(on="n1", size_bytes=16 << 20, rate=50.0, size_load=50.0)


async def vm_of(lab: Lab, *, but: str | None = None) -> dict[str, Any]:
    return (await lab.cluster_status(but=but))["vms"]["web"]


async def node_is(lab: Lab, node: str, state: str) -> None:
    async def seen() -> bool:
        return (await lab.cluster_status(but=node))["nodes"][node]["state"] == state

    await until(f"{node} is {state}", seen)


async def vm_is(lab: Lab, state: str, *, not_on: str | None = None, but: str | None = None) -> dict[str, Any]:
    async def seen() -> dict[str, Any] | None:
        vm = await vm_of(lab, but=but)
        return vm if vm["state"] == state and vm["owner"] != not_on else None

    return await until(f"web is {state}, not on {not_on}", seen)


def acks(lab: Lab) -> list[Line]:
    return parse_acks(acks_path(lab, "web").read_bytes())


async def writes(lab: Lab, *, epoch: int | None = None) -> None:
    """The guest acknowledges something new."""
    known = len(acks(lab))

    async def seen() -> bool:
        return any(line.kind == "ack" and epoch in (None, line.epoch) for line in acks(lab)[known:])

    await until(f"the guest writes (epoch {epoch})", seen)


async def nothing_lost(lab: Lab) -> list[tuple[int, str, int, int]]:
    verdict = await check_guest(lab, "web")
    assert (verdict.lost, verdict.overlaps, verdict.examples) == (0, 0, [])
    assert verdict.records > 0 and verdict.load_blocks > 0
    return verdict.owners


@pytest.mark.lab(nodes=3, properties={"resiliency_period": "4s"})
async def test_lab_pulled_cable_short_and_long(lab: Lab) -> None:
    nodes = (await lab.cluster_status())["nodes"]
    assert {name: node["ungraceful_exits"] for name, node in nodes.items()} == dict.fromkeys(lab.nodes, 0)
    before = await add_guest(lab, "web", OPTIONS)
    assert before["owner"] == "n1"

    await lab.isolate("n1")
    await node_is(lab, "n1", "isolated")
    vm = await vm_is(lab, "unmonitored", but="n1")
    assert vm["pid"] == before["pid"] and 0 < vm["window_remaining_s"] <= 4
    await writes(lab, epoch=before["epoch"])
    await lab.heal()
    await node_is(lab, "n1", "up")
    after = await vm_is(lab, "online")
    assert [after[key] for key in ("owner", "epoch", "pid")] == [
        before[key] for key in ("owner", "epoch", "pid")
    ]

    # With its clusterd dead, nothing on n1 stops the old copy: only the fence does.
    await lab.isolate("n1")
    await lab.kill("n1.clusterd")
    moved = await vm_is(lab, "online", not_on="n1", but="n1")
    assert moved["epoch"] > before["epoch"]
    await writes(lab, epoch=moved["epoch"])

    async def refused() -> list[Line]:
        return [line for line in acks(lab) if line.kind == "refused" and line.epoch == before["epoch"]]

    await until("the old copy is refused", refused)
    await lab.heal()
    await lab.start("n1.clusterd")
    await node_is(lab, "n1", "up")
    await until("nothing of the old run is left", lambda: _gone(lab, "n1"))
    owners = await nothing_lost(lab)
    assert [(epoch, node) for epoch, node, _, _ in owners] == [
        (before["epoch"], "n1"),
        (moved["epoch"], moved["owner"]),
    ]


async def _gone(lab: Lab, node: str) -> bool:
    return not lab.vm_processes(node)


@pytest.mark.lab(nodes=3, properties={"resiliency_period": "3s"})
async def test_lab_diskd_clusterd_and_host_killed(lab: Lab) -> None:
    before = await add_guest(lab, "web", OPTIONS)

    await lab.kill("diskd")
    assert lab.document()["diskd"]["pid"] is None
    await lab.start("diskd")
    await writes(lab)
    await lab.kill("n1.clusterd")
    await writes(lab, epoch=before["epoch"])
    await lab.start("n1.clusterd")
    await node_is(lab, "n1", "up")
    after = await vm_is(lab, "online")
    assert (after["epoch"], after["pid"]) == (before["epoch"], before["pid"])
    await nothing_lost(lab)

    boot_id = (lab.directory / "n1" / "boot_id").read_text()
    await lab.kill("n1")
    assert lab.vm_processes("n1") == []
    moved = await vm_is(lab, "online", not_on="n1", but="n1")
    await writes(lab, epoch=moved["epoch"])
    await lab.start("n1")
    assert (lab.directory / "n1" / "boot_id").read_text() != boot_id
    await node_is(lab, "n1", "up")
    await nothing_lost(lab)

    everything = [one.record for one in processes.marked(lab.state.lab_id)]
    assert len(everything) >= 8  # three nodes, proxy, store, diskd, target, the guest
    await lab.down()
    assert not any(processes.lives(record) for record in everything)
    assert processes.marked(lab.state.lab_id) == []

"""A diskd on every host, over one storage: a VM's disks go where the VM goes, tracking and all."""

import json
from typing import Any

import pytest
from lab_until import until

from holdfast.guest.acks import parse_acks
from holdfast.lab.cluster import Lab
from holdfast.lab.guests import GuestOptions, acks_path, add_guest, check_guest, run_tool

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
OPTIONS = GuestOptions(on="n1", size_bytes=32 << 20, rate=50.0, size_load=50.0)


async def vm_until(lab: Lab, but: str | None = None, **wanted: Any) -> dict[str, Any]:
    async def seen() -> dict[str, Any] | None:
        entry: dict[str, Any] = (await lab.cluster_status(but=but))["vms"].get("web") or {}
        is_off = but is not None and entry.get("owner") == but
        return entry if not is_off and all(entry.get(key) == value for key, value in wanted.items()) else None

    found: dict[str, Any] = await until(f"web is {wanted}", seen)
    return found


async def written(lab: Lab, more: int = 5) -> None:
    """The guest has acknowledged some more."""
    known = len(parse_acks(acks_path(lab, "web").read_bytes()))

    async def seen() -> bool:
        return len(parse_acks(acks_path(lab, "web").read_bytes())) >= known + more

    await until("the guest writes", seen)


async def backup(lab: Lab, *node: str) -> dict[str, Any]:
    asked = [part for name in node for part in ("--node", lab.layout.direct[f"{name}.control"])]
    said = await run_tool(lab, "clusterctl", *asked, "vm", "backup", "web", "--json")
    result: dict[str, Any] = json.loads(said.splitlines()[-1])
    return result


async def owner_of(lab: Lab) -> str:
    """The diskd that has the image, as the storage says."""
    shown = json.loads(await run_tool(lab, "diskctl", "image", "show", "web", "--json"))
    return str(shown["owner"]["daemon"])


@pytest.mark.lab(nodes=3, properties={"resiliency_period": "2s"}, diskd_per_node=True)
async def test_disks_go_with_their_vm_and_a_dead_host_keeps_them_until_that_is_proven(lab: Lab) -> None:
    first = await add_guest(lab, "web", OPTIONS)
    assert (first["owner"], await owner_of(lab)) == ("n1", "n1")
    last = await backup(lab)
    assert last["kind"] == "full"
    for node in ("n2", "n1"):
        await written(lab)
        await run_tool(lab, "clusterctl", "vm", "move", "web", node)
        await vm_until(lab, state="online", owner=node)
        await written(lab)
        assert await owner_of(lab) == node
        after = await backup(lab)
        assert (after["kind"], after["base"]) == ("differential", last["point"])
        assert [disk["exact"] for disk in after["disks"]] == [True]
        last = after

    await lab.kill("n1")

    async def held() -> str | None:
        items = (await lab.cluster_status(but="n1"))["held"]
        return next((item["why"] for item in items if item["subject"] == "web"), None)

    why = await until("its failover is held", held)
    assert "belongs to diskd n1 on host n1" in why
    assert await owner_of(lab) == "n1"
    await run_tool(lab, "clusterctl", "node", "confirm-dead", "n1")
    taken = await vm_until(lab, but="n1", state="online")
    assert taken["owner"] in ("n2", "n3")
    await written(lab)
    assert await owner_of(lab) == taken["owner"]
    after = await backup(lab)
    assert (after["kind"], after["base"]) == ("differential", last["point"])

    # The host boots again; its diskd leaves alone what is not its own any more, and gets it when asked.
    await lab.start("n1")

    async def is_up() -> bool:
        return (await lab.cluster_status(but="n1"))["nodes"]["n1"]["state"] == "up"

    await until("n1 is up", is_up)
    await run_tool(lab, "clusterctl", "vm", "move", "web", "n1")
    await vm_until(lab, state="online", owner="n1")
    await written(lab)
    assert await owner_of(lab) == "n1"
    last, after = after, await backup(lab)
    assert (after["base"], [disk["exact"] for disk in after["disks"]]) == (last["point"], [True])

    # The cluster's network of n1 is cut, not the way to its diskd: that one fences the run beside it.
    await lab.isolate("n1")
    taken = await vm_until(lab, but="n1", state="online")
    assert taken["owner"] != "n1"
    await written(lab)
    assert await owner_of(lab) == taken["owner"]
    last, after = after, await backup(lab, taken["owner"])
    assert (after["base"], [disk["exact"] for disk in after["disks"]]) == (last["point"], [True])
    verdict = await check_guest(lab, "web")
    assert (verdict.lost, verdict.overlaps) == (0, 0)

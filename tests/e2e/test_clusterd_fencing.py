"""VMs with disks, a real diskd: nothing starts unfenced, and no stale copy outlives its node's return."""

import json
from pathlib import Path
from typing import Any

import pytest
import trio
from clusterd_trio import Trio, all_up, running_trio, vm_is

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

DISK = """preferred_nodes = ["n1"]
[[disks]]
name = "data"
image = "web-data"
"""


async def lease(cluster: Trio) -> dict[str, Any]:
    return json.loads(await cluster.diskctl("lease", "show", "web-data", "--json"))


def environment(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def lives(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


async def test_a_lost_node_is_fenced_and_its_stale_copy_is_stopped_when_it_is_back(tmp_path: Path) -> None:
    async with running_trio(tmp_path, disks=True) as cluster:
        await cluster.set(resiliency_period="2s")
        await cluster.set(quarantine_threshold="10")
        await cluster.diskctl("image", "create", "web-data", "1MiB")
        await cluster.ok("vm", "add", str(cluster.vm_file("web", extra=DISK)))
        document = await cluster.until(vm_is("web", "online", owner="n1"), "online on n1")
        old = document["vms"]["web"]
        held = await lease(cluster)
        assert (held["epoch"], held["holder"]) == (old["epoch"], "n1/web")
        (uri,) = [text for text in environment(old["pid"]) if text.startswith(b"HOLDFAST_DISK_DATA=nbd://")]
        assert uri.endswith(b"/web-data@%d" % old["epoch"])

        # n1's clusterd dies, the VM goes on: unmonitored, then fenced and started elsewhere.
        n1 = cluster.members["n1"]
        await n1.kill()
        await cluster.until(vm_is("web", "unmonitored", pid=old["pid"]), "unmonitored")
        assert (await lease(cluster))["epoch"] == old["epoch"]
        document = await cluster.until(
            lambda d: vm_is("web", "online")(d) and d["vms"]["web"]["owner"] != "n1", "failed over"
        )
        new = document["vms"]["web"]
        held = await lease(cluster)
        assert (held["epoch"], held["holder"]) == (new["epoch"], f"{new['owner']}/web")
        assert new["epoch"] > old["epoch"]
        assert lives(old["pid"]), "nobody could have stopped the old copy: only its writes are refused"

        # Back: it is not up before its stale copy is gone; the new run does not notice.
        await n1.start()
        await cluster.until(all_up, "n1 back")
        assert not lives(old["pid"])
        same = {key: new[key] for key in ("owner", "epoch", "pid")}
        await cluster.until(vm_is("web", "online", **same), "the new run goes on")
        assert lives(new["pid"])


async def test_without_diskd_nothing_is_failed_over_and_the_reason_is_shown(tmp_path: Path) -> None:
    async with running_trio(tmp_path, disks=True) as cluster:
        await cluster.set(resiliency_period="0s")
        await cluster.diskctl("image", "create", "web-data", "1MiB")
        await cluster.ok("vm", "add", str(cluster.vm_file("web", extra=DISK)))
        old = (await cluster.until(vm_is("web", "online", owner="n1"), "online on n1"))["vms"]["web"]
        cluster.daemons[1].kill()  # diskd
        await cluster.members["n1"].kill()
        document = await cluster.until(lambda d: d["held"], "held")
        assert document["vms"]["web"]["epoch"] == old["epoch"], "no assignment before every diskd answered"
        assert any("web" in hold["id"] and hold["why"] for hold in document["held"])
        assert lives(old["pid"])
        assert "web" in await cluster.ok("hold", "list")


async def test_a_moved_vm_takes_its_lease_along(tmp_path: Path) -> None:
    async with running_trio(tmp_path, count=2, disks=True) as cluster:
        await cluster.diskctl("image", "create", "web-data", "1MiB")
        await cluster.ok("vm", "add", str(cluster.vm_file("web", extra=DISK)))
        old = (await cluster.until(vm_is("web", "online", owner="n1"), "online on n1"))["vms"]["web"]
        await cluster.ok("vm", "move", "web", "n2")
        new = (await cluster.until(vm_is("web", "online", owner="n2"), "online on n2"))["vms"]["web"]
        assert new["epoch"] > old["epoch"]
        assert not lives(old["pid"])
        assert (await lease(cluster))["holder"] == "n2/web"
        await cluster.ok("node", "leave", "n2")
        with trio.fail_after(30):
            assert await cluster.members["n2"].process.wait() == 0
        cluster.members["n2"].process = None
        await cluster.until(vm_is("web", "online", owner="n1"), "moved off the leaving node")

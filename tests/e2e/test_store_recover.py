"""`clusterctl store recover` on real processes: the witness's database is an older copy, then deleted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from clusterd_trio import BIN, Trio, all_up, running_trio, start, vm_is

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


async def stop_witness(cluster: Trio) -> str:
    """Returns its address."""
    cluster.store.kill()
    await cluster.store.wait()
    text = cluster.members["n1"].config.read_text()
    return text.split('store = ["http://')[1].split('"')[0]


async def start_witness(cluster: Trio, listen: str) -> None:
    argv = [str(BIN / "clusterd"), "witness", "--data", str(cluster.directory / "store"), "--listen", listen]
    cluster.store, _ = await start(argv, cluster.directory / "witness.log")
    cluster.daemons.append(cluster.store)
    for name in cluster.members:
        await cluster.until(lambda document: document["store"] == "unknown", "the store is unknown", of=name)


def replace_store(cluster: Trio, copy: Path | None) -> None:
    shutil.rmtree(cluster.directory / "store")
    if copy is not None:
        shutil.copytree(copy, cluster.directory / "store")


async def recovered(cluster: Trio) -> dict[str, Any]:
    for name in cluster.members:
        await cluster.until(lambda document: document["store"] == "ok" and all_up(document), "up", of=name)
    return await cluster.until(vm_is("web", "online"), "web is online")


def runs(document: dict[str, Any]) -> dict[str, Any]:
    return {name: [vm[key] for key in ("owner", "epoch", "pid")] for name, vm in document["vms"].items()}


async def test_store_recover(tmp_path: Path) -> None:
    async with running_trio(tmp_path, disks=True) as cluster:
        await cluster.diskctl("image", "create", "web", "1MiB")
        disks = '[[disks]]\nname = "d"\nimage = "web"\n'
        await cluster.ok("vm", "add", str(cluster.vm_file("web", extra=f'preferred_nodes = ["n1"]\n{disks}')))
        await cluster.until(vm_is("web", "online"), "web is online")
        listen = await stop_witness(cluster)
        shutil.copytree(tmp_path / "store", tmp_path / "copy")
        argv = [str(BIN / "clusterd"), "witness", "--data", str(tmp_path / "store"), "--listen", listen]
        cluster.store, _ = await start(argv, tmp_path / "witness.log")
        cluster.daemons.append(cluster.store)
        await recovered(cluster)
        await cluster.ok("vm", "add", str(cluster.vm_file("lone", extra='preferred_nodes = ["n3"]\n')))
        before = runs(await cluster.until(vm_is("lone", "online"), "lone is online"))
        assert (await cluster.ctl("store", "recover")).stderr.startswith(b"clusterctl: the store is good")

        # An older copy, which knows nothing of lone; n2 does not answer at first.
        await stop_witness(cluster)
        replace_store(cluster, tmp_path / "copy")
        await start_witness(cluster, listen)
        await cluster.members["n2"].kill()
        refused = await cluster.ctl("store", "recover", "--dry-run")
        assert refused.returncode == 1 and b"recover --without n2" in refused.stderr
        await cluster.members["n2"].start()
        plan = json.loads(await cluster.ok("store", "recover", "--dry-run", "--json"))
        assert plan["store"] == "older" and not plan["done"]
        assert {vm: fate["fate"] for vm, fate in plan["vms"].items()} == {"lone": "lives", "web": "lives"}
        assert (await cluster.status())["store"] == "unknown"
        await cluster.ok("store", "recover")
        assert runs(await recovered(cluster)) == before

        # Nothing at all is left of it, n3 stays away until after the recovery, and n1, which is asked, has no
        # picture of its own: it fetches another's.
        await stop_witness(cluster)
        await cluster.members["n1"].kill()
        (tmp_path / "n1" / "data" / "picture.json").unlink()
        await cluster.members["n1"].start()
        replace_store(cluster, None)
        await start_witness(cluster, listen)
        await cluster.members["n3"].kill()
        shown = await cluster.ok("store", "recover", "--without", "n3")
        assert "lone: n3, may run there" in shown
        await cluster.until(vm_is("lone", "unmonitored", owner="n3"), "lone is unmonitored on n3")
        await cluster.members["n3"].start()
        assert runs(await recovered(cluster)) == before
        moved = await cluster.ctl("vm", "move", "web", "n2")
        assert moved.returncode == 0, moved.stderr
        after = await cluster.until(vm_is("web", "online", owner="n2"), "web is on n2")
        assert after["vms"]["web"]["epoch"] > plan["epoch"]

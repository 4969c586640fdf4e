"""`clusterctl store recover` on real processes: the witness comes back with an older copy of its database."""

import contextlib
import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from clusterd_trio import BIN, Trio, all_up, running_trio, start, vm_is

from clusterd.core import calls
from clusterd.core.commands import MoveVm

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

DATABASE = "witness.sqlite3"


def copy_of(cluster: Trio) -> Path:
    """Of the witness's database as it is now, taken while it runs."""
    copy = cluster.directory / "copy"
    copy.mkdir()
    with (
        contextlib.closing(sqlite3.connect(cluster.directory / "store" / DATABASE)) as source,
        contextlib.closing(sqlite3.connect(copy / DATABASE)) as target,
    ):
        source.backup(target)
    return copy


async def put_back(cluster: Trio, copy: Path) -> None:
    """The witness is killed, and comes back at the same address with that copy."""
    cluster.store.kill()
    await cluster.store.wait()
    listen = cluster.members["n1"].config.read_text().split('store = ["http://')[1].split('"')[0]
    shutil.rmtree(cluster.directory / "store")
    shutil.copytree(copy, cluster.directory / "store")
    argv = [str(BIN / "clusterd"), "witness", "--data", str(cluster.directory / "store"), "--listen", listen]
    cluster.store, _ = await start(argv, cluster.directory / "witness.log")
    cluster.daemons.append(cluster.store)


def runs(document: dict[str, Any]) -> dict[str, Any]:
    return {name: [vm[key] for key in ("owner", "epoch", "pid")] for name, vm in document["vms"].items()}


async def add(cluster: Trio, name: str, extra: str) -> None:
    text = f'name = "{name}"\nargv = ["sleep", "100000"]\nmemory = "16MiB"\n{extra}'
    await cluster.reach().ask(calls.VM_ADD, calls.VmFile(text), repeatable=False)


async def test_store_recover(tmp_path: Path) -> None:
    async with running_trio(tmp_path, 2, disks=True) as cluster:
        n1, n2 = cluster.members["n1"], cluster.members["n2"]
        copy = copy_of(cluster)
        await cluster.diskctl("image", "create", "web", "1MiB")
        disks = '[[disks]]\nname = "d"\nimage = "web"\n'
        await add(cluster, "web", f'preferred_nodes = ["n1"]\n{disks}')
        await cluster.until(vm_is("web", "online"), "web is online")
        await add(cluster, "lone", 'preferred_nodes = ["n2"]\n')
        before = runs(await cluster.until(vm_is("lone", "online"), "lone is online"))
        kept = n2.directory / "data" / "picture.json"
        await cluster.until(lambda _: "vms/lone/run" in kept.read_text(), "n2 keeps a picture of lone")

        # An older copy, which knows no VM. n1, which is asked, has no picture of its own (it knows
        # the copy for one by its epoch): it fetches that of n2, which does not answer at first.
        await n1.kill()
        (n1.directory / "data" / "picture.json").unlink()
        await n2.kill()
        await put_back(cluster, copy)
        await n1.start()
        await cluster.until(lambda document: document["store"] == "unknown", "n1 finds it older", of="n1")
        refused = await cluster.ctl("store", "recover", "--dry-run")
        assert refused.returncode == 1 and b"recover --without n2" in refused.stderr
        await n2.start()
        await cluster.until(lambda document: document["store"] == "unknown", "n2 finds it older", of="n2")
        plan = json.loads(await cluster.ok("store", "recover", "--dry-run", "--json"))
        assert plan["store"] == "older" and not plan["done"] and "a node kept" in plan["base"]
        assert {vm: fate["fate"] for vm, fate in plan["vms"].items()} == {"lone": "lives", "web": "lives"}
        assert (await cluster.status())["store"] == "unknown"
        await cluster.ok("store", "recover")
        for name in cluster.members:
            await cluster.until(lambda status: status["store"] == "ok" and all_up(status), "up", of=name)
        assert runs(await cluster.until(vm_is("web", "online"), "web is online")) == before
        await cluster.reach().ask(calls.VM_MOVE, MoveVm("web", "n2"), repeatable=False)
        after = await cluster.until(vm_is("web", "online", owner="n2"), "web is on n2")
        assert after["vms"]["web"]["epoch"] > plan["epoch"]

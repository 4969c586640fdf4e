"""`diskctl backup --san` and `diskctl san` with real processes."""

import json

import pytest
import trio
from diskd_process import diskd
from diskd_target_process import target_process
from programs import good, need

pytestmark = [pytest.mark.interop, pytest.mark.slow]

PROVIDER = """#!/bin/sh
where="$(dirname "$0")/snapshots/$2"
case "$1" in
    create) mkdir -p "$where" && cp -r "$3/images" "$where" && echo "$where" ;;
    delete) rm -rf "$where" ;;
esac
"""


async def test_backup_from_a_snapshot_and_a_third_party(tmp_path):
    for program in ("qemu-img", "qemu-io"):
        need(program)
    async with diskd(tmp_path / "disks") as daemon, target_process(tmp_path / "repository") as target:
        to = ("--target", str(target.address))
        live = f"{daemon.nbd}/d"
        await daemon.do("image", "create", "d", "16MiB")
        await good("qemu-io", "-f", "raw", "-c", "write -P 1 0 4M", live)
        backup = ("backup", "--vm", "web", "--image", "d", "--san", "copy", *to)
        assert "san.toml" in await daemon.refuses(*backup)
        (tmp_path / "snap").write_text(PROVIDER)
        (tmp_path / "snap").chmod(0o700)
        (tmp_path / "disks" / "san.toml").write_text(
            f'[providers.copy]\nkind = "command"\ncommand = ["{tmp_path}/snap"]\n'
        )
        first = json.loads((await daemon.do(*backup, "--json")).splitlines()[-1])
        await good("qemu-io", "-f", "raw", "-c", "write -P 2 1M 8k", live)
        second = json.loads((await daemon.do(*backup, "--json")).splitlines()[-1])
        assert (second["base"], second["disks"][0]["changed_bytes"]) == (first["point"], 8 << 10)
        path = tmp_path / "repository" / "web" / second["point"] / "d.qcow2"
        await good("qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(path), live)
        assert list((tmp_path / "snapshots").iterdir()) == []
        assert "0B differ" in await daemon.do("target", "audit", "web", *to)

        made = await daemon.json("san", "begin", "copy", "--vm", "web", "--image", "d")
        mapping = json.loads(await trio.Path(made["mapping"]).read_text())
        await good("qemu-img", "compare", "-f", "raw", "-F", "raw", mapping["disks"][0]["raw"], live)
        assert mapping["disks"][0]["changes"] == {
            second["point"]: {"exact": True, "over_report_bytes": 0, "extents": []}
        }
        assert made["point"] in await daemon.do("san", "list")
        assert "third party" in await daemon.refuses(*backup)
        await daemon.do("san", "end", made["point"], "--keep-point")
        assert "no snapshot" in await daemon.refuses("san", "end", made["point"])
        assert [p["point"] for p in await daemon.json("point", "list", "d") if p["valid"]][-1] == made[
            "point"
        ]
        # The target does not hold that point: the newest that both sides hold is the one before.
        third = json.loads((await daemon.do(*backup, "--json")).splitlines()[-1])
        assert third["base"] == second["point"]

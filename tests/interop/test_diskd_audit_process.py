"""`diskctl target audit` with real processes: under a writing guest, and with a write that nobody marked."""

import json
import os

import pytest
import trio
from diskd_process import diskd
from diskd_target_process import target_process
from programs import good, need

pytestmark = [pytest.mark.interop, pytest.mark.slow]


async def test_audit_passes_while_the_guest_writes_and_finds_what_was_not_marked(tmp_path):
    need("qemu-io")
    async with diskd(tmp_path / "disks") as daemon, target_process(tmp_path / "repository") as target:
        to = ("--target", str(target.address))
        live = f"{daemon.nbd}/d"
        await daemon.do("image", "create", "d", "64MiB")
        await good("qemu-io", "-f", "raw", "-c", "write -P 1 0 8M", "-c", "write -P 2 40M 1M", live)
        await daemon.do("backup", "--vm", "web", "--image", "d", *to)

        async def write():
            writes = [part for n in range(40) for part in ("-c", f"write -P {n + 3} {n * 300}k 20k")]
            await good("qemu-io", "-f", "raw", *writes, live)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            out = await daemon.do("target", "audit", "web", "--json", *to)
        report = json.loads(out.splitlines()[-1])
        assert report["disks"][0]["differing_bytes"] == 0
        assert report["disks"][0]["compared_bytes"] + report["disks"][0]["changed_bytes"] == 64 << 20
        # The checkpoint of the audit has gone, and a backup goes on as if nothing had been.
        await daemon.do("backup", "--vm", "web", "--image", "d", *to)
        assert "0B differ" in await daemon.do("target", "audit", "web", *to)

        # One sector changed under the daemon's feet, where no mark is set: a differential would miss it.
        descriptor = os.open(tmp_path / "disks" / "images" / "d" / "disk.raw", os.O_WRONLY)
        os.pwrite(descriptor, b"?" * 512, (40 << 20) + 4096)
        os.close(descriptor)
        said = await daemon.refuses("target", "audit", "web", *to)
        assert f"first in disk d at {(40 << 20) + 4096}" in said
        assert "--full" in said
        await daemon.do("backup", "--vm", "web", "--image", "d", "--full", *to)
        await daemon.do("target", "audit", "web", "--image", "d", *to)

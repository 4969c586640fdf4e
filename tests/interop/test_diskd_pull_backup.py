"""A backup by somebody else, pulled over NBD with nothing but nbdinfo and qemu-img.

A full, then differentials of what the dirty bitmap of the newest reference point names, each a qcow2 over
the one before.
"""

import json
import random
from pathlib import Path

import pytest
from diskd_process import DiskdProcess, diskd
from programs import good, need

pytestmark = [pytest.mark.interop, pytest.mark.slow]

MiB = 1 << 20
SIZE = 8 * MiB


def nbd_options(daemon: DiskdProcess, export: str) -> str:
    host, _, port = str(daemon.ready["nbd"]).rpartition(":")
    return f"driver=nbd,server.type=inet,server.host={host},server.port={port},export={export}"


async def pull(daemon: DiskdProcess, since: str | None, base: Path | None, out: Path) -> str:
    """One backup of `disk` into ``out``; the reference point that it leaves behind."""
    begun = await daemon.json("checkpoint", "begin", "--vm", "web", "--image", "disk")
    export = begun["exports"]["disk"]
    if since is None:
        await good("qemu-img", "convert", "-O", "qcow2", f"{daemon.nbd}/{export}", str(out))
    else:
        dirty = f"--map=qemu:dirty-bitmap:{since}"
        runs = json.loads((await good("nbdinfo", "--json", dirty, f"{daemon.nbd}/{export}")).out)
        assert 0 < sum(run["length"] for run in runs if run["type"] == 1) <= 5 * 65536
        await good("qemu-img", "create", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(out))
        for run in runs:
            if run["type"] != 1:
                continue
            window = f"driver=raw,offset={run['offset']},size={run['length']}"
            source = nbd_options(daemon, export).split(",")
            await good(
                "qemu-img", "convert", "-n", "--image-opts", "--target-image-opts",
                f"{window},{','.join('file.' + option for option in source)}",
                f"{window},file.driver=qcow2,file.file.driver=file,file.file.filename={out}",
            )  # fmt: skip
    await daemon.do("checkpoint", "end", begun["checkpoint"], "--keep-point")
    return str(begun["point"])


async def test_a_chain_of_backups_with_stock_tools_only(tmp_path: Path) -> None:
    for program in ("nbdinfo", "qemu-img", "qemu-io"):
        need(program)
    choose = random.Random(11)
    content = bytearray(SIZE)
    points: list[str] = []
    async with diskd(tmp_path / "root") as daemon:
        await daemon.do("image", "create", "disk", str(SIZE))
        for generation in range(3):
            commands = []
            for _ in range(5):
                start = choose.randrange(0, SIZE - 65536, 4096)
                length, byte = choose.choice((4096, 65536)), choose.choice((0, 1, 2, 3))
                content[start : start + length] = bytes([byte]) * length
                commands += ["-c", f"write {'-z' if byte == 0 else f'-P {byte}'} {start} {length}"]
            await good("qemu-io", "-f", "raw", *commands, f"{daemon.nbd}/disk")
            (tmp_path / f"{generation}.raw").write_bytes(content)
            since = points[-1] if points else None
            base = tmp_path / f"{generation - 1}.qcow2" if points else None
            points.append(await pull(daemon, since, base, tmp_path / f"{generation}.qcow2"))
        # An older backup is what the disk was then: nothing of a later one reached it.
        for generation in range(3):
            raw, out = tmp_path / f"{generation}.raw", tmp_path / f"{generation}.qcow2"
            await good("qemu-img", "check", str(out))
            await good("qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(raw), str(out))

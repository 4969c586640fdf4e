"""Stock NBD clients against the server, on memory devices: qemu-img, qemu-io, nbdinfo, nbdcopy."""

import contextlib
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from nbd_catalog import FakeCatalog
from programs import good, need, run

from daemonkit.ports import Address
from diskd.core.ports import ChangeReport
from diskd.shell.memory_device import MemoryDevice
from diskd.shell.nbd_server import NbdServer

pytestmark = pytest.mark.interop

MiB = 1 << 20
POINT = "rp-00000000000000aa"


@contextlib.asynccontextmanager
async def serving(catalog: FakeCatalog) -> AsyncIterator[str]:
    """Yields ``nbd://HOST:PORT``."""
    async with trio.open_nursery() as nursery:
        address = await nursery.start(NbdServer(catalog).serve_tcp, Address("127.0.0.1", 0))
        yield f"nbd://{address}"
        nursery.cancel_scope.cancel()


def pattern(size: int, seed: int = 1) -> bytes:
    """Data with holes: some runs of zeroes among random ones."""
    generator = random.Random(seed)
    data = bytearray()
    while len(data) < size:
        length = generator.choice((4096, 65536, 200_000))
        data += generator.randbytes(length) if generator.random() < 0.5 else bytes(length)
    return bytes(data[:size])


async def test_nbdinfo_reads_everything_we_tell() -> None:
    need("nbdinfo")
    device = MemoryDevice(16 * MiB)
    device.write_nowait(1 * MiB, b"x" * 65536)
    catalog = FakeCatalog({"disk": device, "disk@7": MemoryDevice(1 * MiB, is_read_only=True)})
    catalog.points[POINT] = ChangeReport([(4096, 8192)], exact=True, over_report_bytes=0)
    async with serving(catalog) as url:
        listed = json.loads((await good("nbdinfo", "--json", "--list", url)).out)
        assert [export["export-name"] for export in listed["exports"]] == ["disk", "disk@7"]
        (export,) = json.loads((await good("nbdinfo", "--json", f"{url}/disk")).out)["exports"]
        assert export["export-size"] == 16 * MiB
        assert export["contexts"] == ["base:allocation", f"qemu:dirty-bitmap:{POINT}"]
        assert export["can_multi_conn"]
        assert export["can_cache"]
        assert export["can_fua"]
        assert export["can_trim"]
        assert export["can_zero"]
        assert not export["is_read_only"]
        assert export["block_size_preferred"] == 4096
        (frozen,) = json.loads((await good("nbdinfo", "--json", f"{url}/disk@7")).out)["exports"]
        assert frozen["is_read_only"]
        runs = json.loads((await good("nbdinfo", "--json", "--map", f"{url}/disk")).out)
        assert [(run["offset"], run["length"], run["type"]) for run in runs] == [
            (0, MiB, 3),
            (MiB, 65536, 0),
            (MiB + 65536, 15 * MiB - 65536, 3),
        ]
        dirty = f"--map=qemu:dirty-bitmap:{POINT}"
        runs = json.loads((await good("nbdinfo", "--json", dirty, f"{url}/disk")).out)
        assert [(run["offset"], run["length"], run["type"]) for run in runs] == [
            (0, 4096, 0),
            (4096, 8192, 1),
            (12288, 16 * MiB - 12288, 0),
        ]


async def test_nbdcopy_both_ways(tmp_path: Path) -> None:
    need("nbdcopy")
    data = pattern(20 * MiB + 512)
    (tmp_path / "in.raw").write_bytes(data)
    catalog = FakeCatalog({"disk": MemoryDevice(len(data))})
    async with serving(catalog) as url:
        await good("nbdcopy", "--flush", str(tmp_path / "in.raw"), f"{url}/disk")
        await good("nbdcopy", f"{url}/disk", str(tmp_path / "out.raw"))
        await good("nbdcopy", "--no-extents", "--connections=3", f"{url}/disk", str(tmp_path / "all.raw"))
    assert (tmp_path / "out.raw").read_bytes() == data
    assert (tmp_path / "all.raw").read_bytes() == data


async def test_qemu_img_reads_writes_and_compares(tmp_path: Path) -> None:
    need("qemu-img")
    data = pattern(12 * MiB)
    raw = str(tmp_path / "in.raw")
    (tmp_path / "in.raw").write_bytes(data)
    async with serving(
        FakeCatalog({"disk": MemoryDevice(len(data)), "d2@12": MemoryDevice(len(data))})
    ) as url:
        info = json.loads((await good("qemu-img", "info", "--output=json", f"{url}/disk")).out)
        assert info["virtual-size"] == len(data)
        await good("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", raw, f"{url}/disk")
        await good("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, f"{url}/disk")
        await good("qemu-img", "convert", "-n", "-O", "raw", f"{url}/disk", f"{url}/d2@12")
        await good("qemu-img", "convert", "-O", "qcow2", f"{url}/d2@12", str(tmp_path / "out.qcow2"))
        await good("qemu-img", "compare", raw, "-f", "raw", "-F", "qcow2", str(tmp_path / "out.qcow2"))
        for more in ((), ("-w",), ("-w", "--flush-interval=8")):
            await good(
                "qemu-img", "bench", "-f", "raw", "-c", "64", "-d", "8", "-s", "4k", *more, f"{url}/d2@12"
            )
        mapped = json.loads((await good("qemu-img", "map", "--output=json", f"{url}/disk")).out)
        assert sum(entry["length"] for entry in mapped) == len(data)


async def test_qemu_io_patterns() -> None:
    need("qemu-io")
    device = MemoryDevice(64 * MiB)
    async with serving(FakeCatalog({"disk": device})) as url:
        await good(
            "qemu-io", "-f", "raw",
            "-c", "write -P 0xaa 0 4M", "-c", "write -f -P 0xbb 1M 64k", "-c", "flush",
            "-c", "discard 2M 1M", "-c", "write -z 3M 64k", "-c", "write -z -u 3M 128k",
            "-c", "aio_write -P 0xcc 10M 8M", "-c", "aio_write -P 0xdd 30M 1M", "-c", "aio_flush",
            "-c", "read -P 0xaa 0 1M", "-c", "read -P 0xbb 1M 64k", "-c", "read -P 0 2M 1M",
            "-c", "read -P 0 3M 128k", "-c", "read -P 0xcc 10M 8M", "-c", "read -P 0xdd 30M 1M",
            "-c", "write -P 0xee 511 1025", "-c", "read -P 0xee 511 1025",
            f"{url}/disk",
        )  # fmt: skip
    assert device.statistics.flushes >= 2
    assert device.statistics.trims >= 1
    assert device.read_nowait(511, 1) == b"\xee"


async def test_a_refusal_is_shown_to_the_user() -> None:
    """libnbd's tools fail, but keep the server's message to themselves; QEMU's show it."""
    need("nbdinfo")
    need("qemu-img")
    catalog = FakeCatalog({"disk": MemoryDevice(MiB)})
    catalog.refused["disk"] = "image disk is leased to n2/web: connect to disk@9"
    async with serving(catalog) as url:
        assert (await run("nbdinfo", f"{url}/disk")).code != 0
        refused = await run("qemu-img", "info", f"{url}/disk")
        assert refused.code != 0
        assert "leased to n2/web" in refused.err
        missing = await run("qemu-img", "info", f"{url}/nothing")
        assert missing.code != 0
        assert "there is no export 'nothing'" in missing.err

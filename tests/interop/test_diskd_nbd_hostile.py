"""Clients that mean harm, against the real daemon: its memory stays bounded, and everybody else is served."""

import contextlib
import os
import struct
from pathlib import Path

import nbd_client as client
import pytest
import trio
from diskd_process import diskd
from nbd_harness import Wire
from programs import good, need

pytestmark = [pytest.mark.interop, pytest.mark.slow]

MiB = 1 << 20
LARGEST = 64 * MiB
# The pool of 512 MiB, and what 30 connections and Python have beside it.
RESIDENT_MAX = 800 * MiB


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def connect(address: str) -> Wire:
    host, _, port = address.rpartition(":")
    wire = Wire(await trio.open_tcp_stream(host, int(port)))
    await wire.go("d")
    return wire


@pytest.mark.parametrize("what", ["half a write", "a reply that nobody reads"])
async def test_large_requests_take_a_bounded_part_of_memory(tmp_path: Path, what: str) -> None:
    need("qemu-io")
    command = client.WRITE if what == "half a write" else client.READ
    head = struct.pack(">IHHQQI", 0x25609513, 0, command, 7, 0, LARGEST)
    async with diskd(tmp_path / "root") as daemon, contextlib.AsyncExitStack() as stack:
        await daemon.json("image", "create", "d", "64MiB")
        await good("qemu-io", "-f", "raw", "-c", "write -P 7 0 64M", f"{daemon.nbd}/d")
        pid = daemon.ready["pid"]
        for _ in range(30):
            wire = await connect(daemon.ready["nbd"])
            await stack.enter_async_context(wire.stream)
            await wire.stream.send_all(head)
        # By then everything that was sent before has been looked at.
        await good("qemu-io", "-f", "raw", "-c", "write -P 9 0 1M", "-c", "read -P 9 0 1M", f"{daemon.nbd}/d")
        assert resident_bytes(pid) < RESIDENT_MAX
        await stack.aclose()
        with trio.fail_after(30):
            while resident_bytes(pid) > RESIDENT_MAX / 4:  # noqa: ASYNC110 - another process
                await trio.sleep(0.1)

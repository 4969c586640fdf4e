"""A guest whose disk has no more space below it hears ENOSPC, loses nothing, and goes on later."""

import contextlib
import errno
from pathlib import Path

import nbd_client as client
import pytest
import trio
from loop_mounts import loop_mount
from nbd_harness import Wire

from daemonkit.ports import Address
from daemonkit.units import KiB, MiB
from diskd.core.inventory import LibrarySettings
from diskd.shell.library import open_library
from diskd.shell.nbd_server import NbdServer

pytestmark = [pytest.mark.slow]

SIZE = 64 * MiB
CHUNK = 64 * KiB
COUNT = SIZE // CHUNK


def pattern(number: int) -> bytes:
    return bytes([number % 250 + 1]) * CHUNK


async def write(wire: Wire, number: int, *, flags: int = 0) -> int:
    """The error."""
    data = pattern(number)
    await wire.stream.send_all(
        client.request(client.WRITE, number * CHUNK, cookie=number, flags=flags, data=data)
    )
    cookie, error, _ = await wire.simple()
    assert cookie == number
    return error


async def content(wire: Wire, number: int) -> bytes:
    await wire.stream.send_all(client.request(client.READ, number * CHUNK, CHUNK, cookie=number))
    return (await wire.simple(length=CHUNK))[2]


async def flush(wire: Wire) -> int:
    await wire.stream.send_all(client.request(client.FLUSH, cookie=1))
    return (await wire.simple())[1]


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
async def test_a_full_file_system(kind: str, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    settings = LibrarySettings(shared_dir=str(tmp_path / "shared"))
    with loop_mount(kind, size=320 * MiB) as where, trio.fail_after(60):
        async with open_library(where / "root", settings) as library:
            await library.create_image("disk", SIZE)
            filler = where / "filler"
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(MiB)):
                    pass
            with filler.open("r+b") as file:
                file.truncate(max(0, filler.stat().st_size - 6 * MiB))
            async with trio.open_nursery() as nursery:
                server = NbdServer(library)
                address = await nursery.start(server.serve_tcp, Address("127.0.0.1", 0))
                async with await trio.open_tcp_stream(address.host, address.port) as stream:
                    wire = Wire(stream)
                    await wire.go("disk")
                    errors = [await write(wire, number) for number in range(COUNT)]
                    refused = [number for number, error in enumerate(errors) if error]
                    assert {errors[number] for number in refused} == {errno.ENOSPC}
                    assert 0 < len(refused) < COUNT
                    # What was acknowledged is there; what was refused is old, new, or cut off in between.
                    assert await flush(wire) == 0
                    for number in sorted(set(range(COUNT)) - set(refused)):
                        assert await content(wire, number) == pattern(number)
                    for number in refused[:20]:
                        assert set(await content(wire, number)) <= {0, number % 250 + 1}
                    assert await write(wire, refused[0], flags=client.FUA) == errno.ENOSPC
                    filler.unlink()
                    assert [await write(wire, number) for number in refused] == [0] * len(refused)
                    assert await flush(wire) == 0
                nursery.cancel_scope.cancel()
            assert library.image("disk").reason is None
        # Opened again: as after any clean stop.
        async with open_library(where / "root", settings) as library:
            assert library.image("disk").state == "open"
            device = (await library.open("disk", peer="test", drop=print)).device
            for number in range(COUNT):
                assert await device.read(number * CHUNK, CHUNK) == pattern(number)

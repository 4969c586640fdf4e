"""The target's peers in tests: a source that backs up a VM of two disks, and one that speaks by hand."""

import trio
from diskd_frozen import MemoryLibrary
from diskd_target import stream_of

from daemonkit.diskd_api import BackupDisk, BackupRequest
from daemonkit.frames import FrameReader
from daemonkit.rpc import connect
from diskd.core import target_calls as calls
from diskd.core.stream import (
    Ack,
    Ready,
    Working,
    decode_reply,
)
from diskd.shell.backup import run_backup

MiB = 1 << 20
DISKS = [BackupDisk("system", "system"), BackupDisk("journal", "journal")]


async def silent(_progress):
    await trio.lowlevel.checkpoint()


async def backup(library, address, mode="auto"):
    request = BackupRequest("web", DISKS, 'name = "web"\n', str(address), mode, None)
    with trio.fail_after(60):
        return await run_backup(library, request, report=silent, key=None)


async def call(address, method, params):
    with trio.fail_after(30):
        async with connect(address) as client:
            return await client.call(method, params)


async def exported(library, base=None):
    frozen = await library.begin_checkpoint("web", DISKS, 'name = "web"\n')
    await frozen.end("keep")
    return frozen, stream_of(frozen, base)


class Peer:
    """One side of the export stream, by hand."""

    def __init__(self, stream):
        self.stream = stream
        self.reader = FrameReader()

    async def reply(self):
        with trio.fail_after(30):
            while (payload := self.reader.next_frame()) is None:
                data = await self.stream.receive_some(65536)
                if not data:
                    return None
                self.reader.feed(data)
            return decode_reply(payload)

    async def last_reply(self):
        while isinstance(reply := await self.reply(), Ack | Ready | Working):
            pass
        return reply


async def open_export(client):
    with trio.fail_after(30):
        return Peer(await client.open_stream(calls.EXPORT, calls.Nothing()))


def two_disks():
    """What it backs up."""
    library = MemoryLibrary(system=24 * MiB, journal=1 * MiB)
    library.images["system"].write(0, bytes(range(256)) * 4096 * 20)
    library.images["journal"].write(4096, b"j" * 4096)
    return library

"""A backup asked for by one run of a VM is given up when a newer run takes the VM's disks."""

from pathlib import Path

import pytest
import trio
from diskd_process import diskd

from daemonkit.diskd_api import BACKUP_RUN, LEASE_ACQUIRE, BackupDisk, BackupRequest, LeaseRequest
from daemonkit.ports import Address
from daemonkit.rpc import CallRefused, connect

pytestmark = [pytest.mark.interop]


async def test_a_newer_run_ends_the_backup_of_an_older_one(tmp_path: Path) -> None:
    async with diskd(tmp_path / "root") as daemon, trio.open_nursery() as nursery:
        await daemon.do("image", "create", "d", "4MiB")
        control = Address.parse(daemon.ready["control"])
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        contacted = trio.Event()

        async def say_nothing(stream: trio.SocketStream) -> None:
            contacted.set()
            await stream.receive_some(1)

        nursery.start_soon(trio.serve_listeners, say_nothing, [listener])
        target = f"127.0.0.1:{listener.socket.getsockname()[1]}"
        request = BackupRequest("d", [BackupDisk("d", "d")], "", target, epoch=1)
        refusals: list[str] = []

        async def back_up() -> None:
            async with connect(control) as client:
                try:
                    await client.call(BACKUP_RUN, request)
                except CallRefused as error:
                    refusals.append(str(error))
            nursery.cancel_scope.cancel(reason="answered")

        async with connect(control) as client:
            await client.call(LEASE_ACQUIRE, LeaseRequest("d", 1, "n1/d"))
            nursery.start_soon(back_up)
            with trio.fail_after(10):
                await contacted.wait()
            await client.call(LEASE_ACQUIRE, LeaseRequest("d", 2, "n2/d"))
            with trio.fail_after(5):  # well before the silent target would be given up
                await trio.sleep_forever()
    assert refusals == [
        "d was taken over by a newer run during its backup, which was given up;"
        " its changes stay tracked: run it again"
    ]

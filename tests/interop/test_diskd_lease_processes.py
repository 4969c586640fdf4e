"""Leases of a real daemon: many who acquire at once while it is killed, and a client that is not let in."""

import random
import signal
from pathlib import Path

import nbd_client as client
import pytest
import trio
from diskd_storage import Control, storage

from daemonkit.diskd_api import LEASE_ACQUIRE, LEASE_SHOW, ImageName, LeaseRequest
from daemonkit.errors import OperatorError
from daemonkit.ports import Address
from daemonkit.rpc import CallFailed

pytestmark = [pytest.mark.interop, pytest.mark.slow]

MiB = 1 << 20


async def test_an_epoch_that_was_answered_survives_kills_and_is_one_holders(tmp_path: Path) -> None:
    rng = random.Random(3)
    answers: dict[int, str] = {}
    async with storage(tmp_path) as shared:
        daemon = await shared.start("n1", "host1")
        await Control(daemon).create("d", MiB)
        for life in range(4):
            control = Control(daemon)
            enough = trio.Event()

            async def acquire(
                control: Control, holder: str, epoch: int, answered: list[int], enough: trio.Event
            ) -> None:
                try:
                    lease = await control.ask(LEASE_ACQUIRE, LeaseRequest("d", epoch, holder))
                except CallFailed:  # killed meanwhile: nobody knows, and nothing was promised
                    return
                except OperatorError:
                    return
                assert (lease.epoch, lease.holder) == (epoch, holder)
                assert answers.setdefault(epoch, holder) == holder
                answered.append(epoch)
                if len(answered) >= 3:
                    enough.set()

            lowest = max(answers, default=0)
            answered: list[int] = []
            async with trio.open_nursery() as nursery:
                for number in range(12):
                    epoch = lowest + 1 + number // 2 + rng.randrange(3)
                    holder = f"h{life}.{number}"
                    nursery.start_soon(acquire, control, holder, epoch, answered, enough)
                with trio.move_on_after(10):
                    await enough.wait()
                daemon.process.send_signal(signal.SIGKILL)
                await daemon.process.wait()
            await daemon.start()
            lease = await Control(daemon).ask(LEASE_SHOW, ImageName("d"))
            assert lease.epoch >= max(answers)
            assert answers.get(lease.epoch, lease.holder) == lease.holder
            assert "is refused" in await Control(daemon).refuses_acquire("d", max(answers), "another")


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def knock(address: Address, export: str) -> bytes:
    """One attempt to open an export; the last option reply's data."""
    async with await trio.open_tcp_stream(address.host, address.port) as stream:
        await stream.send_all(client.FIXED_NO_ZEROES + client.go(export))
        data = b""
        while True:
            data += await stream.receive_some()
            replies, _ = client.option_replies(data[client.GREETING_BYTES :])
            if replies:
                assert replies[-1].kind == client.ERR_POLICY
                return replies[-1].data


async def test_a_fenced_client_that_comes_back_for_ever_costs_nothing(tmp_path: Path) -> None:
    async with storage(tmp_path) as shared:
        daemon = await shared.start("n1", "host1")
        control = Control(daemon)
        await control.create("d", MiB)
        await control.acquire("d", 1)
        await control.acquire("d", 2)
        address = Address.parse(daemon.ready["nbd"])
        with trio.fail_after(60):
            assert b"epoch 1 is not the lease" in await knock(address, "d@1")
            before = len(daemon.log())
            before_fds = descriptors(daemon.process.pid)
            for _ in range(300):
                await knock(address, "d@1")
            assert (await control.show("d")).connections == 0
            while descriptors(daemon.process.pid) > before_fds + 2:  # noqa: ASYNC110 - in a process
                await trio.sleep(0.05)
        assert len(daemon.log()) < before + 2000
        assert b"under lease: epoch 2" in await knock(address, "d")

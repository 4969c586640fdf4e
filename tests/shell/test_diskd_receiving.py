"""Receiving and writing side by side: when the writing ends, its reason is what is told."""

import contextlib
import errno
import threading

import pytest
import trio
import trio.testing
from diskd_target import start_target
from diskd_target_peers import call, exported, open_export, two_disks

from daemonkit.rpc import connect
from diskd.core import target_calls as calls
from diskd.core.stream import Ready
from diskd.shell.receiving import BUFFERS, Received, receive_frames


class EndlessReceiver:
    """Frames come as fast as there are buffers for them."""

    def __init__(self) -> None:
        self.trailer = None
        self.has_filled_all = threading.Event()
        self._filled = 0

    def receive_blocking(self, buffer):
        self._filled += 1
        if self._filled == BUFFERS:
            self.has_filled_all.set()
        return Received(batch=[], rows=None, buffer=buffer)


@pytest.mark.parametrize("pause", [0, 0.02], ids=["without-a-pause", "with-pauses"])
async def test_a_source_that_drips_is_ended_like_any_other(tmp_path, nursery, pause):
    """It always has something for the thread that receives, which is to notice all the same."""
    address, _ = await start_target(nursery, tmp_path)
    frozen, (data, _, opening) = await exported(two_disks())
    async with connect(address) as client:
        peer = await open_export(client)
        await peer.stream.send_all(data[: len(opening) + 100])
        assert isinstance(await peer.reply(), Ready)

        async def drip():
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                for byte in data[len(opening) + 100 :]:
                    await peer.stream.send_all(bytes([byte]))
                    await trio.sleep(pause)

        async with trio.open_nursery() as dripping:
            dripping.start_soon(drip)
            with trio.fail_after(10):
                answer = await call(address, calls.SETTLE, calls.PointName("web", frozen.point))
            assert not answer.committed
            dripping.cancel_scope.cancel()


async def never(*_):
    raise AssertionError("nothing was written")


@pytest.mark.parametrize("waits", [True, False])
async def test_a_failed_write_is_the_only_error_wherever_the_receiver_was(waits):
    """``waits``: it has filled every buffer and waits for one; otherwise it is just receiving."""
    receiver = EndlessReceiver()

    def write(batch, rows):
        if waits:
            assert receiver.has_filled_all.wait(30)
            # The thread's result is on its way to the loop; after it nobody has anything left to do.
            trio.from_thread.run(trio.testing.wait_all_tasks_blocked, 0.05)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.RaisesGroup(pytest.RaisesExc(OSError, match="No space left"), flatten_subgroups=True):
        await receive_frames(receiver, write, never, threads=trio.CapacityLimiter(4), idle_seconds_max=30)

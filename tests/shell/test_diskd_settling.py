"""A source asks about its point, or comes back with it, while the target is at its slowest (B3)."""

import contextlib
import threading

import pytest
import trio
import trio.testing
from diskd_target import start_target
from diskd_target_peers import call, exported, open_export, two_disks

from daemonkit.rpc import connect
from diskd.core import target_calls as calls
from diskd.core.stream import Committed, RefusedReply
from diskd.shell.repository_files import RepositoryFiles


@pytest.fixture
def library():
    return two_disks()


class SlowFiles(RepositoryFiles):
    """The directory of a new point, or its manifest, takes until it is let go."""

    def __init__(self, what):
        self.what, self.began, self.go_on = what, threading.Event(), threading.Event()

    def _wait(self, what):
        if what == self.what:
            self.began.set()
            assert self.go_on.wait(30)

    def make_directory(self, path):
        if path.name.startswith("."):
            self._wait("begin")
        super().make_directory(path)

    def write_file(self, path, data):
        if path.name == "manifest.json":
            self._wait("commit")
        super().write_file(path, data)


async def test_settling_ends_a_stream_that_has_just_begun(tmp_path, library, nursery):
    """There is nothing of it on the disk yet that could be taken away from it (B3)."""
    files = SlowFiles("begin")
    address, _ = await start_target(nursery, tmp_path, files=files)
    frozen, (data, _, opening) = await exported(library)
    answers = []

    async def settle():
        answers.append(await call(address, calls.SETTLE, calls.PointName("web", frozen.point)))

    async with connect(address) as client:
        peer = await open_export(client)
        await peer.stream.send_all(opening)
        await trio.to_thread.run_sync(files.began.wait)
        async with trio.open_nursery() as settling:
            settling.start_soon(settle)
            await trio.testing.wait_all_tasks_blocked(0.1)
            files.go_on.set()
        assert [answer.committed for answer in answers] == [False]
        with contextlib.suppress(trio.BrokenResourceError):
            await peer.stream.send_all(data[len(opening) :])
        assert isinstance(await peer.last_reply(), RefusedReply)
    assert (await call(address, calls.LIST, calls.VmName(None))).points == []


async def test_a_source_that_comes_back_during_the_commit_finds_the_point(tmp_path, library, nursery):
    """Its first connection broke, as far as it knows: what it has sent is not thrown away."""
    files = SlowFiles("commit")
    address, _ = await start_target(nursery, tmp_path, files=files)
    frozen, (data, events, opening) = await exported(library)
    committed = Committed(frozen.point, events[-1].digest.hex())
    async with connect(address) as client, connect(address) as again:
        peer, second = await open_export(client), await open_export(again)
        await peer.stream.send_all(data)
        await trio.to_thread.run_sync(files.began.wait)
        await second.stream.send_all(opening)
        await trio.testing.wait_all_tasks_blocked(0.1)
        files.go_on.set()
        assert await peer.last_reply() == committed
        assert await second.last_reply() == committed

"""Real processes are killed in the middle of a backup, which goes on; only what was lost goes twice."""

import os
import signal

import pytest
import trio
from diskd_cutting_proxy import CuttingProxy
from diskd_process import BINARIES, diskd
from diskd_target_process import target_process

from diskd.core.partial import newest
from diskd.shell.repository import open_repository

pytestmark = [pytest.mark.interop, pytest.mark.slow]

MiB = 1 << 20
SIZE = 48 * MiB
PAUSE = 20 * MiB


def half_random(size):
    """Every MiB of it becomes about half as long."""
    return b"".join(os.urandom(MiB // 2) + bytes([7]) * (MiB // 2) for _ in range(0, size, MiB))


async def until(condition):
    with trio.fail_after(60):
        while not condition():  # noqa: ASYNC110 - what is waited for lies in other processes
            await trio.sleep(0.05)


class Interrupted:
    """A backup through a proxy that has fallen silent when the target has made a part of it durable."""

    def __init__(self, tmp_path, daemon, target, contents, *options):
        """``contents``: of the images; ``options``: of the backup that is interrupted."""
        self.daemon, self.target = daemon, target
        self.repository = tmp_path / "repository"
        self.contents, self.options = contents, options
        self.size = sum(map(len, contents.values()))
        self.file = tmp_path / "content"
        self.proxy = CuttingProxy(target.address, [])
        self.client = None

    async def begin(self, nursery):
        for name, content in self.contents.items():
            self.file.write_bytes(content)
            await self.daemon.do("image", "import", name, str(self.file))
        self.proxy.pause_at = PAUSE
        self.front = str(await self.proxy.serve(nursery))
        images = [option for name in self.contents for option in ("--image", name)]
        argv = ["--control", self.daemon.ready["control"], *self.backup(), *images, *self.options]
        self.client = await trio.lowlevel.open_process([str(BINARIES / "diskctl"), *argv])
        await until(lambda: list(self.repository.glob("web/.incoming-*/progress")))
        await until(self._is_recorded)

    def _is_recorded(self):
        [path] = self.repository.glob("web/.incoming-*/progress")
        return newest(path.read_bytes()) is not None

    def backup(self, *options):
        return ["backup", "--vm", "web", "--target", self.front, *options]

    def go_on(self):
        """The proxy is itself again; how much it has carried."""
        self.proxy.pause_at = None
        return sum(self.proxy.carried)

    async def check(self, before):
        assert sum(self.proxy.carried) - before < self.size - PAUSE // 2
        assert await self.target.end(signal.SIGTERM) == 0
        with open_repository(self.repository) as repository:
            [listed] = repository.listing("web")
            assert repository.verify("web", listed.point, lambda: None).problems == []
            with repository.open("web", listed.point) as opened:
                for name, content in self.contents.items():
                    assert opened.views[name].read(0, len(content)) == content
        for name in self.contents:
            assert [point["valid"] for point in await self.daemon.json("point", "list", name)] == [True]


@pytest.fixture(params=["one-disk", "three-disks-compressed"])
async def scene(tmp_path, request):
    async with diskd(tmp_path / "disks") as daemon, target_process(tmp_path / "repository") as target:
        if request.param == "one-disk":
            made = Interrupted(tmp_path, daemon, target, {"d": os.urandom(SIZE)})
        else:
            # At the pause about twice as much as was carried is there, of all three.
            contents = {name: half_random(SIZE // 2) for name in ("d", "e", "f")}
            made = Interrupted(tmp_path, daemon, target, contents, "--compress")
        yield made
        if made.client is not None and made.client.returncode is None:
            made.client.kill()
            await made.client.wait()


async def test_a_killed_target(scene, nursery):
    await scene.begin(nursery)
    await scene.target.end(signal.SIGKILL)
    await scene.target.start()
    scene.proxy.target = scene.target.address
    before = scene.go_on()
    with trio.fail_after(60):
        assert await scene.client.wait() == 0
    await scene.check(before)


async def test_a_killed_diskd(scene, nursery):
    await scene.begin(nursery)
    await scene.daemon.end(signal.SIGKILL)
    with trio.fail_after(60):
        assert await scene.client.wait() == 1
    await scene.daemon.start()
    before = scene.go_on()
    await scene.daemon.do(*scene.backup("--resume"))
    await scene.check(before)


async def test_a_killed_client(scene, nursery):
    await scene.begin(nursery)
    scene.client.kill()
    await scene.client.wait()
    before = scene.go_on()
    await until(lambda: "suspend" in scene.daemon.log())
    await scene.daemon.do(*scene.backup("--resume"))
    await scene.check(before)

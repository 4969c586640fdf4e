"""The process driver over real processes: detached, adopted by the lock, stopped, reported once."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from clusterd.core.events import RunEnded, RunNotStarted, RunStarted
from clusterd.core.types import Disk, VmConfig
from clusterd.shell.drivers.orders import RunOrders
from clusterd.shell.drivers.port import Surroundings
from clusterd.shell.drivers.process import ProcessDriver
from clusterd.shell.drivers.run_lock import RunFiles
from daemonkit.ports import Address

DEADLINE_S = 20
SURROUNDINGS = Surroundings("n1", {"main": Address("127.0.0.1", 10809)})
FOREVER = ("sleep", "100000")

# Starts a run as a clusterd would, says its pid, and then only waits to be killed.
SPAWNER = """
import sys, pathlib, trio
from clusterd.core.types import VmConfig
from clusterd.shell.drivers.port import Surroundings
from clusterd.shell.drivers.process import ProcessDriver
async def main():
    async with trio.open_nursery() as nursery:
        driver = ProcessDriver(pathlib.Path(sys.argv[1]), Surroundings("n1", {}),
                               lambda event: print(event.pid, flush=True), nursery)
        await driver.start(VmConfig("web", argv=("sleep", "100000")), 7)
        await trio.sleep_forever()
trio.run(main)
"""


class Observed:
    """The driver's reports, and a way to wait for one."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self._changed = trio.Event()

    def report(self, event: object) -> None:
        self.events.append(event)
        self._changed.set()
        self._changed = trio.Event()

    async def wait(self, wanted: Callable[[object], bool]) -> object:
        with trio.fail_after(DEADLINE_S):
            while True:
                for event in self.events:
                    if wanted(event):
                        return event
                await self._changed.wait()

    async def started(self, epoch: int) -> RunStarted:
        found = await self.wait(lambda event: isinstance(event, RunStarted) and event.epoch == epoch)
        assert isinstance(found, RunStarted)
        return found

    async def ended(self, epoch: int) -> RunEnded:
        found = await self.wait(lambda event: isinstance(event, RunEnded) and event.epoch == epoch)
        assert isinstance(found, RunEnded)
        return found


@contextlib.asynccontextmanager
async def running_driver(
    directory: Path, *, stop_seconds_max: float = 5
) -> AsyncIterator[tuple[ProcessDriver, Observed]]:
    observed = Observed()
    with contextlib.ExitStack() as closing:
        async with trio.open_nursery() as nursery:
            driver = ProcessDriver(
                directory, SURROUNDINGS, observed.report, nursery, stop_seconds_max=stop_seconds_max
            )
            closing.callback(driver.close)
            yield driver, observed
            nursery.cancel_scope.cancel()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """Whatever a test leaves running is found by its lock and killed."""
    yield tmp_path
    for lock in (tmp_path / "runs").glob("*.lock"):
        vm, epoch = lock.name.removesuffix(".lock").rsplit(".", 1)
        for pid in RunFiles(tmp_path / "runs", vm, int(epoch)).holders():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def lives(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


async def test_a_run_knows_its_name_its_epoch_and_its_disks(directory: Path) -> None:
    config = VmConfig(
        "web",
        argv=("sh", "-c", "echo {vm} {epoch} {node} {disk:sys-1}; env | grep ^HOLDFAST_; exit 3"),
        disks=(Disk("sys-1", "web-system"),),
    )
    async with running_driver(directory) as (driver, observed):
        await driver.start(config, 4)
        ended = await observed.ended(4)
    assert (ended.exit_code, ended.reason) == (3, "its process exited with code 3")
    first, *environment = (directory / "vms" / "web.log").read_text().splitlines()
    uri = "nbd://127.0.0.1:10809/web-system@4"
    assert first == f"web 4 n1 {uri}"
    assert set(environment) >= {
        f"HOLDFAST_DISK_SYS_1={uri}",
        "HOLDFAST_VM=web",
        "HOLDFAST_EPOCH=4",
        "HOLDFAST_HOST=n1",
    }
    assert list((directory / "runs").iterdir()) == []


async def test_a_run_leads_a_session_of_its_own_and_is_stopped_when_asked(directory: Path) -> None:
    async with running_driver(directory) as (driver, observed):
        await driver.start(VmConfig("web", argv=FOREVER), 1)
        pid = (await observed.started(1)).pid
        assert os.getsid(pid) == os.getpgid(pid) == pid
        await driver.stop("web", 1, force=False)
        assert (await observed.ended(1)).exit_code == -signal.SIGTERM
        assert not lives(pid)
        await driver.stop("web", 1, force=True)
        ends = [event for event in observed.events if isinstance(event, RunEnded)]
        assert len(ends) == 2, "a stop is answered also where nothing runs any more"


async def test_a_stop_never_overtakes_its_start(directory: Path) -> None:
    """Ordered together, they begin together, in any order: the start counts as first."""
    async with running_driver(directory) as (driver, observed), trio.open_nursery() as nursery:
        orders = RunOrders(driver, nursery)
        for epoch in range(1, 9):
            orders.start(VmConfig("web", argv=FOREVER), epoch)
            orders.stop("web", epoch, force=True)
        for epoch in range(1, 9):
            await observed.ended(epoch)
        kinds = {epoch: [type(e) for e in observed.events if e.epoch == epoch] for epoch in range(1, 9)}
    assert kinds == {epoch: [RunStarted, RunEnded] for epoch in range(1, 9)}
    assert list((directory / "runs").iterdir()) == []


async def test_one_that_ignores_sigterm_is_killed(directory: Path) -> None:
    argv = ("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1000; done")
    async with running_driver(directory, stop_seconds_max=0.1) as (driver, observed):
        await driver.start(VmConfig("deaf", argv=argv), 2)
        await observed.started(2)
        with trio.fail_after(DEADLINE_S):
            while "ready" not in (directory / "vms" / "deaf.log").read_text():
                await trio.lowlevel.checkpoint()
        await driver.stop("deaf", 2, force=False)
        assert (await observed.ended(2)).exit_code == -signal.SIGKILL


async def test_what_a_run_leaves_behind_is_killed_before_it_counts_as_ended(directory: Path) -> None:
    # Of all descriptors the shell's child keeps the lock: it is part of the run.
    argv = ("sh", "-c", "sleep 100000 & echo $!; exit 0")
    async with running_driver(directory) as (driver, observed):
        await driver.start(VmConfig("parent", argv=argv), 3)
        assert (await observed.ended(3)).exit_code == 0
    assert not lives(int((directory / "vms" / "parent.log").read_text()))


async def test_the_same_run_is_not_started_twice(directory: Path) -> None:
    config = VmConfig("web", argv=FOREVER)
    async with running_driver(directory) as (driver, observed):
        await driver.start(config, 5)
        await driver.start(config, 5)
        assert len({event.pid for event in observed.events if isinstance(event, RunStarted)}) == 1
        await driver.stop("web", 5, force=True)
        await observed.ended(5)


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("/no/such/program",), "/no/such/program: No such file or directory"),
        (("{disk:other}",), "VM web: argv names disk 'other', which it does not have"),
    ],
)
async def test_what_cannot_start_says_why(directory: Path, argv: tuple[str, ...], reason: str) -> None:
    async with running_driver(directory) as (driver, observed):
        await driver.start(VmConfig("web", argv=argv), 6)
    assert observed.events == [RunNotStarted("web", 6, reason)]


@pytest.mark.parametrize("note", ["kept", "lost", "of another process"])
async def test_a_run_outlives_its_clusterd_and_is_adopted(directory: Path, note: str) -> None:
    argv = [sys.executable, "-c", SPAWNER, str(directory)]
    spawner = await trio.lowlevel.open_process(argv, stdout=subprocess.PIPE)
    assert spawner.stdout is not None
    async with spawner.stdout:
        with trio.fail_after(DEADLINE_S):
            pid = int(await spawner.stdout.receive_some())
    spawner.kill()
    await spawner.wait()
    files = RunFiles(directory / "runs", "web", 7)
    if note == "lost":
        files.note.unlink()
    elif note == "of another process":
        files.write_note(os.getpid())
        files.note.write_text(files.note.read_text().replace('"start_time": "', '"start_time": "1'))
    assert lives(pid)
    async with running_driver(directory) as (driver, observed):
        await driver.adopt(VmConfig("web"), 7)
        assert (await observed.started(7)).pid == pid
        await driver.start(VmConfig("web", argv=FOREVER), 7)
        assert {event.pid for event in observed.events if isinstance(event, RunStarted)} == {pid}
        await driver.stop("web", 7, force=False)
        assert (await observed.ended(7)).exit_code is None
    assert not lives(pid)


async def test_a_run_started_again_under_the_same_epoch_is_the_run_that_lives(directory: Path) -> None:
    """A clusterd that died between spawn and its own memory of it must not start a second copy."""
    argv = ("sh", "-c", "trap 'echo alive' USR1; echo ready; while :; do sleep 0.01; done")
    config, output = VmConfig("web", argv=argv), directory / "vms" / "web.log"

    async def says(word: str) -> None:
        with trio.fail_after(DEADLINE_S):
            while word not in output.read_text():
                await trio.lowlevel.checkpoint()

    async with running_driver(directory) as (driver, observed):
        await driver.start(config, 8)
        pid = (await observed.started(8)).pid
        await says("ready")
    # The driver is closed, as when clusterd ends: the run does not notice.
    os.kill(pid, signal.SIGUSR1)
    await says("alive")
    async with running_driver(directory) as (driver, observed):
        await driver.start(config, 8)
        assert (await observed.started(8)).pid == pid
        await driver.stop("web", 8, force=True)
        await observed.ended(8)


async def test_a_run_that_is_gone_is_reported_gone(directory: Path) -> None:
    async with running_driver(directory) as (driver, observed):
        await driver.adopt(VmConfig("web"), 9)
    (ended,) = observed.events
    assert isinstance(ended, RunEnded)
    assert ended.exit_code is None

"""Freeze and thaw around the cut, with real programs: what they see, and what becomes of those that fail."""

import os
import signal
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio

from daemonkit.diskd_api import BackupDisk
from daemonkit.errors import HoldfastError
from daemonkit.hooks import BadHooks
from daemonkit.units import MILLISECOND, SECOND, MiB
from diskd.core.checkpoint import Record, RecordDisk
from diskd.core.inventory import LibrarySettings
from diskd.errors import Refused
from diskd.shell.checkpoint_records import make_directory
from diskd.shell.library import open_library

DISKS = [BackupDisk("system", "a")]
CONFIG = '[hooks]\nfreeze = ["freeze", "a word"]\nthaw = "thaw"\n'
TELL = 'echo "$HOLDFAST_HOOK $HOLDFAST_VM $1 ${HOLDFAST_CHECKPOINT%-*}" >> "LOG"\n'


@attrs.frozen
class Programs:
    directory: Path
    log: Path

    def write(self, name: str, script: str) -> Path:
        path = self.directory / name
        tell = TELL.replace("LOG", str(self.log))
        path.write_text(f"#!/bin/sh\n{tell}{script}\n")
        path.chmod(0o755)
        return path

    def said(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def programs(tmp_path):
    directory = tmp_path / "hooks"
    directory.mkdir(mode=0o755)
    made = Programs(directory, tmp_path / "log")
    made.write("freeze", "")
    made.write("thaw", "")
    return made


@asynccontextmanager
async def serving(tmp_path: Path, programs: Programs | None, timeout_ns: int = 10 * SECOND):
    shared = tmp_path / "shared"
    shared.mkdir(exist_ok=True)
    settings = LibrarySettings(
        shared_dir=str(shared),
        hooks_dir=None if programs is None else str(programs.directory),
        hook_timeout_ns=timeout_ns,
    )
    async with open_library(tmp_path / "root", settings) as library:
        if not library.images():
            await library.create_image("a", 4 * MiB)
        yield library


async def until(condition) -> None:
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - what is waited for lies outside: no event tells it
            await trio.sleep(0.005)


FROZEN, THAWED = "freeze web a word cp", "thaw web  cp"


async def test_the_guest_is_frozen_around_the_cut(tmp_path, programs):
    programs.write("freeze", "echo a long story")
    async with serving(tmp_path, programs) as library:
        frozen = await library.begin_checkpoint("web", DISKS, CONFIG)
        assert frozen.consistency == "application"
        assert programs.said() == [FROZEN, THAWED]
        await frozen.end("discard")


async def test_without_hooks_it_is_crash_consistent(tmp_path, programs):
    async with serving(tmp_path, programs) as library:
        for config in ("", "no toml [", 'name = "web"\n'):
            frozen = await library.begin_checkpoint("web", DISKS, config)
            assert frozen.consistency == "crash"
            await frozen.end("discard")
        assert programs.said() == []


async def test_a_freeze_that_fails_fails_the_backup_and_the_guest_is_thawed(tmp_path, programs):
    programs.write("freeze", "echo no agent; exit 3")
    async with serving(tmp_path, programs) as library:
        with pytest.raises(Refused, match=r"the freeze hook of web failed \(3\): no agent"):
            await library.begin_checkpoint("web", DISKS, CONFIG)
        assert programs.said() == [FROZEN, THAWED]
        await until(lambda: library.checkpoints() == [])
        assert library.points("a") == [] and library.image("a").checkpoint is None


async def test_what_could_not_be_thawed_is_not_frozen(tmp_path, programs):
    (programs.directory / "thaw").chmod(0o777)
    async with serving(tmp_path, programs) as library:
        with pytest.raises(Refused, match=r"the thaw hook of web: .* can be written by others"):
            await library.begin_checkpoint("web", DISKS, CONFIG)
        frozen = await library.begin_checkpoint("web", DISKS, CONFIG, allow_crash_consistent=True)
        assert frozen.consistency == "crash"
        assert programs.said() == []
        await frozen.end("discard")


async def test_where_that_is_allowed_it_goes_on_without(tmp_path, programs):
    programs.write("freeze", "exit 1")
    async with serving(tmp_path, programs) as library:
        frozen = await library.begin_checkpoint("web", DISKS, CONFIG, allow_crash_consistent=True)
        assert frozen.consistency == "crash" and programs.said() == [FROZEN, THAWED]
        await frozen.end("discard")


async def test_a_hook_that_hangs_is_killed_with_its_children(tmp_path, programs):
    child = tmp_path / "child"
    programs.write("freeze", f'trap "" TERM\nsleep 1000 &\necho $! > "{child}"\nwait')
    async with serving(tmp_path, programs, timeout_ns=500 * MILLISECOND) as library:
        with pytest.raises(Refused, match="took longer than 500ms and was killed"):
            await library.begin_checkpoint("web", DISKS, CONFIG)
        assert programs.said() == [FROZEN, THAWED]
    pid = int(child.read_text())

    def is_gone() -> bool:
        try:
            return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True

    await until(is_gone)


async def test_a_child_that_is_left_behind_holds_up_nothing(tmp_path, programs):
    child = tmp_path / "child"
    programs.write("freeze", f'sleep 1000 &\necho $! > "{child}"')
    async with serving(tmp_path, programs) as library:
        with trio.fail_after(5):
            frozen = await library.begin_checkpoint("web", DISKS, CONFIG)
        os.kill(int(child.read_text()), signal.SIGKILL)
        await frozen.end("discard")


async def test_a_thaw_that_fails_is_tried_again(tmp_path, programs):
    programs.write("thaw", f'test $(grep -c thaw "{programs.log}") = 2')
    async with serving(tmp_path, programs) as library:
        frozen = await library.begin_checkpoint("web", DISKS, CONFIG)
        assert frozen.consistency == "application" and programs.said() == [FROZEN, THAWED, THAWED]
        await frozen.end("discard")


async def test_a_thaw_that_fails_for_good_fails_the_backup(tmp_path, programs):
    programs.write("thaw", "exit 1")
    async with serving(tmp_path, programs) as library:
        with pytest.raises(Refused, match="the thaw hook of web failed"):
            await library.begin_checkpoint("web", DISKS, CONFIG)
        await until(lambda: library.checkpoints() == [])
        await until(lambda: library.image("a").checkpoint is None)
        frozen = await library.begin_checkpoint("web", DISKS, CONFIG, allow_crash_consistent=True)
        assert frozen.consistency == "crash"
        await frozen.end("discard")


async def test_whoever_asked_may_go_but_the_guest_is_thawed(tmp_path, programs):
    gate = tmp_path / "gate"
    programs.write("freeze", f'until test -e "{gate}"; do sleep 0.01; done')
    async with serving(tmp_path, programs) as library:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(library.begin_checkpoint, "web", DISKS, CONFIG)
            await until(lambda: programs.said() == [FROZEN])
            nursery.cancel_scope.cancel()
            gate.touch()
        assert programs.said() == [FROZEN, THAWED]
        await until(lambda: library.checkpoints() == [])


async def test_a_cut_that_fails_thaws(tmp_path, programs):
    async with serving(tmp_path, programs) as library:
        image = library._images["a"].image
        # The point that is being cut is taken back under the hold's nose: the freeze of the bitmap refuses.
        programs.write("freeze", f'cd "{tmp_path}"; touch frozen; until test -e go; do sleep 0.01; done')
        async with trio.open_nursery() as nursery:

            async def begin() -> None:
                with pytest.raises(HoldfastError):
                    await library.begin_checkpoint("web", DISKS, CONFIG)

            nursery.start_soon(begin)
            await until(lambda: (tmp_path / "frozen").exists())
            await image.cancel_cut()
            (tmp_path / "go").touch()
        assert programs.said() == [FROZEN, THAWED]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ('"/bin/true"', "is not a program in hooks_dir"),
        ('"../freeze"', "is not a program in hooks_dir"),
        ('"{directory}/../hooks/freeze"', "is not a program in hooks_dir"),
        ('"missing"', "No such file"),
        ('"text"', "is not an executable file"),
        ('"open"', "can be written by others than root"),
        ('["freeze", "/bin/sh"]', None),
        ('"{directory}/freeze"', None),
    ],
)
async def test_only_what_the_administrator_put_there_is_run(tmp_path, programs, words, reason):
    (programs.directory / "text").write_text("text")
    programs.write("open", "").chmod(0o777)
    config = f'[hooks]\nthaw = "thaw"\nfreeze = {words.replace("{directory}", str(programs.directory))}\n'
    async with serving(tmp_path, programs) as library:
        if reason is None:
            assert (await library.begin_checkpoint("web", DISKS, config)).consistency == "application"
            return
        with pytest.raises(Refused, match=reason):
            await library.begin_checkpoint("web", DISKS, config)
        assert programs.said() == [], "nothing was run, so nothing needs thawing"
        frozen = await library.begin_checkpoint("web", DISKS, config, allow_crash_consistent=True)
        assert frozen.consistency == "crash"


async def test_a_directory_that_others_may_write_is_not_trusted(tmp_path, programs):
    programs.directory.chmod(0o777)
    async with serving(tmp_path, programs) as library:
        with pytest.raises(Refused, match="can be written by others"):
            await library.begin_checkpoint("web", DISKS, CONFIG)


async def test_by_default_no_hook_is_run(tmp_path):
    async with serving(tmp_path, None) as library:
        with pytest.raises(Refused, match="set hooks_dir"):
            await library.begin_checkpoint("web", DISKS, CONFIG)
        with pytest.raises(BadHooks, match="thaw is missing"):
            await library.begin_checkpoint("web", DISKS, '[hooks]\nfreeze = "x"\n')


async def test_a_killed_diskd_thaws_at_its_next_start(tmp_path, programs):
    async with serving(tmp_path, programs) as library:
        uuid = library.image("a").uuid
    disks = [RecordDisk("system", "a", uuid)]
    record = Record(f"cp-{1:016x}", "web", f"rp-{1:016x}", "backup", "crash", 1, CONFIG, disks)
    (await make_directory(tmp_path / "root/checkpoints", record, "killed")).close()
    async with serving(tmp_path, programs) as library:
        await until(lambda: library.checkpoints() == [])
        assert programs.said() == [THAWED]


async def test_a_guest_is_served_while_it_is_thawed_after_a_kill(tmp_path, programs):
    """Thawing may need the guest's own disk: a start that waited for it would wait for itself."""
    served, thawed = tmp_path / "served", tmp_path / "thawed"
    async with serving(tmp_path, programs) as library:
        uuid = library.image("a").uuid
    disks = [RecordDisk("system", "a", uuid)]
    record = Record(f"cp-{1:016x}", "web", f"rp-{1:016x}", "backup", "crash", 1, CONFIG, disks)
    (await make_directory(tmp_path / "root/checkpoints", record, "killed")).close()
    programs.write("thaw", f'while ! [ -e "{served}" ]; do sleep 0.02; done; touch "{thawed}"')
    async with serving(tmp_path, programs, timeout_ns=SECOND) as library:
        assert not thawed.exists()
        with pytest.raises(Refused, match=f"checkpoint {record.checkpoint} of VM web is held"):
            await library.begin_checkpoint("web", DISKS, CONFIG)
        served.touch()
        await until(lambda: library.checkpoints() == [])
        assert thawed.exists()

"""SAN mode: what a snapshot holds beside the frozen disks, and one that cannot be recorded."""

import os
from pathlib import Path

import pytest
import trio
from diskd_san_place import DISKS, nothing, place_on, put

from daemonkit.rpc import Call
from diskd.core import avhd
from diskd.core import san_calls as calls
from diskd.shell.files import Files
from diskd.shell.san import _begin, _end

pytestmark = pytest.mark.slow


class BusyGuest:
    """A library whose guest writes as soon as a checkpoint stands."""

    def __init__(self, library):
        self._library = library

    def __getattr__(self, name):
        return getattr(self._library, name)

    async def begin_checkpoint(self, *arguments, **more):
        frozen = await self._library.begin_checkpoint(*arguments, **more)
        await put(self._library, "a", 8192, b"later" * 1000)
        return frozen


async def test_the_avhd_in_a_snapshot_is_as_new_as_its_map_says(tmp_path):
    """For a third party that wants the newest state: AVHD, map and parent are durable before the snapshot."""
    with place_on("command", tmp_path) as place:
        async with place.serving() as (library, san):
            san.library = BusyGuest(library)
            wanted = calls.SanBegin("fast", "web", DISKS, "", None)
            made = await _begin(san)(wanted, Call("test", nothing))
            files = Files(Path(made.path) / "images" / "a")
            head = files.run_blocking(avhd.load_head())
            assert head is not None
            states = avhd.AvhdMap.over(head, bytearray(files.run_blocking(avhd.load_cells(head))))
            files.close()
            assert [states.state(block) for block in range(5)] == [
                avhd.PARENT, avhd.PARENT, avhd.DATA, avhd.DATA, avhd.PARENT
            ]  # fmt: skip
            await _end(san)(calls.SanEnd(made.point, "keep"), Call("test", nothing))
            await place.gone()


async def test_a_snapshot_that_cannot_be_recorded_is_not_asked_for(tmp_path):
    with place_on("command", tmp_path) as place:
        async with place.serving() as (library, san):
            (place.root / "san").write_text("in the way")
            with pytest.raises(OSError, match="exists"):
                await _begin(san)(calls.SanBegin("fast", "web", DISKS, "", None), Call("test", nothing))
            assert os.listdir(place.snapshots) == []
            with trio.fail_after(20):
                while library.checkpoints():  # noqa: ASYNC110 - no event tells it from outside
                    await trio.sleep(0.01)
            assert library.points("a") == []

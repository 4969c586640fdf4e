"""Checkpoints on a file system that is full, or is getting full: a real small ext4."""

import contextlib
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from loop_mounts import loop_mount

from daemonkit.diskd_api import BackupDisk
from daemonkit.units import KiB, MiB
from diskd.core.inventory import LibrarySettings
from diskd.core.space import Reserve
from diskd.errors import Refused
from diskd.shell.library import open_library

BLOCK = 4096
SIZE = 4 * MiB
DISKS = [BackupDisk("system", "a")]


@pytest.fixture
def small():
    with loop_mount("ext4") as mount:
        yield mount


def fill(mount: Path, *, leave: int = 0) -> Path:
    """To the last byte, or nearly; remove the returned file to have the space back."""
    filler = mount / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"f" * BLOCK)
    if leave:
        with filler.open("r+b") as file:
            file.truncate(max(0, filler.stat().st_size - leave))
    return filler


@asynccontextmanager
async def serving(mount: Path, shared: Path, **changes):
    settings = LibrarySettings(shared_dir=str(shared), merge_batch_bytes=64 * KiB, **changes)
    async with open_library(mount / "root", settings) as library:
        yield library


async def until(condition) -> None:
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - what is waited for lies outside: no event tells it
            await trio.sleep(0.005)


async def plain(library):
    return (await library.open("a", peer="test", drop=lambda _: None)).device


@pytest.mark.parametrize("fua", [False, True])
async def test_a_clean_restart_on_a_full_disk_serves_what_is_forked(small, tmp_path, fua):
    content = b"".join(bytes([number]) * BLOCK for number in range(1, 9))
    async with serving(small, tmp_path) as library:
        await library.create_image("a", SIZE)
        await (await plain(library)).write(0, bytes([77]) * len(content))
        await library.begin_checkpoint("web", DISKS, "", held_by="hand")
        await (await plain(library)).write(0, content, fua=fua)
    fill(small, leave=8 * BLOCK)  # the records of who serves what are files, and need some
    async with serving(small, tmp_path, low_disk_limit=None) as library:
        assert library.image("a").state == "open", library.image("a").reason
        device = await plain(library)
        assert await device.read(0, len(content)) == content
        await device.write(0, content[::-1], fua=True)
    (small / "filler").unlink()
    async with serving(small, tmp_path) as library:
        assert await (await plain(library)).read(0, len(content)) == content[::-1]


async def test_below_the_limit_no_checkpoint_begins(small, tmp_path):
    async with serving(small, tmp_path, low_disk_limit=Reserve(size_bytes=12 * MiB)) as library:
        await library.create_image("a", SIZE)
        filler = fill(small, leave=10 * MiB)
        with pytest.raises(Refused, match=r"less than low_disk_limit \(12MiB\)"):
            await library.begin_checkpoint("web", DISKS, "")
        shown = library.image("a").space
        assert shown is not None and shown.low_disk_limit_bytes == 12 * MiB > shown.free_bytes
        assert library.image("a").checkpoint is None and library.checkpoints() == []
        filler.unlink()
        await (await library.begin_checkpoint("web", DISKS, "")).end("discard")


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_running_checkpoint_is_given_up_before_the_disk_is_full(small, tmp_path, restarted):
    limits = {"low_disk_limit": Reserve(percent=30)}
    async with serving(small, tmp_path, **limits) as library:
        await library.create_image("a", SIZE)
        frozen = await library.begin_checkpoint("web", DISKS, "", held_by="hand")
        await (await plain(library)).write(0, b"n" * BLOCK)
        held = library.image("a").space
        assert held is not None and held.avhd_bytes == BLOCK
        if not restarted:
            filler = fill(small, leave=5 * MiB)
            await until(lambda: library.image("a").checkpoint is None)
            assert library.checkpoints()[0].state == "invalid"
            with pytest.raises(Refused, match=frozen.checkpoint):
                await library.begin_checkpoint("web", DISKS, "")
            await frozen.end("discard")
    if restarted:
        filler = fill(small, leave=5 * MiB)
    async with serving(small, tmp_path, **limits) as library:
        await until(lambda: library.image("a").checkpoint is None)
        assert await (await plain(library)).read(0, BLOCK) == b"n" * BLOCK
    filler.unlink()


async def test_where_space_is_short_a_merge_gives_it_back_as_it_goes(small, tmp_path):
    """The parent is empty and the AVHD takes half of what is left: both do not fit at once."""
    async with serving(small, tmp_path, low_disk_limit=None) as library:
        await library.create_image("a", 16 * MiB)
        device = await plain(library)
        frozen = await library.begin_checkpoint("web", DISKS, "")
        for offset in range(0, 12 * MiB, MiB):
            await device.write(offset, bytes([offset // MiB + 1]) * MiB)
        await device.flush()
        filler = fill(small, leave=3 * MiB)
        await frozen.end("discard")
        await until(lambda: library.image("a").checkpoint is None)
        for offset in range(0, 12 * MiB, MiB):
            assert await device.read(offset, MiB) == bytes([offset // MiB + 1]) * MiB
        filler.unlink()

"""A root with two images on a file system of choice, and a provider of snapshots that can misbehave."""

import os
import shutil
from contextlib import asynccontextmanager, contextmanager

import trio
from loop_mounts import loop_mount

from daemonkit.diskd_api import BackupDisk
from diskd.core.inventory import LibrarySettings
from diskd.shell.library import open_library
from diskd.shell.san import San

KiB, MiB = 1 << 10, 1 << 20
DISKS = [BackupDisk("root", "a"), BackupDisk("data", "b")]

COPYING = """#!/bin/sh
# A provider for tests: copies. MODE says how it misbehaves.
mode=$(cat "$(dirname "$0")/mode")
where="$(dirname "$0")/snapshots/$2"
case "$1 $mode" in
    *hangs) exec tail -f /dev/null ;;
    "create waits") touch "$(dirname "$0")/began"; while [ ! -e "$(dirname "$0")/go" ]; do sleep 0.02; done
        mkdir -p "$where" && cp -r "$3/images" "$where" && echo "$where" ;;
    "create fails") mkdir -p "$where"; echo "the array is on fire" >&2; exit 3 ;;
    "create lies") echo "$where/nowhere" ;;
    "create forks") (echo lives; exec tail -f /dev/null) >"$(dirname "$0")/alive" & wait ;;
    "create talks") echo "creating"; echo "$where" ;;
    "delete stuck") echo "in use" >&2; exit 1 ;;
    "delete dawdles") touch "$(dirname "$0")/deleting"
        while [ ! -e "$(dirname "$0")/go" ]; do sleep 0.02; done
        rm -rf "$where" ;;
    create*) mkdir -p "$where" && cp -r "$3/images" "$where" && echo "$where" ;;
    delete*) rm -rf "$where" ;;
esac
"""


class Place:
    """A root with two images, and san.toml beside them."""

    def __init__(self, directory, kind):
        self.root, self.directory = directory / "diskd", directory
        self.root.mkdir(parents=True)
        self.snapshots = directory / "snapshots"
        self.snapshots.mkdir()
        self.shared = directory / "shared"
        self.shared.mkdir()
        text = f'[providers.fast]\nkind = "{kind}"\n'
        if kind == "command":
            (directory / "mode").write_text("works")
            (directory / "snap").write_text(COPYING)
            (directory / "snap").chmod(0o755)
            text += f'command = ["{directory}/snap"]\ntimeout_s = 2\n'
        if kind == "btrfs":
            text += f'subvolume = "{directory}"\n'
        if kind != "command":
            text += f'directory = "{self.snapshots}"\n'
        (self.root / "san.toml").write_text(text)
        (self.root / "san.toml").chmod(0o600)

    def mode(self, word):
        (self.directory / "mode").write_text(word)

    @asynccontextmanager
    async def serving(self, **changes):
        settings = LibrarySettings(shared_dir=str(self.shared), **changes)
        async with open_library(self.root, settings) as library:
            if not library.images():
                for name in ("a", "b"):
                    await library.create_image(name, 4 * MiB)
            san = San(library, self.root)
            await san.recover()
            async with trio.open_nursery() as running:
                running.start_soon(san.run)
                yield library, san
                running.cancel_scope.cancel()

    def patient(self):
        """Its provider may take as long as it likes."""
        file = self.root / "san.toml"
        file.write_text(file.read_text().replace("timeout_s = 2", "timeout_s = 600"))

    async def until(self, name):
        """Waits until the provider has got there."""
        with trio.fail_after(30):
            while not (self.directory / name).exists():  # noqa: ASYNC110 - another process tells
                await trio.sleep(0.01)

    async def gone(self):
        """Waits until nothing is left of any snapshot."""
        with trio.fail_after(30):
            while self.left():  # noqa: ASYNC110 - another process tells
                await trio.sleep(0.01)

    def left(self):
        records = self.root / "san"
        files = [path.name for path in records.rglob("*") if path.is_file()] if records.is_dir() else []
        return sorted(os.listdir(self.snapshots)) + files


@contextmanager
def place_on(kind, tmp_path):
    if kind == "command":
        yield Place(tmp_path / "place", kind)
    else:
        file_system, provider = kind.split("-")
        with loop_mount(file_system) as mount:
            if provider == "btrfs":
                shutil.rmtree(mount / "volume", ignore_errors=True)
            yield Place(mount / "volume" if provider != "btrfs" else mount, provider)


async def put(library, image, offset, data):
    export = await library.open(image, peer="test", drop=lambda _reason: None)
    try:
        if not export.device.write_nowait(offset, data):
            await export.device.write(offset, data)
    finally:
        export.close()


async def get(library, image):
    export = await library.open(image, peer="test", drop=lambda _reason: None)
    try:
        return await export.device.read(0, 4 * MiB)
    finally:
        export.close()


async def nothing(_value):
    await trio.lowlevel.checkpoint()

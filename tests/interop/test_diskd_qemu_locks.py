"""Stock qemu tools refuse to change the raw file of a served image, and a served image refuses them."""

import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio
from image_harness import MiB, Place, new_place, open_image

from diskd.errors import Refused
from diskd.shell.image import Image

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        not (shutil.which("qemu-img") and shutil.which("qemu-io")), reason="qemu-utils not installed"
    ),
]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with new_place(tmp_path) as made:
        yield made


async def run(*argv: str) -> subprocess.CompletedProcess[bytes]:
    return await trio.run_process(argv, capture_stdout=True, capture_stderr=True, check=False)


async def test_qemu_refuses_to_change_a_served_raw_file(place: Place) -> None:
    await Image.create(place.directory, 16 * MiB)
    raw = str(place.directory / "disk.raw")
    async with open_image(place) as image:
        for argv in (
            ("qemu-io", "-f", "raw", "-c", "write 0 4096", raw),
            ("qemu-img", "resize", "-f", "raw", raw, "32M"),
        ):
            done = await run(*argv)
            assert done.returncode != 0
            assert b"lock" in done.stderr
        await image.close()
    assert (await run("qemu-img", "info", "-f", "raw", raw)).returncode == 0


async def test_a_raw_file_that_qemu_uses_is_refused(place: Place) -> None:
    await Image.create(place.directory, 16 * MiB)
    raw = str(place.directory / "disk.raw")
    async with trio.open_nursery() as nursery:
        start = partial(trio.run_process, ["qemu-io", "-f", "raw", raw], check=False)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        writer = await nursery.start(partial(start, **pipes))
        await writer.stdin.send_all(b"length\n")
        # Not before it has answered: of two lines that reach it at once, it reads the second one never.
        answer = b""
        with trio.fail_after(20):
            while b"16 MiB" not in answer:
                answer += await writer.stdout.receive_some(100)
        with pytest.raises(Refused, match="in use by another program"):
            await place.open()
        await writer.stdin.send_all(b"quit\n")

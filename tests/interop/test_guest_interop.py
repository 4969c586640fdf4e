"""The guest on other people's NBD servers: nbdkit and qemu-nbd."""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from holdfast.checker.__main__ import check
from holdfast.guest.nbd import ConnectionLost, NbdClient
from holdfast.guest.run import Settings, run_guest

pytestmark = [pytest.mark.interop, pytest.mark.slow]
IMAGE_BYTES = 4 << 20


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _serving(argv: list[str], uri: str) -> Iterator[None]:
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 10
            while True:
                try:
                    NbdClient(uri).close()
                except ConnectionLost:
                    assert time.monotonic() < deadline and process.poll() is None
                else:
                    break
            yield
        finally:
            process.terminate()


@pytest.fixture(params=["nbdkit", "qemu-nbd"])
def foreign_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    tool = str(request.param)
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    image = tmp_path / "disk.raw"
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    port = _free_port()
    argv = {
        "nbdkit": ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "-e", "d@7", "file", str(image)],
        "qemu-nbd": [
            "qemu-nbd",
            "-b",
            "127.0.0.1",
            "-p",
            str(port),
            "-x",
            "d@7",
            "-t",
            "-f",
            "raw",
            str(image),
        ],
    }[tool]
    uri = f"nbd://127.0.0.1:{port}/d@7"
    with _serving(argv, uri):
        yield uri, image


def test_guest_on_a_foreign_server(foreign_server: tuple[str, Path], tmp_path: Path) -> None:
    uri, image = foreign_server
    acks = tmp_path / "acks"
    for epoch in (7, 8):
        run_guest(Settings(uri, str(acks), epoch, "n1", 2000.0, 4000.0), records_max=50)
    for where in (uri, str(image)):
        verdict = check(str(acks), where)
        assert verdict.is_good and verdict.records == 100 and verdict.load_blocks > 50
        assert verdict.owners == [(7, "n1", 1, 50), (8, "n1", 51, 100)]

"""What concerns every test: no deadlines on examples, nothing left in shared memory."""

import signal
import tomllib
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings

SHARED = Path("/dev/shm")

# A run in the background of a script ignores SIGINT, and so would every program that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says something about the machine, not about the code: see `make bench` for speed.
settings.register_profile("holdfast", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("holdfast")


@pytest.fixture(scope="session", autouse=True)
def _no_shared_bitmaps_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A killed diskd leaves its live bitmaps, for the next one to trust; here none comes.

    Theirs are told from other people's by the ids of the images that lie in this run's directories.
    """
    yield
    for file in tmp_path_factory.getbasetemp().rglob("image.toml"):
        try:
            image = UUID(tomllib.loads(file.read_text())["uuid"])
        except (ValueError, KeyError, OSError):
            continue  # some tests damage it on purpose
        for bitmap in SHARED.glob(f"holdfast-{image.hex}-*"):
            bitmap.unlink(missing_ok=True)

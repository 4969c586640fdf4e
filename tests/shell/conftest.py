"""Every async test under tests/shell runs in trio."""

from pytest_trio.enable_trio_mode import *  # noqa: F403

"""Every async test under tests/e2e runs in trio."""

from pytest_trio.enable_trio_mode import *  # noqa: F403

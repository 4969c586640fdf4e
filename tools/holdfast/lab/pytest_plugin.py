"""pytest plugin of Holdfast: the fixture ``lab``, a whole cluster of real processes for one test.

    @pytest.mark.lab(nodes=3, properties={"resiliency_period": "3s"})
    async def test_short_cut(lab):                   # an async test needs pytest-trio
        await lab.isolate("n1")
        ...

The fixture itself is synchronous: it brings the lab up before the test and takes it down afterwards, in runs
of trio of its own. So it needs no pytest-trio, and a test without one says ``trio.run(lab.isolate, "n1")``.
Nothing but pytest is imported until a test asks for the fixture: every pytest run loads this module.

``lab`` is a ``holdfast.lab.cluster.Lab``; guests are ``holdfast.lab.guests.add_guest`` and ``check_guest``.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from holdfast.lab.cluster import Lab

_MARKER = (
    "lab(nodes=3, networks=1, properties={}): what the fixture `lab` brings up (a cluster of real processes)"
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _MARKER)


@pytest.fixture
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Lab]":
    """A lab, up: its nodes, store, diskd and target; down again, with all its VMs, after the test."""
    import trio

    from holdfast.lab.cluster import UpOptions, bring_up

    marker = request.node.get_closest_marker("lab")
    options = UpOptions(**(marker.kwargs if marker is not None else {}))
    directory = tmp_path_factory.mktemp("lab")
    brought_up = trio.run(lambda: bring_up(directory, options, is_remembered=False))
    try:
        yield brought_up
    finally:
        trio.run(brought_up.down)

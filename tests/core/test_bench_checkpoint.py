"""The checkpoint benchmark's arithmetic: which writes belong to a window, and what is told of them."""

import subprocess
import sys

import numpy as np
import pytest

from daemonkit.ports import Address
from holdfast.bench.checkpoint import BEGIN, CALM, Bench, render, summarise

HERE = Address("127.0.0.1", 1)
MS = 1_000_000


@pytest.fixture
def bench():
    with subprocess.Popen([sys.executable, "-c", ""]) as guest:
        yield Bench(HERE, HERE, guest)


def test_a_write_belongs_to_the_windows_that_it_touches(bench):
    # (began, took) in ms: one write after the other; the third spans the beginning of the second window.
    samples = np.array([[0, 1], [10, 2], [19, 30], [50, 4], [90, 5]], np.uint64) * MS
    bench.windows = [(CALM, 0, 18 * MS), (BEGIN, 20 * MS, 60 * MS), (CALM, 60 * MS, 80 * MS), ("", 0, MS)]
    bench.merges = {"guest writes": [1.0, 3.0, 2.0]}
    result = summarise(bench, samples)
    calm, begin = result["rows"]
    assert (calm["window"], calm["windows"], calm["writes"]) == (CALM, 1, 2), "an empty window tells nothing"
    assert (calm["write_max_us"], calm["slowest_max_us"]) == (2000.0, 2000.0)
    assert (begin["window"], begin["writes"], begin["slowest_p50_us"]) == (BEGIN, 2, 30_000.0)
    assert result["merge_mib_per_second"] == {"guest writes": 2.0}
    assert render(result).row_count == 2

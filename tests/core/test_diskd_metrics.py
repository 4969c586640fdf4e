"""The numbers in Prometheus' format (core/metrics.py)."""

import re

import attrs

from daemonkit.diskd_api import Lease
from diskd.core.calls import DaemonStatus
from diskd.core.inventory import ImageInfo, PointInfo
from diskd.core.metrics import render
from diskd.core.statistics import DaemonVitals, ImageStats, IoCounts

VITALS = DaemonVitals(90 * 10**9, 1_500_000, 7, 50 << 20, 20, 65536)
STATUS = DaemonStatus("1.0", 1, "/r", None, None, 3, ["a"], 2, 1, VITALS)
INFO = ImageInfo("a", "u", 1 << 20, 4096, 1 << 20, 0, "open", None, 4, "n1/a", 2, None, None, 2)
OPEN = ImageStats(
    image=INFO,
    lease=Lease("a", 4, "n1/a"),
    points=[PointInfo("rp-1", "g:1", True, None), PointInfo("rp-2", "g:2", False, "x")],
    io=IoCounts(reads=3, flush_ns=2_500_000_000),
    open_regions=1,
    open_bytes=1 << 20,
    max_open_bytes=4 << 30,
    clients=[],
)
BROKEN = ImageStats(
    attrs.evolve(INFO, name='b"\\\n', state="damaged", reason="x"), None, None, None, None, None, None, []
)
LINE = re.compile(r'[a-z_]+(\{[a-z_]+="(\\.|[^"\\\n])*"(,[a-z_]+="(\\.|[^"\\\n])*")*\})? -?[0-9.e+-]+')


def test_every_line_is_a_sample_or_says_what_the_next_ones_are():
    seen: dict[str, str] = {}
    for line in render(STATUS, [OPEN, BROKEN]).splitlines():
        if line.startswith("#"):
            _, word, name, text = line.split(" ", 3)
            assert word in ("HELP", "TYPE") and text
            if word == "TYPE":
                assert name not in seen, "a family is told once"
                seen[name] = text
        else:
            assert LINE.fullmatch(line), line
            name = re.split(r"[{ ]", line)[0]
            assert name in seen and name.endswith("_total") == (seen[name] == "counter")


def test_the_values_are_those_of_the_images():
    text = render(STATUS, [OPEN, BROKEN])
    for line in (
        "holdfast_diskd_loop_lag_seconds 0.0015",
        'holdfast_image_reads_total{image="a"} 3',
        'holdfast_image_flush_seconds_total{image="a"} 2.5',
        'holdfast_image_state{image="a",state="open"} 1',
        r'holdfast_image_state{image="b\"\\\n",state="damaged"} 1',
        'holdfast_image_points{image="a",valid="true"} 1',
        'holdfast_image_open_bytes{image="a"} 1048576',
        'holdfast_image_failed{image="a"} 0',
    ):
        assert line in text.splitlines(), line
    assert "merge_remaining" not in text, "what is not there is not shown"


def test_no_images_are_no_families_without_samples():
    text = render(STATUS, [])
    assert "holdfast_image" not in text and "holdfast_diskd_threads 7\n" in text

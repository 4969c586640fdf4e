"""qemu-img reads what the repository writes: check is clean, and content is what the model says."""

import shutil
import subprocess
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemonkit.durable import write_all
from diskd.core.qcow2 import CLUSTER_SIZES
from diskd.core.qcow2_writer import Qcow2Writer

pytestmark = [pytest.mark.interop, pytest.mark.slow]
QEMU_IMG = shutil.which("qemu-img")
GRAIN = 4096


@pytest.fixture(autouse=True)
def _needs_qemu_img():
    if QEMU_IMG is None:
        pytest.skip("qemu-img is not installed (Debian: qemu-utils)")


def qemu_img(*arguments):
    done = subprocess.run([QEMU_IMG, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    return done.stdout


class ModelBase:
    def __init__(self, model):
        self.model = bytes(model)

    def read(self, offset, length):
        inside = self.model[offset : offset + length]
        return inside + bytes(length - len(inside))

    def nonzero_ranges(self, offset, length):
        found = []
        for start in range(offset, min(offset + length, len(self.model)), 512):
            size = min(512, offset + length - start)
            if any(self.model[start : start + size]):
                found.append((start, size))
        return found


def write(path, size, runs, cluster, *, base=None, backing=None):
    with path.open("wb", buffering=0) as file:
        put = partial(lambda number, offset, data: write_all(number, data, offset), file.fileno())
        writer = Qcow2Writer(put, size_bytes=size, cluster_bytes=cluster, base=base, backing=backing)
        for start, data, kind in runs:
            if kind == "data":
                writer.data(start, data)
            else:
                writer.zero(start, len(data))
        file.truncate(writer.finish())


@st.composite
def run_lists(draw, size):
    total = size // 512
    cuts = sorted(draw(st.sets(st.integers(0, total), max_size=12)))
    runs = []
    for first, last in zip(cuts[::2], cuts[1::2], strict=False):
        kind = draw(st.sampled_from(["data", "zero"]))
        fill = draw(st.integers(1, 255)) if kind == "data" else 0
        runs.append((first * 512, bytes([fill]) * ((last - first) * 512), kind))
    return runs


def check_point(path, model, scratch):
    qemu_img("check", path)
    assert "qcow2" in qemu_img("info", path)
    raw = scratch / "model.raw"
    raw.write_bytes(model)
    assert "identical" in qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, path)
    converted = scratch / "converted.raw"
    qemu_img("convert", "-O", "raw", path, converted)
    assert converted.read_bytes() == bytes(model)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_chain_of_ours_is_what_qemu_img_says(tmp_path, data):
    size = data.draw(st.integers(1, 600)) * 512 * data.draw(st.sampled_from([1, 8]))
    model, names = bytearray(size), []
    for number in range(data.draw(st.integers(1, 3))):
        runs = data.draw(run_lists(size))
        cluster = data.draw(st.sampled_from(CLUSTER_SIZES))
        name = f"rp-{number}"
        (tmp_path / name).mkdir(exist_ok=True)
        backing = f"../{names[-1]}/d.qcow2" if names else None
        base = ModelBase(model) if names else None
        write(tmp_path / name / "d.qcow2", size, runs, cluster, base=base, backing=backing)
        for start, content, _ in runs:
            model[start : start + len(content)] = content
        names.append(name)
        check_point(tmp_path / name / "d.qcow2", model, tmp_path)


def test_a_large_sparse_disk(tmp_path):
    """A disk of 2 TiB with 4 KiB clusters: an L1 table of 8 MiB, most of it empty."""
    path = tmp_path / "d.qcow2"
    size = 2 << 40
    runs = [(0, b"a" * 4096, "data"), (1 << 40, b"b" * 8192, "data"), (size - 4096, b"c" * 4096, "data")]
    write(path, size, runs, 4096)
    qemu_img("check", path)
    assert path.stat().st_blocks * 512 < 64 << 20
    got = subprocess.run(
        [
            "qemu-io",
            "-r",
            "-c",
            f"read -P 0x62 {1 << 40} 8192",
            "-c",
            f"read -P 0x63 {size - 4096} 4096",
            path,
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "fail" not in got.stdout
    assert got.returncode == 0


def test_a_disk_that_grew_reads_zeroes_beyond_its_base(tmp_path):
    old = bytearray(b"o" * (64 * GRAIN))
    for name in ("rp-0", "rp-1"):
        (tmp_path / name).mkdir()
    write(tmp_path / "rp-0" / "d.qcow2", len(old), [(0, bytes(old), "data")], 65536)
    new = old + bytes(37 * GRAIN)
    new[70 * GRAIN : 71 * GRAIN] = b"n" * GRAIN
    runs = [(64 * GRAIN, bytes(6 * GRAIN), "zero"), (70 * GRAIN, b"n" * GRAIN, "data")]
    write(
        tmp_path / "rp-1" / "d.qcow2", len(new), runs, 16384, base=ModelBase(old), backing="../rp-0/d.qcow2"
    )
    check_point(tmp_path / "rp-1" / "d.qcow2", new, tmp_path)

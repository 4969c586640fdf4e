"""The qcow2 writer against a bytearray, read back through our own reader (and checked as a structure)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diskd.core.copy_plan import Run
from diskd.core.qcow2 import (
    CLUSTER_SIZES,
    COPIED,
    L1_BYTES_MAX,
    check_geometry,
    choose_cluster_bytes,
    l1_entries_of,
)
from diskd.core.qcow2_reader import Qcow2Reader, read_chain
from diskd.core.qcow2_writer import Qcow2Writer, WriterState
from diskd.core.stream import FrameKind
from diskd.errors import Damaged, Refused

SECTOR = 512


class MemoryFile:
    """A file for the writer and the reader."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, offset, data):
        end = offset + len(data)
        if end > len(self.data):
            self.data.extend(bytes(end - len(self.data)))
        self.data[offset:end] = data

    def read(self, offset, length):
        return bytes(self.data[offset : offset + length])

    def reader(self):
        return Qcow2Reader(self.read, len(self.data))


class ChainBase:
    """A base made of files already written."""

    def __init__(self, model, size):
        self.model, self.size = model, size

    def read(self, offset, length):
        inside = max(0, min(length, self.size - offset))
        return bytes(self.model[offset : offset + inside]) + bytes(length - inside)

    def nonzero_ranges(self, offset, length):
        ranges = []
        for start in range(offset, min(offset + length, self.size), SECTOR):
            size = min(SECTOR, offset + length - start)
            if any(self.model[start : start + size]):
                ranges.append((start, size))
        return ranges


@st.composite
def disks(draw, grain=SECTOR, blocks=160):
    """(size, [(start, length, kind, fill)]) with ascending, disjoint ranges in whole grains."""
    size = draw(st.integers(1, blocks)) * grain * draw(st.sampled_from([1, 3, 8]))
    total = size // grain
    cuts = sorted(draw(st.sets(st.integers(0, total), max_size=14)))
    runs = []
    for first, last in zip(cuts[::2], cuts[1::2], strict=False):
        kind = draw(st.sampled_from(["data", "zero", "hole", "nul"]))
        runs.append((first * grain, (last - first) * grain, kind, draw(st.integers(1, 255))))
    return size, runs


def write_layer(size, runs, cluster, model, base=None, backing=None, portion=7 * SECTOR):
    """Write runs into a new file, apply them to ``model``, and return the file."""
    file = MemoryFile()
    writer = Qcow2Writer(file.write, size_bytes=size, cluster_bytes=cluster, backing=backing, base=base)
    for start, length, kind, fill in runs:
        data = bytes([fill]) * length if kind == "data" else bytes(length)
        if kind in ("data", "nul"):
            for piece in range(0, length, portion):
                writer.data(start + piece, data[piece : piece + portion])
        else:
            writer.zero(start, length)
        model[start : start + length] = data
    file_bytes = writer.finish()
    assert len(file.data) <= file_bytes
    file.data.extend(bytes(file_bytes - len(file.data)))
    return file


@settings(max_examples=150, deadline=None)
@given(
    disks(),
    st.sampled_from(CLUSTER_SIZES),
    st.lists(st.tuples(disks(), st.sampled_from(CLUSTER_SIZES)), max_size=3),
)
def test_a_chain_reads_as_the_model_says(full, cluster, layers):
    size, runs = full
    model = bytearray(size)
    files = [write_layer(size, runs, cluster, model)]
    for (next_size, next_runs), next_cluster in layers:
        base = ChainBase(bytearray(model), len(model))
        grown = bytearray(next_size)
        grown[: min(len(model), next_size)] = model[:next_size]
        files.insert(0, write_layer(next_size, next_runs, next_cluster, grown, base, "../rp-0/d.qcow2"))
        model = grown
    readers = [file.reader() for file in files]
    for reader in readers:
        reader.check()
    assert read_chain(readers, 0, len(model)) == bytes(model)
    middle = len(model) // 3
    assert read_chain(readers, middle, len(model) - middle) == bytes(model[middle:])


@settings(max_examples=100, deadline=None)
@given(disks(), st.sampled_from(CLUSTER_SIZES), st.data())
def test_what_is_shared_is_not_written_and_what_is_left_is(full, cluster, data):
    """Whatever parts another file gives: the new file is the same, and each byte comes once."""
    size, runs = full
    model = bytearray(size)
    expected = write_layer(size, runs, cluster, model, portion=1 << 20)
    file, written, shared = MemoryFile(), [], []

    def write(offset, content):
        written.append((offset, offset + len(content)))
        file.write(offset, bytes(content))

    def share(offset, host, length):
        cuts = sorted(data.draw(st.sets(st.integers(0, length // SECTOR), max_size=4)))
        given = [(a * SECTOR, b * SECTOR) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
        left, position = [], 0
        for start, end in given:
            inside = model[offset + start : offset + end]
            file.write(host + start, bytes(inside) + bytes(end - start - len(inside)))
            shared.append((host + start, host + end))
            if start > position:
                left.append((position, start))
            position = end
        return [*left, (position, length)] if position < length else left

    writer = Qcow2Writer(write, size_bytes=size, cluster_bytes=cluster, share=share)
    for start, length, kind, fill in runs:
        if kind in ("data", "nul"):
            writer.data(start, (bytes([fill]) if kind == "data" else b"\0") * length)
        else:
            writer.zero(start, length)
    file.data.extend(bytes(writer.finish() - len(file.data)))
    assert bytes(file.data) == bytes(expected.data)
    assert not any(a < d and c < b for a, b in written for c, d in shared)


@settings(max_examples=60, deadline=None)
@given(disks(), st.sampled_from(CLUSTER_SIZES), st.data())
def test_a_flipped_bit_in_a_table_is_damage_or_changes_nothing(full, cluster, data):
    size, runs = full
    model = bytearray(size)
    file = write_layer(size, runs, cluster, model)
    payload_free = [0, cluster, len(file.data) - 2 * cluster]
    where = data.draw(st.sampled_from(payload_free)) + data.draw(st.integers(0, 103))
    file.data[where] ^= 1 << data.draw(st.integers(0, 7))
    try:
        reader = file.reader()
        reader.check()
        found = read_chain([reader], 0, min(size, reader.header.size_bytes))
    except Damaged:
        return
    assert len(found) == min(size, reader.header.size_bytes)


@settings(max_examples=60, deadline=None)
@given(disks(grain=4096))
def test_the_chosen_cluster_size_makes_the_smallest_file(full):
    size, runs = full
    plan = [
        Run(FrameKind.DATA if kind in ("data", "nul") else FrameKind.ZERO, start, length)
        for start, length, kind, _ in runs
    ]
    chosen = choose_cluster_bytes(plan, size)

    def naive(cluster):
        stored, tables = set(), set()
        for run in plan:
            for index in range(run.offset // cluster, (run.end - 1) // cluster + 1):
                tables.add(index // (cluster // 8))
                whole = run.offset <= index * cluster and (index + 1) * cluster <= run.end
                if run.kind is FrameKind.DATA or not whole:
                    stored.add(index)
        total = len(stored) + len(tables)
        refcounts = -(-total * 2 // cluster) * cluster if total else 0
        return total * cluster + refcounts + l1_entries_of(size, cluster) * 8

    assert naive(chosen) == min(naive(cluster) for cluster in CLUSTER_SIZES)


@given(st.binary(max_size=400))
def test_random_bytes_are_damage(data):
    file = MemoryFile()
    file.data.extend(data)
    with pytest.raises(Damaged):
        file.reader()


def test_a_large_sparse_disk_costs_what_it_holds():
    """64 TiB with three clusters: a handful of steps, whatever the size."""
    size = 64 << 40
    file = MemoryFile()
    model = {}
    writer = Qcow2Writer(file.write, size_bytes=size, cluster_bytes=65536)
    for start in (0, 1 << 40, size - 65536):
        model[start] = bytes([start % 251 + 1]) * 65536
        writer.data(start, model[start])
    file.data.extend(bytes(writer.finish() - len(file.data)))
    reader = file.reader()
    reader.check()
    mapped = list(reader.map(0, size))
    assert [piece.offset for piece in mapped if piece.kind == "data"] == sorted(model)
    assert len(mapped) < 12
    assert sum(piece.length for piece in mapped) == size
    for start, data in model.items():
        assert read_chain([reader], start, 65536) == data


@pytest.mark.parametrize("size", [1 << 40, 4 << 40, (4 << 40) + 512, 16 << 40, 64 << 40])
def test_no_cluster_size_is_chosen_that_qemu_would_not_open(size):
    """A block here and there makes the smallest clusters look best; their L1 table has a limit (32 MiB)."""
    step = size // 10_000 // 4096 * 4096
    plan = [Run(FrameKind.DATA, start, 4096) for start in range(0, size - 4096, step)]
    chosen = choose_cluster_bytes(plan, size)
    check_geometry(size, chosen)
    smaller = [cluster for cluster in CLUSTER_SIZES if cluster < chosen]
    for cluster in smaller:
        if l1_entries_of(size, cluster) * 8 > L1_BYTES_MAX:
            with pytest.raises(Refused, match="too large for clusters"):
                check_geometry(size, cluster)


def test_a_file_whose_refcounts_qemu_would_not_read_is_refused():
    """2^20 refcount blocks: 8 TiB of clusters of 4 KiB."""
    writer = Qcow2Writer(MemoryFile().write, size_bytes=1 << 40, cluster_bytes=4096)
    writer.restore(WriterState(1 << 31, 0, bytes(4096), None, b"", 0), b"")
    with pytest.raises(Refused, match="too large for its cluster size"):
        writer.finish()


def two_clusters():
    """A file with two data clusters, and where their L2 entries are in it."""
    size, cluster = 1 << 20, 65536
    file = write_layer(size, [(0, 2 * cluster, "data", 7)], cluster, bytearray(size))
    entries = file.data.index((3 * cluster + COPIED).to_bytes(8, "big")) - 8
    return file, entries, cluster


def test_clusters_that_are_used_twice_or_not_at_all_are_damage():
    """Whatever the counts say: qemu-img check would complain, and a repair of it would cost data."""
    file, entries, _ = two_clusters()
    file.reader().check()
    file.data[entries + 8 : entries + 16] = file.data[entries : entries + 8]
    with pytest.raises(Damaged, match="used twice"):
        file.reader().check()
    file, entries, cluster = two_clusters()
    file.data[entries + 8 : entries + 16] = bytes(8)
    with pytest.raises(Damaged, match="belongs to nothing"):
        file.reader().check()
    file, entries, cluster = two_clusters()
    file.data[entries : entries + 8] = (COPIED + cluster).to_bytes(8, "big")
    with pytest.raises(Damaged, match="used twice"):
        file.reader().check()


@pytest.mark.parametrize("wrong", [0, 2])
def test_a_count_that_is_not_one_is_damage(wrong):
    file, _, cluster = two_clusters()
    counts = len(file.data) - cluster
    assert file.data[counts : counts + 4] == b"\0\1\0\1"
    file.data[counts + 7] = wrong
    with pytest.raises(Damaged, match="a refcount is wrong"):
        file.reader().check()
    file, _, cluster = two_clusters()
    file.data[-1] = 1
    with pytest.raises(Damaged, match="a refcount is wrong"):
        file.reader().check()

"""One flipped bit, anywhere in a repository, is found by `verify` and named: in every kind of byte."""

import random

import pytest
from diskd_repository_scene import Scene, poll

from diskd.core.qcow2 import OFFSET_MASK
from diskd.core.stream import FRAME, StreamDecoder
from diskd.shell.repository import open_repository

pytestmark = pytest.mark.slow
PER_KIND = 4
HEADER_BYTES = 104


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    scene = Scene()
    scene.fill(root)
    with open_repository(root) as opened:
        # All kinds of points: a full, a differential, and a synthetic full.
        opened.synthesize("web", scene.names[2], poll)
        yield opened, scene


def whole(path):
    return {"anywhere": [(0, path.stat().st_size)]}


def kinds_of_index(path):
    """The opening, then frames of fixed size, then the trailer, which is one of them."""
    data = path.read_bytes()
    decoder = StreamDecoder(payloads=False)
    decoder.feed(data)
    decoder.next_event()
    start, size = len(decoder.opening), len(data)
    frames = [(place, place + FRAME.size) for place in range(start, size, FRAME.size)]
    parts = {"opening": [(0, start)], "trailer": frames[-1:]}
    for name, (first, last) in {"head": (0, 24), "digest": (24, FRAME.size)}.items():
        parts[f"frame {name}"] = [(place + first, place + last) for place, _ in frames[:-1]]
    return parts


def kinds_of_qcow2(reader, path):
    """What each byte of the file is for."""
    header, size = reader.header, path.stat().st_size
    cluster = header.cluster_bytes
    l2, data = [], []
    for entry in reader._l1[reader._present].tolist():
        l2.append((entry & OFFSET_MASK, (entry & OFFSET_MASK) + cluster))
    table = header.refcount_table_offset
    tables = [(table, table + header.refcount_table_clusters * cluster)]
    blocks = [(tables[0][1], size)]
    for mapped in reader.map(0, header.size_bytes):
        if mapped.kind == "data":
            data.append((mapped.host, mapped.host + mapped.length))
    return {
        "header": [(0, HEADER_BYTES)],
        "behind the header": [(HEADER_BYTES, cluster)],
        "L1": [(header.l1_offset, header.l1_offset + header.l1_entries * 8)],
        "behind the L1": [(header.l1_offset + header.l1_entries * 8, header.l1_offset + cluster)],
        "L2": l2,
        "data": data,
        "refcount table": tables,
        "refcount blocks": blocks,
    }


def places(repository, scene):
    """(point, file, kind, ranges) of everything that is stored."""
    for name in scene.names:
        directory = repository.root / "web" / name
        for file in ("manifest.json", "vm.toml"):
            yield name, file, whole(directory / file)
        yield name, "export.index", kinds_of_index(directory / "export.index")
        with repository.open("web", name) as opened:
            for disk, view in opened.views.items():
                file = f"{disk}.qcow2"
                yield name, file, kinds_of_qcow2(view.layers[0].reader, directory / file)


def test_every_kind_of_byte(repository):
    opened, scene = repository
    chosen = random.Random("flipped bits")
    seen = set()
    for point, file, kinds in list(places(opened, scene)):
        path = opened.root / "web" / point / file
        good = path.read_bytes()
        for kind, ranges in kinds.items():
            ranges = [(first, last) for first, last in ranges if last > first]
            for _ in range(PER_KIND if ranges else 0):
                first, last = chosen.choice(ranges)
                place, bit = chosen.randrange(first, last), chosen.randrange(8)
                bad = bytearray(good)
                bad[place] ^= 1 << bit
                path.write_bytes(bad)
                found = opened.verify("web", point, poll).problems
                assert found, (point, file, kind, place, bit)
                assert f"web/{point}/{file}" in found[0], (found, kind, place, bit)
                seen.add((file, kind))
        path.write_bytes(good)
    assert all(opened.verify("web", point, poll).problems == [] for point in scene.names)
    assert {kind for file, kind in seen if file == "system.qcow2"} == {
        "header",
        "behind the header",
        "L1",
        "behind the L1",
        "L2",
        "data",
        "refcount table",
        "refcount blocks",
    }
    assert {kind for file, kind in seen if file == "export.index"} == {
        "opening",
        "trailer",
        "frame head",
        "frame digest",
    }


def test_every_byte_of_a_manifest(repository):
    opened, scene = repository
    path = opened.root / "web" / scene.names[1] / "manifest.json"
    good = path.read_bytes()
    chosen = random.Random("manifest")
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << chosen.randrange(8)
        path.write_bytes(bad)
        assert opened.load("web").damaged, (place, good[place - 10 : place + 10])
    path.write_bytes(good)
    assert opened.load("web").damaged == {}


def test_a_byte_more_or_less_is_found_too(repository):
    opened, scene = repository
    for point in scene.names:
        for file in ("manifest.json", "vm.toml", "export.index", "system.qcow2", "journal.qcow2"):
            path = opened.root / "web" / point / file
            good = path.read_bytes()
            for bad in (
                good.rstrip(b"\n")[:-1],
                good + b"\0",
                b"",
            ):  # a manifest's last newline carries nothing
                path.write_bytes(bad)
                found = opened.verify("web", point, poll).problems
                assert found
                assert file in found[0]
            path.write_bytes(good)

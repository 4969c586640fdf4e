"""RCT, MRT, interval and catalogue bytes: what was written reads back; anything else is noticed (T4, T5)."""

import zlib
from random import Random
from uuid import UUID

import attrs
import pytest

from diskd.core import interval, mrt, points, rct
from diskd.core.geometry import Geometry, Identity, decode_identity, encode_identity
from diskd.errors import Damaged, NoSuchPoint, Refused
from diskd.sim.disk import SimDisk

IDENTITY = Identity(UUID(int=7), Geometry.check(20_000 * 512, 512, 4096, 512))
OTHER = Identity(UUID(int=8), IDENTITY.geometry)
GENERATION = UUID(int=99)
ROOT = attrs.evolve(
    rct.empty_root(IDENTITY, GENERATION, sequence=5, interval=3), over_report_bytes=4096, header_sequence=4
)
RAW = mrt.RawFacts(20_000 * 512, 11, 12, 13)
HEADER = mrt.Header(False, GENERATION, UUID(int=1), b"n" * 16, b"m" * 16, 4, 5, 77, RAW)
THIRD = points.Segment(3, 0, 3)
PAGES = {0: b"\x01" + bytes(511), 3: b"\xff" * 512}


def point(number: int) -> str:
    return f"rp-{number:016x}"


CATALOGUE = points.cut(
    points.validate(points.cut(points.empty(GENERATION), point(1), 4096, 0), point(1)), point(2), 4096, 512
)


def damaged_copies(data: bytes, count: int = 300) -> list[bytes]:
    """Single flipped bits anywhere, truncations, additions."""
    rng = Random(1)
    copies: list[bytes] = []
    for _ in range(count):
        position = rng.randrange(len(data))
        flipped = bytearray(data)
        flipped[position] ^= 1 << rng.randrange(8)
        copies.append(bytes(flipped))
    copies += [data[: rng.randrange(len(data))] for _ in range(50)]
    return [*copies, data + b"\0", b"", bytes(len(data)), rng.randbytes(len(data))]


def test_a_root_reads_back_and_damage_is_noticed() -> None:
    data = rct.encode_root(IDENTITY, ROOT)
    decoded = rct.decode_root(IDENTITY, data)
    assert decoded is not None
    assert attrs.astuple(decoded) == attrs.astuple(ROOT)
    assert rct.decode_root(OTHER, data) is None
    for copy in damaged_copies(data):
        assert rct.decode_root(IDENTITY, copy) is None


def test_a_header_reads_back_and_damage_is_noticed() -> None:
    data = mrt.encode_header(IDENTITY, HEADER)
    assert len(data) == 512
    assert mrt.decode_header(IDENTITY, data) == HEADER
    assert mrt.decode_header(OTHER, data) is None
    for copy in damaged_copies(data):
        assert mrt.decode_header(IDENTITY, copy) is None


def test_a_record_reads_back_and_damage_is_noticed() -> None:
    opened = bytearray(5000)
    opened[3840] = opened[4999] = 1
    record = mrt.pack_record(1, opened, 9, 123)
    data = mrt.encode_record(GENERATION, record)
    assert len(data) == 512
    assert mrt.decode_record(GENERATION, 1, data) == record
    assert mrt.decode_record(GENERATION, 0, data) is None, "a record in the wrong place"
    assert mrt.decode_record(UUID(int=1 << 100), 1, data) is None, "a record of another generation"
    for copy in damaged_copies(data):
        assert mrt.decode_record(GENERATION, 1, copy) is None


def test_an_interval_reads_back_and_damage_is_noticed() -> None:
    data = interval.encode(IDENTITY, GENERATION, 3, PAGES, through=3)
    assert interval.decode(IDENTITY, GENERATION, THIRD, data) == PAGES
    empty = interval.encode(IDENTITY, GENERATION, 3, {}, through=3)
    assert interval.decode(IDENTITY, GENERATION, THIRD, empty) == {}
    fourth = points.Segment(4, 0, 4)
    for wrong in ((OTHER, GENERATION, THIRD), (IDENTITY, UUID(int=1), THIRD), (IDENTITY, GENERATION, fourth)):
        with pytest.raises(Damaged):
            interval.decode(*wrong, data)
    for copy in damaged_copies(data):
        with pytest.raises(Damaged):
            interval.decode(IDENTITY, GENERATION, THIRD, copy)


def test_an_interval_from_before_a_join_is_refused_and_one_from_a_join_cut_short_is_not() -> None:
    alone = interval.encode(IDENTITY, GENERATION, 3, PAGES, through=3)
    joined = interval.encode(IDENTITY, GENERATION, 3, PAGES, through=5)
    assert interval.decode(IDENTITY, GENERATION, THIRD, joined) == PAGES
    with pytest.raises(Damaged, match="older than the last join"):
        interval.decode(IDENTITY, GENERATION, points.Segment(3, 0, 5), alone)


def resealed(body: bytes) -> bytes:
    import hashlib

    return body + hashlib.blake2b(body, digest_size=16).digest()


def test_an_interval_with_a_good_checksum_is_still_bounded() -> None:
    body = interval.encode(IDENTITY, GENERATION, 3, {}, through=3)[:-16]
    head, bomb = body[:-4], zlib.compress(bytes(1 << 20))
    cases = [
        head + (5).to_bytes(4, "little"),
        head + (1).to_bytes(4, "little") + (0).to_bytes(4, "little") + (1 << 30).to_bytes(4, "little"),
        head + (1).to_bytes(4, "little") + (0).to_bytes(4, "little") + len(bomb).to_bytes(4, "little") + bomb,
        head + (1).to_bytes(4, "little") + (99).to_bytes(4, "little") + bytes(4),
        body + b"left over",
    ]
    for case in cases:
        with pytest.raises(Damaged):
            interval.decode(IDENTITY, GENERATION, THIRD, resealed(case))


def test_interval_file_names() -> None:
    assert interval.parse_file_name(interval.file_name(17)) == 17
    for name in ("disk.rct", "disk.rct.", "disk.rct.x", "disk.rct.017", "disk.rct.-1", "disk.raw"):
        assert interval.parse_file_name(name) is None


def test_a_catalogue_reads_back_and_damage_is_noticed() -> None:
    data = points.encode_catalogue(IDENTITY, CATALOGUE)
    assert points.decode_catalogue(IDENTITY, data) == CATALOGUE
    with pytest.raises(Damaged):
        points.decode_catalogue(OTHER, data)
    for copy in damaged_copies(data):
        with pytest.raises(Damaged):
            points.decode_catalogue(IDENTITY, copy)


def test_a_catalogue_that_contradicts_itself_is_refused() -> None:
    first = CATALOGUE.points[0]
    broken = [
        attrs.evolve(CATALOGUE, segments=[]),
        attrs.evolve(CATALOGUE, points=[first, first]),
        attrs.evolve(CATALOGUE, points=[attrs.evolve(first, id="../../etc")]),
        attrs.evolve(CATALOGUE, points=[attrs.evolve(first, sequence=99)]),
        attrs.evolve(CATALOGUE, segments=[points.Segment(2, -1, 2)]),
        attrs.evolve(CATALOGUE, segments=[points.Segment(2, 0, 1)]),
        attrs.evolve(CATALOGUE, segments=[points.Segment(2, 0, 3)]),
    ]
    for catalogue in broken:
        with pytest.raises(Damaged):
            points.decode_catalogue(IDENTITY, points.encode_catalogue(IDENTITY, catalogue))


def test_image_toml_reads_back_and_nonsense_is_refused() -> None:
    assert decode_identity(encode_identity(IDENTITY)) == IDENTITY
    good = encode_identity(IDENTITY).decode()
    for bad in (
        "",
        "uuid = 1",
        good.replace("512", "513"),
        good + "extra = 1\n",
        good.replace("size = 1", "size = -1"),
    ):
        with pytest.raises(Damaged):
            decode_identity(bad.encode())
    with pytest.raises(Damaged):
        decode_identity(b"\xff\xfe")


@pytest.mark.parametrize(
    ("size", "block", "region"),
    [(0, 4096, 1 << 20), (1000, 4096, 1 << 20), (1 << 30, 4000, 1 << 20), (1 << 30, 4096, 4096),
     (1 << 60, 4096, 1 << 20), (1 << 30, 4096, 1 << 30), (1 << 44, 512, 1 << 20)],
)  # fmt: skip
def test_impossible_sizes_are_refused(size: int, block: int, region: int) -> None:
    with pytest.raises(Refused):
        Geometry.check(size, block, region)


# --- files on the simulated disk -----------------------------------------------------------------------


def stored_rct(disk: SimDisk) -> rct.Root:
    disk.run(rct.create(IDENTITY, rct.empty_root(IDENTITY, GENERATION, sequence=1, interval=1)))
    root, _ = disk.run(rct.load(IDENTITY))
    root = disk.run(rct.store(IDENTITY, root, PAGES))
    return disk.run(rct.store(IDENTITY, root, {0: b"\x03" + bytes(511)}))


def test_rct_pages_are_copied_on_write() -> None:
    disk = SimDisk(Random(1))
    stored_rct(disk)
    root, pages = disk.run(rct.load(IDENTITY))
    assert pages == {0: b"\x03" + bytes(511), 3: PAGES[3]}
    assert len(disk.peek(rct.FILE)) == rct.file_bytes(IDENTITY)
    disk.run(rct.store(IDENTITY, root, {0: bytes(512), 3: bytes(512)}))
    assert disk.run(rct.load(IDENTITY))[1] == {}


def test_an_rct_page_that_is_damaged_is_noticed_and_a_torn_root_costs_nothing() -> None:
    disk = SimDisk(Random(1))
    root = stored_rct(disk)
    slot_bytes = 4096
    disk.poke(rct.FILE, root.sequence % 2 * slot_bytes + 130, b"torn")
    older, pages = disk.run(rct.load(IDENTITY))
    assert older.sequence == root.sequence - 1
    assert pages == PAGES
    disk.poke(rct.FILE, (1 - root.sequence % 2) * slot_bytes + 30, b"torn")
    with pytest.raises(Damaged, match="no readable root"):
        disk.run(rct.load(IDENTITY))


def test_a_page_that_does_not_match_is_damage() -> None:
    disk = SimDisk(Random(1))
    stored_rct(disk)
    content = disk.peek(rct.FILE)
    disk.poke(rct.FILE, content.index(b"\xff" * 512) + 5, b"\xfe")
    with pytest.raises(Damaged, match="page 3"):
        disk.run(rct.load(IDENTITY))


def test_a_bad_mrt_record_means_that_all_its_regions_are_open() -> None:
    disk = SimDisk(Random(1))
    disk.run(mrt.create(IDENTITY, HEADER, 78))
    assert not any(disk.run(mrt.load_table(IDENTITY, GENERATION)).open_regions)
    opened = bytearray(IDENTITY.geometry.region_count)
    opened[17] = 1
    disk.run(mrt.write_records(GENERATION, [mrt.pack_record(0, opened, 6, 200)]))
    table = disk.run(mrt.load_table(IDENTITY, GENERATION))
    assert (table.open_regions, table.root_sequence, table.time_ns, table.bad) == (opened, 6, 200, 0)
    disk.poke(mrt.FILE, 8192 + 100, b"\x55")
    table = disk.run(mrt.load_table(IDENTITY, GENERATION))
    assert all(table.open_regions)
    assert table.bad == 1


def test_mrt_headers_alternate_and_one_may_be_torn() -> None:
    disk = SimDisk(Random(1))
    disk.run(mrt.create(IDENTITY, HEADER, 78))
    newer = attrs.evolve(HEADER, sequence=5, clean=True)
    disk.run(mrt.write_header(IDENTITY, newer, 79))
    assert disk.run(mrt.load_header(IDENTITY)) == newer
    disk.poke(mrt.FILE, 4096 + 40, b"\x55")
    assert disk.run(mrt.load_header(IDENTITY)) == HEADER
    disk.poke(mrt.FILE, 40, b"\x55")
    with pytest.raises(Damaged):
        disk.run(mrt.load_header(IDENTITY))


# --- points --------------------------------------------------------------------------------------------


def test_up_to_511_points_and_invalid_ones_make_room() -> None:
    catalogue = points.empty(GENERATION)
    for number in range(1, 512):
        catalogue = points.cut(catalogue, point(number), 4096, 0)
    with pytest.raises(Refused, match="511"):
        points.cut(catalogue, point(512), 4096, 0)
    assert len(points.encode_catalogue(IDENTITY, catalogue)) < points.FILE_BYTES_MAX
    catalogue = points.new_generation(catalogue, UUID(int=5), "disk.rct is missing")
    catalogue = points.cut(catalogue, point(512), 4096, 0)
    assert len(catalogue.points) == 511
    assert catalogue.points[-1].id == point(512)


def test_what_is_recorded_is_never_more_than_what_is_read() -> None:
    """Intervals that cannot be joined add up: a cut is refused before the catalogue is one that contradicts
    itself, which would cost every point."""
    catalogue = points.cut(points.empty(GENERATION), point(1), 4096, 0)
    for number in range(2, 2 + points.POINTS_MAX):
        catalogue = points.cut(catalogue, point(number), 4096, 0)
        assert points.decode_catalogue(IDENTITY, points.encode_catalogue(IDENTITY, catalogue)) == catalogue
        catalogue = points.delete(catalogue, point(number))
    catalogue = points.cut(catalogue, point(1000), 4096, 0)
    assert points.decode_catalogue(IDENTITY, points.encode_catalogue(IDENTITY, catalogue)) == catalogue
    with pytest.raises(Refused, match="delete its oldest points"):
        points.cut(catalogue, point(1001), 4096, 0)
    points.check_cut(points.delete(catalogue, point(1)), point(1001))


def test_points_are_refused_with_the_reason_and_the_remedy() -> None:
    for asked, reason in ((point(2), "pending"), (point(9), "not known"), ("rp-x", "not known")):
        with pytest.raises(NoSuchPoint, match=f"{reason}.*take a full backup"):
            points.span(CATALOGUE, asked)
    doubted = points.new_generation(CATALOGUE, UUID(int=5), "disk.raw was changed outside diskd")
    with pytest.raises(NoSuchPoint, match=r"changed outside diskd: take a full backup"):
        points.span(doubted, point(1))
    assert doubted.generation != CATALOGUE.generation
    again = points.new_generation(doubted, UUID(int=6), "another reason")
    assert again.points == doubted.points
    with pytest.raises(NoSuchPoint):
        points.validate(doubted, point(1))
    with pytest.raises(Refused, match="exists"):
        points.cut(CATALOGUE, point(1), 4096, 0)
    with pytest.raises(Refused, match="point id"):
        points.cut(CATALOGUE, "rp-1", 4096, 0)


def test_a_newer_point_is_no_base_of_an_older_one() -> None:
    catalogue = points.validate(CATALOGUE, point(2))
    with pytest.raises(NoSuchPoint, match="newer"):
        points.span(catalogue, point(2), point(1))
    assert points.span(catalogue, point(1), point(2)).segments == [points.Segment(2, 512, 2)]
    assert points.span(catalogue, point(2), point(2)).segments == []

"""The AVHD's map: its format refuses damage, its head, and the checkpoint's record and table."""

import errno
from random import Random

import attrs
import pytest

from daemonkit.errors import InvariantBroken
from diskd.core import avhd, checkpoint
from diskd.core.avhd import DATA, PARENT, ZERO, AvhdMap, Head
from diskd.core.checkpoint import Record, RecordDisk, Recovery
from diskd.core.steps import Allocate, Remove, Replace, Truncate
from diskd.errors import Damaged, Refused
from diskd.sim.disk import SimDisk

BLOCK = 512
HEAD = Head("cp-0123456789abcdef", "uuid", 4000 * BLOCK, BLOCK, "0011223344556677", "live")
RECORD = Record(
    "cp-0123456789abcdef", "web", "rp-0123456789abcdef", "backup", "crash", 5, "name = 1\n",
    [RecordDisk("system", "img", "uuid")],
)  # fmt: skip


def made() -> SimDisk:
    disk = SimDisk(Random(1))
    disk.run(avhd.create(HEAD))
    return disk


def test_an_empty_map_is_written_in_full():
    disk = made()
    assert disk.run(avhd.load_head()) == HEAD
    states = AvhdMap.over(HEAD, bytearray(disk.run(avhd.load_cells(HEAD))))
    assert (states.entries, states.data_blocks, HEAD.sectors) == (0, 0, 3)
    assert len(disk.peek(avhd.MAP_FILE)) == 3 * 512
    assert all(disk.is_whole(name) for name in (avhd.MAP_FILE, avhd.DATA_FILE, avhd.HEAD_FILE))


def test_naming_another_mapped_copy_takes_no_space_and_is_all_or_nothing():
    disk = made()
    disk.fail_when = lambda step: errno.ENOSPC if isinstance(step, Replace | Truncate | Allocate) else None
    renewed = disk.run(avhd.renew(HEAD, "another"))
    assert renewed.live_nonce == "another" and disk.run(avhd.load_head()) == renewed
    disk.power_loss()
    assert disk.run(avhd.load_head()) == renewed


@pytest.mark.parametrize("seed", range(8))
def test_a_former_mapped_copy_is_not_named_again_after_a_power_loss(seed):
    """Another host's, it may lie there still, of that host's very boot: older than what was merged since."""
    disk = SimDisk(Random(seed))
    disk.run(avhd.create(HEAD))
    renewed = disk.run(avhd.renew(HEAD, "another"))
    disk.power_loss()
    assert disk.run(avhd.load_head()) == renewed


def test_a_mapped_copy_that_is_not_named_for_sure_is_not_believed():
    for place in (0, 5, 12, 20, 139):
        disk = made()
        disk.poke(avhd.LIVE_FILE, place, bytes([disk.peek(avhd.LIVE_FILE)[place] ^ 1]))
        assert disk.run(avhd.load_head()) == attrs.evolve(HEAD, live_nonce="")
    disk = made()  # left by an earlier AVHD
    disk.poke(avhd.LIVE_FILE, 0, avhd.encode_live(attrs.evolve(HEAD, nonce="ffeeddccbbaa9988")))
    assert disk.run(avhd.load_head()) == attrs.evolve(HEAD, live_nonce="")
    disk = made()
    disk.execute(Remove(avhd.LIVE_FILE))
    found = disk.run(avhd.load_head())
    assert found == attrs.evolve(HEAD, live_nonce="")
    disk.run(avhd.renew(found, "again"))
    named = disk.run(avhd.load_head())
    assert named is not None and named.live_nonce == "again"


def test_what_is_flushed_is_read_back():
    disk = made()
    states = AvhdMap.empty(HEAD)
    states.set_range(10, 3000, DATA)
    states.set_range(1983, 2, ZERO)
    assert states.dirty == {0, 1}
    disk.run(avhd.flush(states.take_dirty(), parent=False))
    disk.power_loss()
    again = AvhdMap.over(HEAD, bytearray(disk.run(avhd.load_cells(HEAD))))
    assert again.runs(0, 4000) == [
        (0, 10, PARENT), (10, 1973, DATA), (1983, 2, ZERO), (1985, 1025, DATA), (3010, 990, PARENT),
    ]  # fmt: skip
    assert (again.entries, again.data_blocks) == (3000, 2998)


def test_a_damaged_map_never_falls_back_to_the_parent():
    clean = made()
    size = len(clean.peek(avhd.MAP_FILE))
    rng = Random(3)
    for place in [*range(40), *(rng.randrange(size) for _ in range(100))]:
        disk = made()
        disk.poke(avhd.MAP_FILE, place, bytes([disk.peek(avhd.MAP_FILE)[place] ^ (1 << rng.randrange(8))]))
        with pytest.raises(Damaged):
            disk.run(avhd.load_cells(HEAD))


def test_stale_swapped_and_missing_sectors_are_damage():
    disk = made()
    sector = disk.peek(avhd.MAP_FILE)[:512]
    disk.poke(avhd.MAP_FILE, 512, sector)
    with pytest.raises(Damaged):
        disk.run(avhd.load_cells(HEAD))
    for other in (
        attrs.evolve(HEAD, nonce="00" * 8),  # another checkpoint's map
        attrs.evolve(HEAD, size_bytes=40_000 * BLOCK),  # a map that ends early
    ):
        with pytest.raises(Damaged):
            made().run(avhd.load_cells(other))
    disk = made()
    disk.poke(avhd.MAP_FILE, 0, bytes(512))
    with pytest.raises(Damaged):
        disk.run(avhd.load_cells(HEAD))


@pytest.mark.parametrize("first", [0, 1, 2047, 65_535, (1 << 21) + 12_345, avhd.SECTORS_MAX - 3])
def test_empty_sectors_made_at_once_are_those_made_one_by_one(first):
    for nonce in (HEAD.nonce, "ff" * 8, "00" * 8):
        one_by_one = [avhd.encode_sector(index, nonce, bytes(496)) for index in range(first, first + 3)]
        assert avhd.encode_empty(first, 3, nonce) == b"".join(one_by_one)


def test_an_undefined_state_is_damage():
    cells = bytes(100) + b"\x0c" + bytes(395)
    with pytest.raises(Damaged):
        avhd.decode_sector(0, HEAD.nonce, avhd.encode_sector(0, HEAD.nonce, cells))


def test_a_damaged_head_is_damage():
    data = avhd.encode_head(HEAD)
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 0x04
        with pytest.raises(Damaged):
            avhd.decode_head(bytes(damaged))
    assert SimDisk(Random(1)).run(avhd.load_head()) is None


def test_a_fork_over_leftovers_starts_empty():
    disk = made()
    states = AvhdMap.empty(HEAD)
    states.set_range(0, 4, DATA)
    disk.run(avhd.flush(states.take_dirty(), parent=False))
    renewed = attrs.evolve(HEAD, nonce="ff" * 8)
    disk.run(avhd.create(renewed))
    assert AvhdMap.over(renewed, bytearray(disk.run(avhd.load_cells(renewed)))).entries == 0


# --- the checkpoint's record -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([("sealed", None)], "sealed"),
        ([("sealed", None), ("end", "keep")], "ending"),
        ([("end", "discard")], "ending"),
        ([("sealed", None), ("end", "keep"), ("points_settled", None)], "merging"),
        ([("sealed", None), ("end", "keep"), ("points_settled", None), ("merged", None)], "gone"),
        ([("sealed", None), ("end", "discard"), ("points_settled", None), ("merged", None)], "gone"),
        ([("sealed", None), ("end", "pending"), ("points_settled", None), ("merged", None)], "pending"),
        (
            [("sealed", None), ("end", "pending"), ("points_settled", None), ("settle", "keep")],
            "ending",
        ),
        (
            [("sealed", None), ("end", "pending"), ("points_settled", None), ("merged", None),
             ("settle", "discard"), ("points_settled", None), ("merged", None)],
            "gone",
        ),
    ],
)  # fmt: skip
def test_the_life_of_a_checkpoint(events, state):
    record = RECORD
    for event, outcome in events:
        record = checkpoint.advance(record, event, outcome)
        if record.state != "gone":
            assert checkpoint.decode_record(checkpoint.encode_record(record)) == record
    assert record.state == state


def test_what_is_not_in_the_table():
    sealed = checkpoint.advance(RECORD, "sealed")
    ended = checkpoint.advance(sealed, "end", "keep")
    with pytest.raises(Refused):
        checkpoint.advance(ended, "end", "discard")
    with pytest.raises(Refused):
        checkpoint.advance(sealed, "settle", "keep")
    for record, event in (
        (RECORD, "merged"),
        (sealed, "sealed"),
        (ended, "merged"),
        (sealed, "points_settled"),
    ):
        with pytest.raises(InvariantBroken):
            checkpoint.advance(record, event)
    with pytest.raises(InvariantBroken):
        checkpoint.advance(RECORD, "end", "keep")


@pytest.mark.parametrize(
    ("state", "held_by", "invalid", "recovery"),
    [
        ("preparing", "backup", False, Recovery("discard", False)),
        ("preparing", "hand", True, Recovery("discard", False)),
        ("sealed", "backup", False, Recovery(None, True)),  # so that it can go on
        ("sealed", "backup", True, Recovery("pending", False)),  # its target may have committed (B3)
        ("sealed", "hand", False, Recovery(None, True)),
        ("sealed", "hand", True, Recovery("discard", False)),
        ("ending", "backup", False, Recovery(None, False)),
        ("merging", "hand", True, Recovery(None, False)),
        ("pending", "backup", False, Recovery(None, False)),
    ],
)
def test_what_a_restart_makes_of_it(state, held_by, invalid, recovery):
    outcome = None if state in ("preparing", "sealed") else "pending"
    record = attrs.evolve(RECORD, state=state, held_by=held_by, outcome=outcome)
    assert checkpoint.recover(record, invalid=invalid) == recovery


def test_the_record_and_its_flag_on_disk():
    disk = SimDisk(Random(1))
    assert disk.run(checkpoint.load()) is None
    disk.run(checkpoint.reserve())
    assert disk.run(checkpoint.load()) is None
    disk.run(checkpoint.persist(RECORD))
    assert disk.run(checkpoint.load()) == (RECORD, False)
    before = len(disk.peek(checkpoint.INVALID_FILE))
    disk.run(checkpoint.invalidate(RECORD))
    disk.power_loss()
    assert disk.run(checkpoint.load()) == (RECORD, True)
    assert len(disk.peek(checkpoint.INVALID_FILE)) == before == 512  # no new space was needed
    disk.run(checkpoint.persist(attrs.evolve(RECORD, state="gone")))
    assert disk.names() == []


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("is_set", [False, True])
def test_a_power_loss_neither_sets_a_flag_nor_takes_it_back(seed, is_set):
    disk = SimDisk(Random(seed))
    disk.run(checkpoint.reserve())
    disk.run(checkpoint.persist(RECORD))
    if is_set:
        disk.run(checkpoint.invalidate(RECORD))
    disk.power_loss()
    assert disk.run(checkpoint.load()) == (RECORD, is_set)


def test_a_torn_flag_counts_as_set():
    disk = SimDisk(Random(1))
    disk.run(checkpoint.reserve())
    disk.run(checkpoint.persist(RECORD))
    disk.poke(checkpoint.INVALID_FILE, 3, b"\x01")
    assert disk.run(checkpoint.load()) == (RECORD, True)


def test_a_damaged_record_is_damage():
    data = checkpoint.encode_record(RECORD)
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 0x04
        with pytest.raises(Damaged):
            checkpoint.decode_record(bytes(damaged))

"""The record of an unfinished export: it fits whatever the export is of, and garbage is no record."""

import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diskd.core.inventory import DISKS_MAX
from diskd.core.partial import (
    FILE_BYTES_MAX,
    HEAD_BYTES,
    DiskProgress,
    Progress,
    is_sound,
    newest,
    pack_head,
    pack_slot,
)
from diskd.core.qcow2 import CLUSTER_SIZES
from diskd.core.qcow2_writer import WriterState

BIG = 2**63 - 1


def disk(number, size=64, frames=1):
    """As much as a writer's state can hold, for tables and clusters of this size."""
    writer = WriterState(BIG, BIG, os.urandom(size), BIG, os.urandom(size), BIG)
    return DiskProgress(number, frames, BIG, os.urandom(32), writer)


def file_of(records, disks):
    """The file after these records, the first of which has the sequence 1."""
    data = bytearray(FILE_BYTES_MAX)
    data[:HEAD_BYTES] = pack_head(disks)
    end = HEAD_BYTES
    for sequence, record in enumerate(records, start=1):
        offset, packed = pack_slot(sequence, record, disks)
        data[offset : offset + len(packed)] = packed
        end = max(end, offset + len(packed))
    return bytes(data[:end])


@pytest.mark.parametrize("disks", [1, 2, DISKS_MAX])
def test_the_largest_record_fits_and_is_read_back(disks):
    records = [
        Progress(os.urandom(32), [disk(number, max(CLUSTER_SIZES)) for number in range(disks)])
        for _ in range(3)
    ]
    data = file_of(records, disks)
    assert len(data) <= FILE_BYTES_MAX
    assert newest(data) == (3, records[2])
    assert newest(file_of(records[:2], disks)) == (2, records[1])
    assert newest(file_of(records[:1], disks)) == (1, records[0])
    assert newest(file_of([], disks)) is None


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.lists(st.booleans(), min_size=1, max_size=4), st.data())
def test_a_torn_record_leaves_the_one_before(disks, begun, data):
    records = [Progress(bytes(32), [disk(0, frames=frames)]) for frames in range(1, len(begun) + 1)]
    good = file_of(records, disks)
    offset, packed = pack_slot(len(records), records[-1], disks)
    torn = bytearray(good)
    torn[offset + data.draw(st.integers(0, len(packed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert newest(bytes(torn)) == ((len(records) - 1, records[-2]) if len(records) > 1 else None)


@given(st.binary(max_size=200), st.integers(0, 2**32 - 1), st.binary(max_size=300))
def test_garbage_is_no_record(start, size, rest):
    assert newest(start) is None
    assert newest(struct.pack(">8sI", b"HFPARTL2", size).ljust(HEAD_BYTES, b"\0") + rest) is None


@pytest.mark.parametrize(
    "disks",
    [
        [],
        [disk(1), disk(0)],
        [disk(0), disk(0)],
        [disk(2)],
        [disk(-1)],
        [disk(0, frames=0)],
        [disk(0), disk(1, frames=-1)],
    ],
)
def test_numbers_that_fit_no_export_are_not_gone_on_from(disks):
    assert not is_sound(Progress(bytes(32), disks), disks=2)
    assert is_sound(Progress(bytes(32), [disk(0), disk(1)]), disks=2)

"""The qcow2 (version 3) that the repository writes: constants, header, limits, choice of cluster size.

Only the plain subset that every reader gets right: no extended L2, no compression, no snapshots, no
encryption, 16-bit refcounts, every cluster used exactly once. Layout of a file of ours:

    cluster 0    header, extensions, name of the backing file
    then         the L1 table, whole
    then         data clusters and L2 tables, in the order in which they were filled
    at the end   refcount table, refcount blocks

Facts are from QEMU's docs/interop/qcow2.rst; the limits are those of its block driver.
"""

import struct
from collections.abc import Sequence
from typing import Any, Final

import attrs
import numpy as np
import numpy.typing as npt

from daemonkit.units import KiB, MiB
from diskd.core.copy_plan import Run
from diskd.core.stream import FrameKind
from diskd.errors import Damaged, Refused

MAGIC: Final = 0x514649FB
VERSION: Final = 3
HEADER: Final = struct.Struct(">IIQIIQIIQQIIQQQQII")
_EXTENSION: Final = struct.Struct(">II")
_EXTENSION_BACKING_FORMAT: Final = 0xE2792ACA
_BACKING_FORMAT: Final = b"qcow2"
BACKING_NAME_BYTES_MAX: Final = 1023

COPIED: Final = 1 << 63
ZERO_FLAG: Final = 1
OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
REFCOUNT_ORDER: Final = 4

FULL_CLUSTER_BYTES: Final = 64 * KiB
CLUSTER_BYTES_MIN: Final = 4 * KiB
CLUSTER_BYTES_MAX: Final = 64 * KiB
CLUSTER_SIZES: Final = (4 * KiB, 8 * KiB, 16 * KiB, 32 * KiB, 64 * KiB)
# QEMU refuses larger ones (QCOW_MAX_L1_SIZE, QCOW_MAX_REFTABLE_SIZE).
L1_BYTES_MAX: Final = 32 * MiB
REFCOUNT_TABLE_BYTES_MAX: Final = 8 * MiB

TABLE: Final = np.dtype(">u8")


@attrs.frozen
class Header:
    """What the first cluster says. ``l1_entries`` follows from size and cluster size in files of ours."""

    size_bytes: int
    cluster_bytes: int
    l1_offset: int
    l1_entries: int
    refcount_table_offset: int
    refcount_table_clusters: int
    backing: str | None


def l1_entries_of(size_bytes: int, cluster_bytes: int) -> int:
    """How many L2 tables cover the disk."""
    return -(-size_bytes // (cluster_bytes * (cluster_bytes // 8)))


def check_geometry(size_bytes: int, cluster_bytes: int) -> None:
    """Raises Refused for what QEMU would not open."""
    if cluster_bytes not in CLUSTER_SIZES:
        raise Refused(f"a cluster size of {cluster_bytes} bytes is not one of {CLUSTER_SIZES}")
    if size_bytes <= 0 or size_bytes % 512:
        raise Refused(f"a virtual size of {size_bytes} bytes is not a positive multiple of 512")
    if l1_entries_of(size_bytes, cluster_bytes) * 8 > L1_BYTES_MAX:
        raise Refused(f"a disk of {size_bytes} bytes is too large for clusters of {cluster_bytes}")


def pack_header(header: Header) -> bytes:
    """The used part of cluster 0."""
    name = (header.backing or "").encode()
    if len(name) > BACKING_NAME_BYTES_MAX:
        raise Refused("the backing file's name is too long")
    extensions = b""
    if name:
        padded = _BACKING_FORMAT + bytes(-len(_BACKING_FORMAT) % 8)
        extensions = _EXTENSION.pack(_EXTENSION_BACKING_FORMAT, len(_BACKING_FORMAT)) + padded
    extensions += _EXTENSION.pack(0, 0)
    name_offset = HEADER.size + len(extensions) if name else 0
    fixed = HEADER.pack(
        MAGIC,
        VERSION,
        name_offset,
        len(name),
        header.cluster_bytes.bit_length() - 1,
        header.size_bytes,
        0,  # no encryption
        header.l1_entries,
        header.l1_offset,
        header.refcount_table_offset,
        header.refcount_table_clusters,
        0,  # no snapshots
        0,
        0,  # no incompatible features
        0,  # no compatible features (refcounts are not lazy)
        0,  # no autoclear features
        REFCOUNT_ORDER,
        HEADER.size,
    )
    return fixed + extensions + name


def parse_header(data: bytes, file_bytes: int) -> Header:
    """The header of a file of ours. Raises Damaged for anything that we would not have written."""
    if len(data) < HEADER.size:
        raise Damaged("shorter than a qcow2 header")
    fields: tuple[Any, ...] = HEADER.unpack_from(data)
    (magic, version, name_offset, name_bytes, cluster_bits, size, crypt, l1_entries, l1_offset) = fields[:9]
    (table_offset, table_clusters, snapshots, snapshots_offset, incompatible, compatible, autoclear) = fields[
        9:16
    ]
    if (magic, version) != (MAGIC, VERSION):
        raise Damaged("not a qcow2 file of version 3")
    rest = (crypt, snapshots, snapshots_offset, incompatible, compatible, autoclear, *fields[16:])
    if rest != (0, 0, 0, 0, 0, 0, REFCOUNT_ORDER, HEADER.size):
        raise Damaged("a qcow2 file with features that the repository does not use")
    cluster = 1 << cluster_bits if cluster_bits < 32 else 0
    try:
        check_geometry(size, cluster)
    except Refused as error:
        raise Damaged(str(error)) from error
    if l1_entries != l1_entries_of(size, cluster):
        raise Damaged("the L1 table has the wrong size")
    for offset, length in ((l1_offset, l1_entries * 8), (table_offset, table_clusters * cluster)):
        if offset % cluster or offset < cluster or length <= 0 or offset + length > file_bytes:
            raise Damaged("a table lies outside the file")
    if table_clusters * cluster > REFCOUNT_TABLE_BYTES_MAX:
        raise Damaged("the refcount table is too large")
    backing = _parse_backing(data, name_offset, name_bytes)
    return Header(size, cluster, l1_offset, l1_entries, table_offset, table_clusters, backing)


def _parse_backing(data: bytes, name_offset: int, name_bytes: int) -> str | None:
    position = HEADER.size
    formats = []
    while True:
        if position + _EXTENSION.size > len(data):
            raise Damaged("the header extensions do not end")
        kind, length = _EXTENSION.unpack_from(data, position)
        position += _EXTENSION.size
        if kind == 0:
            break
        if kind != _EXTENSION_BACKING_FORMAT or length > 64:
            raise Damaged("an unknown header extension")
        formats.append(bytes(data[position : position + length]))
        position += length + -length % 8
    if name_offset == 0 and name_bytes == 0 and not formats:
        return None
    end = name_offset + name_bytes
    if name_offset != position or not 0 < name_bytes <= BACKING_NAME_BYTES_MAX or end > len(data):
        raise Damaged("the backing file's name is out of place")
    if formats != [_BACKING_FORMAT]:
        raise Damaged("the backing file's format is not given as qcow2")
    try:
        return bytes(data[name_offset:end]).decode()
    except UnicodeDecodeError as error:
        raise Damaged("the backing file's name is not text") from error


def choose_cluster_bytes(runs: Sequence[Run], size_bytes: int) -> int:
    """The cluster size that makes a differential of these runs smallest, data and tables together."""
    best, best_cost = FULL_CLUSTER_BYTES, None
    for cluster in CLUSTER_SIZES:
        l1_bytes = l1_entries_of(size_bytes, cluster) * 8
        if l1_bytes > L1_BYTES_MAX:
            continue
        cost = _file_bytes(runs, cluster) + l1_bytes
        # On a tie the larger one: fewer tables to read.
        if best_cost is None or cost <= best_cost:
            best, best_cost = cluster, cost
    return best


def _file_bytes(runs: Sequence[Run], cluster: int) -> int:
    if not runs:
        return 0
    edges = np.array([(run.offset, run.end, run.kind is FrameKind.DATA) for run in runs], dtype=np.int64)
    starts, ends, is_data = edges[:, 0], edges[:, 1], edges[:, 2].astype(bool)
    first, last = starts // cluster, (ends - 1) // cluster
    # A zero run stores clusters only at its ragged edges; whole clusters are marks in the L2 table.
    head = is_data | (starts % cluster != 0)
    tail = is_data | (ends % cluster != 0)
    stored = np.where(
        is_data, last - first + 1, np.where(first == last, head | tail, head.astype(int) + tail)
    )
    shared = (first[1:] == last[:-1]) & head[1:] & tail[:-1]
    clusters = int(stored.sum()) - int(shared.sum())
    span = cluster * (cluster // 8)
    tables = _touched(starts // span, (ends - 1) // span)
    total = clusters + tables
    return total * cluster + -(-total * 2 // cluster) * cluster


def _touched(first: npt.NDArray[np.int64], last: npt.NDArray[np.int64]) -> int:
    """How many distinct indexes ascending ranges [first, last] touch, where neighbours may share one."""
    return int((last - first + 1).sum()) - int((first[1:] == last[:-1]).sum())

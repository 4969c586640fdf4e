"""`target audit`: is everything that did not change since a point still what the target would restore?

A differential sends the blocks that the change map names and trusts it for the rest. The audit does not: it
compares all the rest, byte for byte, between the frozen disks and the target's point, by digests. So a change
that the map missed is found, with its place, and so is a target that would restore something else.

    source: freezes the VM, and asks for the changes since the point
    source: Question(disk, ranges)       what lies outside them, in order, as data or as zeroes
    target: Answer(digests)              one for each range; the source computed its own meanwhile
    source: where they differ, the same again in smaller ranges, down to the block

A *digest* is empty where everything in the range is zero, whether that is written, zeroed, trimmed or was
never there: the guest cannot tell them apart. Else it is the range's BLAKE3; for a range above PORTION_BYTES,
which is only asked about where the source reads zeroes, it is the one byte SOMETHING.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, TypeAlias, TypeVar

import attrs
import numpy as np
from blake3 import blake3

from daemonkit.codec import decode, encode
from daemonkit.errors import InvariantBroken, OperatorError, ProtocolError
from daemonkit.schema import structure, unstructure
from daemonkit.units import SIZE_BYTES_MAX, GiB, MiB
from diskd.core.ports import Allocation

Range: TypeAlias = tuple[int, int]
T = TypeVar("T")

PORTION_BYTES: Final = 1 * MiB
# Zeroes are asked about in large ranges, so that a terabyte of nothing is a thousand of them.
ZERO_BYTES_MAX: Final = 1 * GiB
# What one question may ask for: bounds the time of its answer, and what both sides have in memory.
RANGES_MAX: Final = 1024
DATA_BYTES_MAX: Final = 64 * MiB
TOTAL_BYTES_MAX: Final = 16 * GiB
MESSAGE_BYTES_MAX: Final = 128 << 10
# The places that differ are told one by one up to this number; the bytes are counted to the end.
MISMATCHES_MAX: Final = 1000
ALL_ZERO: Final = b""
SOMETHING: Final = b"\x01"
_DIGEST_BYTES: Final = 32


@attrs.frozen
class Question:
    """``ranges`` of one disk: [offset, length], ascending."""

    disk: str
    ranges: list[list[int]]


@attrs.frozen
class Answer:
    """One digest per range; or why there is none (then nothing follows)."""

    digests: list[bytes]
    refused: str | None = None


@attrs.frozen
class Probe:
    """A range that is compared; ``is_zero``: the source knows without reading that it is all zero."""

    offset: int
    length: int
    is_zero: bool

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.length


def encode_message(message: Question | Answer) -> bytes:
    """msgpack; the caller frames it."""
    return encode(unstructure(message))


def decode_question(payload: bytes) -> Question:
    """Raises ProtocolError for anything but ascending ranges, few enough to be answered."""
    question = _decode(Question, payload)
    if not 0 < len(question.ranges) <= RANGES_MAX or any(len(pair) != 2 for pair in question.ranges):
        raise ProtocolError("the audit asks for too many ranges, or none")
    position = data = total = 0
    for offset, length in question.ranges:
        if offset < position or not 0 < length <= ZERO_BYTES_MAX:
            raise ProtocolError("the audit's ranges are out of order or out of bounds")
        position = offset + length
        total += length
        data += length if length <= PORTION_BYTES else 0
    if position > SIZE_BYTES_MAX or data > DATA_BYTES_MAX or total > TOTAL_BYTES_MAX:
        raise ProtocolError("the audit asks for more than one answer holds")
    return question


def decode_answer(payload: bytes, probes: Sequence[Probe]) -> Answer:
    """Raises ProtocolError for what does not fit the question."""
    answer = _decode(Answer, payload)
    if answer.refused is None:
        fits = len(answer.digests) == len(probes) and all(
            digest == ALL_ZERO or len(digest) == (_DIGEST_BYTES if probe.length <= PORTION_BYTES else 1)
            for digest, probe in zip(answer.digests, probes, strict=True)
        )
        if not fits:
            raise ProtocolError("the target answered another question than was asked")
    return answer


def _decode(kind: type[T], payload: bytes) -> T:
    try:
        return structure(kind, decode(payload, size_bytes_max=MESSAGE_BYTES_MAX), where="audit")
    except OperatorError as error:
        raise ProtocolError(f"the audit's message cannot be read: {error}") from error


def digest_of(data: bytes | bytearray | memoryview) -> bytes:
    """Of a range of at most PORTION_BYTES."""
    if not np.frombuffer(data, dtype=np.uint8).any():
        return ALL_ZERO
    return blake3(data).digest()


def unchanged(size_bytes: int, changed: Iterable[Range]) -> Iterator[Range]:
    """What lies outside ``changed`` (ascending, not overlapping) on a disk of this size."""
    position = 0
    for offset, length in changed:
        if offset < position or length < 0:
            raise InvariantBroken(f"the changes are out of order at {offset}")
        if min(offset, size_bytes) > position:
            yield position, min(offset, size_bytes) - position
        position = offset + length
    if position < size_bytes:
        yield position, size_bytes - position


def probes_of(allocations: Iterable[Allocation]) -> Iterator[Probe]:
    """How to compare stretches of the disk: data in portions on their borders, zeroes in long ranges."""
    pending: Probe | None = None
    for piece in allocations:
        is_zero = piece.kind != "data"
        if is_zero and pending is not None and pending.end == piece.offset:
            pending = Probe(pending.offset, pending.length + piece.length, is_zero=True)
            continue
        if pending is not None:
            yield from _cut(pending, ZERO_BYTES_MAX)
            pending = None
        if is_zero:
            pending = Probe(piece.offset, piece.length, is_zero=True)
        else:
            yield from _cut(Probe(piece.offset, piece.length, is_zero=False), PORTION_BYTES)
    if pending is not None:
        yield from _cut(pending, ZERO_BYTES_MAX)


def _cut(probe: Probe, step: int) -> Iterator[Probe]:
    offset = probe.offset
    while offset < probe.end:
        end = min(probe.end, (offset // step + 1) * step)
        yield Probe(offset, end - offset, probe.is_zero)
        offset = end


def questions_of(probes: Iterable[Probe]) -> Iterator[list[Probe]]:
    """As many probes together as one question may hold."""
    batch: list[Probe] = []
    data = total = 0
    for probe in probes:
        size = probe.length if probe.length <= PORTION_BYTES else 0
        is_full = data + size > DATA_BYTES_MAX or total + probe.length > TOTAL_BYTES_MAX
        if batch and (is_full or len(batch) == RANGES_MAX):
            yield batch
            batch, data, total = [], 0, 0
        batch.append(probe)
        data += size
        total += probe.length
    if batch:
        yield batch


def narrower(probe: Probe, block_bytes: int) -> list[Probe]:
    """The smaller ranges to look at where a probe differs; empty when it is a block, or less, itself."""
    step = PORTION_BYTES if probe.length > PORTION_BYTES else block_bytes
    parts = list(_cut(probe, step))
    return parts if len(parts) > 1 else []


class Findings:
    """Where a disk differs: places coalesced, up to a bound, and the bytes in all."""

    def __init__(self) -> None:
        self.places: list[list[int]] = []
        self.bytes = 0

    def add(self, offset: int, length: int) -> None:
        """Ascending."""
        self.bytes += length
        if self.places and sum(self.places[-1]) == offset:
            self.places[-1][1] += length
        elif len(self.places) < MISMATCHES_MAX:
            self.places.append([offset, length])

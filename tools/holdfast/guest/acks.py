"""The acknowledgements outside the image: one line for each, appended with one write to a shared file.

    ack EPOCH NODE SEQUENCE MONOTONIC_NS        the record is flushed
    refused EPOCH NODE SEQUENCE MONOTONIC_NS    this run was told that it is fenced

Every node of a lab machine appends to the same file, and CLOCK_MONOTONIC is the machine's own, so that
the times of different writers compare. Such a line is what the guest would have told a client: from
then on the record must never be missing.
"""

import os
from typing import Final, Literal, NamedTuple

ACKS_BYTES_MAX: Final = 1 << 30
LINE_BYTES_MAX: Final = 256  # a kind, a node's name and three numbers
Kind = Literal["ack", "refused"]


class AcksError(Exception):
    """The file holds a line that no guest writes."""


class Line(NamedTuple):
    kind: Kind
    epoch: int
    node: str
    sequence: int
    monotonic_ns: int


class AcksFile:
    """The writing side. A line is one write of O_APPEND: never mixed with another writer's."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def append(self, line: Line) -> None:
        os.write(self._descriptor, (" ".join(map(str, line)) + "\n").encode())

    def close(self) -> None:
        os.close(self._descriptor)


def parse_acks(data: bytes) -> list[Line]:
    """The lines, in the file's order. A last line without its end is one that is still being written."""
    whole, _, torn = data.rpartition(b"\n")
    if len(torn) > LINE_BYTES_MAX:
        raise AcksError("the acknowledgements end in what is no line of a guest")
    return [_parse_line(number, text) for number, text in enumerate(whole.split(b"\n"), 1) if text]


def _parse_line(number: int, text: bytes) -> Line:
    fields = text.decode(errors="replace").split(" ")
    kind: Kind
    if len(fields) == 5 and fields[0] == "ack":
        kind = "ack"
    elif len(fields) == 5 and fields[0] == "refused":
        kind = "refused"
    else:
        raise AcksError(f"line {number} of the acknowledgements is neither 'ack' nor 'refused'")
    try:
        return Line(kind, int(fields[1]), fields[2], int(fields[3]), int(fields[4]))
    except ValueError as error:
        raise AcksError(f"line {number} of the acknowledgements: {error}") from error

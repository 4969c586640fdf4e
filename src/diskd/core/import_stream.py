"""An image's content on its way into diskd, from a client that reads it from a pipe (``image.receive``).

msgpack messages in length-prefixed frames (daemonkit.frames), after the call's "ok":

    client: bytes           the next bytes of the disk, at most DATA_BYTES_MAX
    client: N               N zero bytes; 0 is a sign of life from a client whose pipe is slow
    client: None            that was all
    server: ["done", IMAGE] | ["refused", MESSAGE]

A client that goes away before its None has imported nothing.
"""

from typing import Any, Final

import attrs

from daemonkit.codec import decode, encode
from daemonkit.errors import ProtocolError
from daemonkit.frames import frame
from daemonkit.units import SIZE_BYTES_MAX, KiB, MiB

DATA_BYTES_MAX: Final = 1 * MiB
MESSAGE_BYTES_MAX: Final = DATA_BYTES_MAX + KiB
ANSWER_BYTES_MAX: Final = 64 * KiB
# A client says something this often; one that is silent for the longer time is gone.
ALIVE_SECONDS: Final = 5.0
SILENCE_SECONDS_MAX: Final = 60.0

Piece = bytes | int | None


@attrs.frozen
class Answer:
    """``document``: the new image as ``image.show`` answers it, or None with why there is none."""

    document: Any
    refusal: str | None


def encode_piece(piece: Piece) -> bytes:
    """One frame, on the wire."""
    return frame(encode(piece))


def decode_piece(payload: bytes) -> Piece:
    """Raises ProtocolError for anything else than a piece within its bounds."""
    piece = decode(payload, size_bytes_max=MESSAGE_BYTES_MAX)
    if piece is None or (isinstance(piece, bytes) and 0 < len(piece) <= DATA_BYTES_MAX):
        return piece
    if type(piece) is int and 0 <= piece <= SIZE_BYTES_MAX:
        return piece
    raise ProtocolError("not a piece of an image: bytes, a count of zeroes, or nil")


def encode_answer(answer: Answer) -> bytes:
    """One frame, on the wire."""
    if answer.refusal is not None:
        return frame(encode(["refused", answer.refusal]))
    return frame(encode(["done", answer.document]))


def decode_answer(payload: bytes) -> Answer:
    """Raises ProtocolError for anything else than an answer."""
    found = decode(payload, size_bytes_max=ANSWER_BYTES_MAX)
    if isinstance(found, list) and len(found) == 2:
        if found[0] == "done":
            return Answer(found[1], None)
        if found[0] == "refused" and isinstance(found[1], str):
            return Answer(None, found[1])
    raise ProtocolError("diskd answered in an unknown form")

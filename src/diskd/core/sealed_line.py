"""Small durable records: one JSON line and its CRC-32, readable for people, and known as damaged if it is."""

import json
import zlib
from typing import Any


def seal(version: int, fields: dict[str, Any]) -> bytes:
    """The file's content. ``fields`` is plain data for JSON."""
    body = json.dumps({"version": version, **fields}, sort_keys=True)
    return f"{body}\n{zlib.crc32(body.encode()):08x}\n".encode()


def unseal(version: int, data: bytes) -> dict[str, Any]:
    """The fields, whose types are still to be checked. Raises ValueError (or TypeError, KeyError,
    AttributeError, RecursionError, as JSON of another shape makes them) for anything that ``seal`` of this
    version has not written."""
    body, check, rest = data.decode("ascii").split("\n")
    if rest or check != f"{zlib.crc32(body.encode()):08x}":
        raise ValueError("checksum")
    fields: dict[str, Any] = json.loads(body)
    if fields.pop("version") != version:
        raise ValueError("version")
    return fields

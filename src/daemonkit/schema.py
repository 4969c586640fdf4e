"""Plain data (TOML, JSON, msgpack) into frozen attrs classes and back, strictly, with cattrs.

An unknown key is an error that names the nearest known one; a missing or ill-typed value names its
place. Nothing is coerced, except that a whole number is accepted where a float is asked for.
Absent values stay None in what is written, never missing.
"""

import difflib
from typing import Any, Final, NoReturn, TypeVar

import attrs
from cattrs import Converter
from cattrs.errors import (
    AttributeValidationNote,
    BaseValidationError,
    ForbiddenExtraKeysError,
    IterableValidationNote,
)

from daemonkit.errors import OperatorError

T = TypeVar("T")


class SchemaError(OperatorError):
    """Data that does not fit the class; the message names the place and the remedy."""


def _strict(data: Any, kind: type) -> Any:
    if kind is float and type(data) is int:
        return float(data)
    if kind is bytes and type(data) is bytearray:
        return bytes(data)
    if type(data) is not kind:
        raise TypeError(f"expected {kind.__name__}, found {type(data).__name__}")
    return data


def _converter() -> Converter:
    converter = Converter(forbid_extra_keys=True, detailed_validation=True)
    for kind in (str, int, float, bool, bytes):
        converter.register_structure_hook(kind, _strict)
        converter.register_unstructure_hook(kind, lambda value: value)
    return converter


_CONVERTER: Final = _converter()


def structure(cls: type[T], data: Any, *, where: str = "") -> T:
    """``data`` as an instance of ``cls``. ``where`` names the document in errors. Raises SchemaError."""
    if attrs.has(cls) and not isinstance(data, dict):
        raise SchemaError(f"{where or cls.__name__}: expected a table, found {type(data).__name__}")
    try:
        return _CONVERTER.structure(data, cls)
    except RecursionError as error:
        raise SchemaError(f"{where or cls.__name__}: nested too deeply") from error
    except (
        BaseValidationError,
        ForbiddenExtraKeysError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:
        _explain(error, where)


def unstructure(value: Any) -> Any:
    """Plain data of attrs instances, recursively."""
    return _CONVERTER.unstructure(value)


def _explain(error: BaseException, where: str) -> NoReturn:
    """Raise SchemaError for the first leaf of cattrs' exception tree, with the path that leads to it."""
    path = where
    leaf = error
    while isinstance(leaf, BaseValidationError) and leaf.exceptions:
        # An unknown key says more than the missing one that it probably was meant to be.
        leaf = min(leaf.exceptions, key=lambda inner: not isinstance(inner, ForbiddenExtraKeysError))
        if isinstance(leaf, KeyError):
            break
        for note in getattr(leaf, "__notes__", ()):
            if isinstance(note, AttributeValidationNote):
                path = f"{path}.{note.name}" if path else str(note.name)
            elif isinstance(note, IterableValidationNote):
                path = f"{path}[{note.index}]"
    prefix = f"{path}: " if path else ""
    raise SchemaError(prefix + _reason(leaf)) from error


def _reason(leaf: BaseException) -> str:
    if isinstance(leaf, ForbiddenExtraKeysError):
        known = [field.name for field in attrs.fields(leaf.cl)]
        key = min(map(str, leaf.extra_fields))
        near = difflib.get_close_matches(key, known, n=1)
        hint = f", did you mean {near[0]!r}?" if near else f" (known: {', '.join(known)})"
        return f"unknown key {key!r}{hint}"
    if isinstance(leaf, KeyError):
        return f"{leaf.args[0]!r} is missing"
    return str(leaf) or type(leaf).__name__

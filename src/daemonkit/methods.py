"""The name of a control call with the classes of its parameters and its result: no I/O, so that pure
modules can declare the calls which ``daemonkit.rpc`` carries."""

from typing import Generic, TypeVar

import attrs

P = TypeVar("P")
R = TypeVar("R")


@attrs.frozen
class Method(Generic[P, R]):
    """``params`` and ``result`` are frozen attrs classes of plain data (daemonkit.schema)."""

    name: str
    params: type[P]
    result: type[R]

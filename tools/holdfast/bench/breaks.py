"""The rules of DESIGN.md section 4, each with an edit that breaks it and the tests that must notice."""

import attrs


@attrs.frozen
class Break:
    """``old`` occurs exactly once in ``file``; with ``new`` in its place the rule is broken."""

    name: str
    rule: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


BREAKS: tuple[Break, ...] = ()

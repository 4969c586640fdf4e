"""What scripts may rely on, of the real files and of the simulated disk alike.

``CASES`` are functions of a runner: something that runs a whole script and gives its result.
"""

import errno
from collections.abc import Callable
from typing import Any

from diskd.core.steps import (
    Allocate,
    Create,
    Names,
    Punch,
    Read,
    Remove,
    Replace,
    Script,
    Size,
    Step,
    Sync,
    Truncate,
    Write,
)

Run = Callable[[Script[Any]], Any]


def steps(*wanted: Step) -> Script[list[Any]]:
    results = []
    for step in wanted:
        results.append((yield step))
    return results


def refused(step: Step) -> Script[int | None]:
    """The errno of a step that must fail; the script goes on afterwards."""
    try:
        yield step
    except OSError as error:
        yield Size("a")
        return error.errno
    return None


def writes_read_back(run: Run) -> None:
    run(steps(Truncate("a", 5000), Write("a", 1000, b"hello"), Write("a", 1003, b"LO!"), Sync("a")))
    assert run(steps(Read("a", 998, 10))) == [b"\0\0helLO!\0\0"]
    assert run(steps(Read("a", 4998, 100), Read("a", 5000, 1), Read("a", 9000, 1))) == [b"\0\0", b"", b""]


def writes_beyond_the_end_grow_the_file(run: Run) -> None:
    run(steps(Truncate("a", 10), Write("a", 600, b"x")))
    assert run(steps(Size("a"), Read("a", 0, 1000))) == [601, bytes(600) + b"x"]


def allocation_grows_and_never_shrinks(run: Run) -> None:
    run(steps(Allocate("a", 2000), Write("a", 10, b"x"), Allocate("a", 1000)))
    assert run(steps(Size("a"), Read("a", 10, 1))) == [2000, b"x"]


def truncation_discards(run: Run) -> None:
    run(steps(Truncate("a", 3000), Write("a", 100, b"x" * 2900), Truncate("a", 700), Truncate("a", 3000)))
    assert run(steps(Read("a", 0, 3000))) == [bytes(100) + b"x" * 600 + bytes(2300)]


def punching_zeroes_and_keeps_the_size(run: Run) -> None:
    run(
        steps(
            Truncate("a", 20_000),
            Write("a", 0, b"x" * 20_000),
            Punch("a", 100, 9000),
            Punch("a", 19_000, 9000),
        )
    )
    assert run(steps(Size("a"), Read("a", 0, 20_000))) == [
        20_000,
        b"x" * 100 + bytes(9000) + b"x" * 9900 + bytes(1000),
    ]


def replacing_and_removing(run: Run) -> None:
    run(steps(Replace("a", b"one"), Replace("a", b"second")))
    assert run(steps(Size("a"), Read("a", 0, 100))) == [6, b"second"]
    run(steps(Remove("a"), Remove("a")))
    assert run(steps(Size("a"))) == [None]


def creating_never_replaces(run: Run) -> None:
    run(steps(Create("a", b"one")))
    assert run(refused(Create("a", b"another"))) == errno.EEXIST
    assert run(steps(Read("a", 0, 100))) == [b"one"]
    run(steps(Remove("a"), Create("a", b"three"), Create("a.7", b""), Create("b", b"")))
    assert run(steps(Names("a"), Names("a."), Names("c"), Read("a", 0, 9))) == [
        ["a", "a.7"],
        ["a.7"],
        [],
        b"three",
    ]


def a_missing_file_is_an_error_that_the_script_sees(run: Run) -> None:
    for step in (Read("a", 0, 1), Write("a", 0, b"x"), Punch("a", 0, 1), Sync("a")):
        assert run(refused(step)) == errno.ENOENT


def a_result_comes_back(run: Run) -> None:
    def script() -> Script[str]:
        yield Replace("a", b"text")
        return (yield Read("a", 0, 9)).decode()

    assert run(script()) == "text"

    def nothing() -> Script[int]:
        return 7
        yield Sync("a")

    assert run(nothing()) == 7


CASES = [
    writes_read_back,
    writes_beyond_the_end_grow_the_file,
    allocation_grows_and_never_shrinks,
    truncation_discards,
    punching_zeroes_and_keeps_the_size,
    replacing_and_removing,
    creating_never_replaces,
    a_missing_file_is_an_error_that_the_script_sees,
    a_result_comes_back,
]

"""What the five command lines share: exit codes, one-line errors, units as parameters, JSON, readiness.

Exit codes (DESIGN.md section 9): 0 done, 1 refused or failed with one line on stderr, 2 usage.
"""

import faulthandler
import importlib
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
import trio

from daemonkit.diskd_api import COMPRESS_LEVEL_DEFAULT, COMPRESS_LEVEL_MAX
from daemonkit.durable import read_small_file
from daemonkit.errors import HoldfastError, OperatorError, plain
from daemonkit.methods import Method
from daemonkit.ports import Address
from daemonkit.rpc import CallFailed, connect
from daemonkit.units import UnitError, parse_duration, parse_size

P = TypeVar("P")
R = TypeVar("R")

CALL_SECONDS_MAX = 10.0
KEY_BYTES_MIN = 16
KEY_BYTES_MAX = 4096


class _Quantity(click.ParamType[Any]):
    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except (UnitError, HoldfastError) as error:
            self.fail(str(error), param, ctx)


class LazyGroup(click.Group):
    """A group whose verbs are imported when they are used: ``MODULE:NAME`` by the verb's name.

    A command line is started for one verb, and what the others need is most of the time until it begins.
    """

    def __init__(self, *args: Any, verbs: dict[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._verbs = verbs

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *self._verbs})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self._verbs:
            module, _, name = self._verbs[cmd_name].partition(":")
            self.add_command(getattr(importlib.import_module(module), name), cmd_name)
            del self._verbs[cmd_name]
        return super().get_command(ctx, cmd_name)


DURATION = _Quantity("duration", parse_duration)
SIZE = _Quantity("size", parse_size)
ADDRESS = _Quantity("host:port", Address.parse)

# As rsync has them: a flag, and a level that implies it.
COMPRESS = click.option(
    "--compress", is_flag=True, help="Compress what is sent (zstd), where that makes it shorter."
)
COMPRESS_LEVEL = click.option(
    "--compress-level",
    metavar="LEVEL",
    type=click.IntRange(1, COMPRESS_LEVEL_MAX),
    help=f"How hard, 1 (fastest) to {COMPRESS_LEVEL_MAX}; {COMPRESS_LEVEL_DEFAULT} for --compress alone.",
)


def level_of(compress: bool, level: int | None) -> int:
    """What the two options say; 0 for no compression."""
    return level or (COMPRESS_LEVEL_DEFAULT if compress else 0)


def run_main(command: click.Command) -> NoReturn:
    """Run a click command as a process's main: an expected failure is one line on stderr and an exit code."""
    try:
        code = command.main(standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        # A group without a verb: what it can do, as it is laid out, and still the exit code of wrong usage.
        print(error.format_message(), file=sys.stderr)
        sys.exit(2)
    except click.UsageError as error:
        usage = f" ({error.ctx.command_path} --help tells more)" if error.ctx else ""
        _die(error.format_message() + usage, 2)
    except click.ClickException as error:
        _die(error.format_message(), 1)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone; Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (HoldfastError, OSError, BaseExceptionGroup) as error:
        _die_of(error)
    sys.exit(code if isinstance(code, int) else 0)


def _die_of(error: BaseException) -> NoReturn:
    leaves = list(_leaves(error))
    for leaf in leaves:
        if isinstance(leaf, HoldfastError):
            _die(str(leaf), leaf.exit_code)
    for leaf in leaves:
        if isinstance(leaf, OSError):
            where = f"{leaf.filename}: " if leaf.filename else ""
            _die(f"{where}{leaf.strerror or leaf}", 1)
    if all(isinstance(leaf, KeyboardInterrupt) for leaf in leaves):
        sys.exit(130)
    raise error


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]


def _die(message: str, code: int) -> NoReturn:
    program = Path(sys.argv[0])
    # `python -m holdfast.bench` runs .../holdfast/bench/__main__.py: the package is the program's name.
    name = ".".join(program.parts[-3:-1]) if program.stem == "__main__" else program.name
    line = plain(" ".join(message.split()))
    print(f"{name}: {line}", file=sys.stderr)
    sys.exit(code)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=2, sort_keys=False))


def announce_ready(**facts: Any) -> None:
    """The one line a daemon writes to stdout: JSON, once it serves, with the addresses it is bound to."""
    places = ", ".join(f"{name} {value}" for name, value in facts.items() if isinstance(value, str))
    from daemonkit.service import notify_ready  # daemons only

    notify_ready(f"serving: {places}")
    print(json.dumps({"event": "ready", "pid": os.getpid(), **facts}), flush=True)


def read_key(path: str | None) -> bytes | None:
    """The key in ``path``, or in the file that HOLDFAST_KEY_FILE names, or None. Raises OperatorError."""
    path = path or os.environ.get("HOLDFAST_KEY_FILE")
    if not path:
        return None
    try:
        key = read_small_file(Path(path), size_bytes_max=KEY_BYTES_MAX).strip()
    except OSError as error:
        raise OperatorError(f"key file {path}: {error.strerror}") from error
    if len(key) < KEY_BYTES_MIN:
        raise OperatorError(f"key file {path}: a key has at least {KEY_BYTES_MIN} bytes")
    return key


async def call_once(
    address: Address,
    method: Method[P, R],
    params: P,
    *,
    key: bytes | None = None,
    seconds_max: float = CALL_SECONDS_MAX,
    on_progress: Callable[[Any], None] | None = None,
) -> R:
    """Connect, call, close. Raises CallRefused or CallFailed; ``seconds_max`` bounds all of it."""
    try:
        with trio.fail_after(seconds_max):
            async with connect(address, key=key) as client:
                return await client.call(method, params, on_progress=on_progress)
    except trio.TooSlowError as error:
        raise CallFailed(f"{address}: no answer to {method.name} within {seconds_max:g} s") from error


def run_daemon_async(function: Callable[[], Awaitable[None]]) -> None:
    """As run_async, for a daemon: with signs of life for whoever supervises it."""
    faulthandler.enable()  # SIGABRT, which a watchdog sends, then says what every thread was doing.
    from daemonkit.service import watched  # daemons only

    run_async(lambda: watched(function))


def run_async(function: Callable[[], Awaitable[R]]) -> R:
    """trio.run with our settings; exception groups come out as they are, for run_main to explain."""
    return trio.run(function, restrict_keyboard_interrupt_to_checkpoints=True)

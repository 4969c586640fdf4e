"""``python -m holdfast.guest``: the journal guest, a VM worth protecting, run by the ``process`` driver."""

import re
import signal
import sys
from types import FrameType
from typing import Final

from holdfast.guest.command_line import OneLineParser, describe_os_error
from holdfast.guest.journal import NODE_BYTES_MAX, JournalError
from holdfast.guest.nbd import Fenced, parse_uri
from holdfast.guest.run import EXIT_FENCED, Settings, run_guest, say

RATE_MAX: Final = 10_000.0
BOOT_SECONDS_MAX: Final = 600.0
_NODE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class _Stopped(Exception):
    """SIGTERM or SIGINT."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped


def _parse() -> Settings:
    parser = OneLineParser(
        prog="holdfast.guest",
        description="Keeps a journal on an NBD disk: every record is written, flushed, then counted in "
        "the file of acknowledgements. Continues where the journal ends; reconnects for ever.",
        epilog="Exit codes: 0 told to stop, 1 failed, 2 usage, 10 fenced (another owner has the disk).",
    )
    parser.add_argument("--disk", required=True, metavar="URI", help="nbd://HOST:PORT/NAME")
    parser.add_argument("--acks", required=True, metavar="FILE", help="acknowledgements are appended here")
    parser.add_argument("--epoch", required=True, type=int, help="the epoch of this run")
    parser.add_argument("--node", required=True, help="the node that this run is on")
    parser.add_argument("--rate", type=float, default=50.0, help="records per second (default 50)")
    parser.add_argument(
        "--size-load",
        type=float,
        default=0.0,
        metavar="BLOCKS",
        help="extra random blocks of 4 KiB per second, which the checker verifies too (default 0)",
    )
    parser.add_argument(
        "--boot",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="wait so long before touching the disk, as a machine that boots does (default 0)",
    )
    given = parser.parse_args()
    try:
        parse_uri(given.disk)
    except ValueError as error:
        parser.error(str(error))
    if given.epoch < 0:
        parser.error("--epoch is not negative")
    if not 0 < given.rate <= RATE_MAX or not 0 <= given.size_load <= RATE_MAX:
        parser.error(f"--rate and --size-load are at most {RATE_MAX:g} per second, and --rate above 0")
    if not 0 <= given.boot <= BOOT_SECONDS_MAX:
        parser.error(f"--boot is at most {BOOT_SECONDS_MAX:g} seconds")
    if not _NODE.fullmatch(given.node) or len(given.node) > NODE_BYTES_MAX:
        parser.error(f"--node is a name of at most {NODE_BYTES_MAX} characters")
    return Settings(given.disk, given.acks, given.epoch, given.node, given.rate, given.size_load, given.boot)


def main() -> int:
    settings = _parse()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        run_guest(settings)
    except _Stopped:
        return 0
    except Fenced as error:
        say(f"fenced: {error}")
        return EXIT_FENCED
    except JournalError as error:
        say(str(error))
        return 1
    except OSError as error:
        say(describe_os_error(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

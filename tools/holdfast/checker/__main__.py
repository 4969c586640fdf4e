"""``python -m holdfast.checker``: was any acknowledged record lost, did two owners ever write at once?"""

import json
import sys
from typing import Final

from holdfast.checker.disk import open_disk
from holdfast.checker.verdict import Verdict, judge
from holdfast.guest.acks import ACKS_BYTES_MAX, AcksError, parse_acks
from holdfast.guest.command_line import OneLineParser, describe_os_error
from holdfast.guest.journal import JournalError
from holdfast.guest.nbd import NbdError

EXIT_BAD: Final = 1


def check(acks_path: str, disk: str) -> Verdict:
    """Read the acknowledgements, then the disk: in that order, or the guest's newest would look lost."""
    with open(acks_path, "rb") as file:
        data = file.read(ACKS_BYTES_MAX + 1)
    if len(data) > ACKS_BYTES_MAX:
        raise AcksError(f"{acks_path}: larger than {ACKS_BYTES_MAX} bytes")
    lines = parse_acks(data)
    with open_disk(disk) as opened:
        return judge(lines, opened.read, opened.size_bytes)


def describe(verdict: Verdict) -> str:
    """The verdict for people."""
    lines = [
        f"{verdict.records} records acknowledged, {verdict.lost} lost, {verdict.overlaps} overlaps, "
        f"longest gap {verdict.longest_gap_s:.3f} s, {verdict.load_blocks} load blocks verified"
    ]
    lines += [f"  epoch {e} on {node}: records {first} to {last}" for e, node, first, last in verdict.owners]
    lines += [f"  refused: epoch {e} on {node}, at record {s}" for e, node, s in verdict.refused]
    lines += [f"  lost: {example}" for example in verdict.examples]
    return "\n".join(lines)


def main() -> int:
    parser = OneLineParser(
        prog="holdfast.checker",
        description="Compares a guest's acknowledgements with its disk.",
        epilog="Exit codes: 0 nothing lost and no overlap, 1 otherwise or failed, 2 usage.",
    )
    parser.add_argument("--acks", required=True, metavar="FILE", help="a copy, or the file itself")
    parser.add_argument("--disk", required=True, metavar="FILE|URI", help="raw file or nbd://HOST:PORT/NAME")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    given = parser.parse_args()
    try:
        verdict = check(given.acks, given.disk)
    except (AcksError, JournalError, NbdError, OSError, ValueError) as error:
        reason = describe_os_error(error) if isinstance(error, OSError) else str(error)
        print(f"holdfast.checker: {reason}", file=sys.stderr)
        return EXIT_BAD
    print(json.dumps(verdict.as_json(), indent=2) if given.json else describe(verdict))
    return 0 if verdict.is_good else EXIT_BAD


if __name__ == "__main__":
    sys.exit(main())

"""TOML that came over a wire, into plain data: bounded, since a daemon's loop waits for it.

The parser's time grows with the square of the parts of a dotted key: 16 KiB of ``a.a.a…`` took a second, 64
KiB ten. No line of a file that somebody wrote has hundreds of dots outside of its strings.
"""

import re
import tomllib
from typing import Any, Final

from daemonkit.errors import OperatorError

DOTS_PER_LINE_MAX: Final = 200
_STRING: Final = re.compile(r'"(?:[^"\\]|\\.)*"|\'[^\']*\'')


class NotToml(OperatorError):
    """The text does not read; the message is one line."""


def parse_toml(text: str) -> dict[str, Any]:
    """Raises NotToml."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") > DOTS_PER_LINE_MAX and _STRING.sub("", line).count(".") > DOTS_PER_LINE_MAX:
            raise NotToml(f"line {number}: a key of so many parts is not read")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits
        raise NotToml(" ".join(str(error).split())[:300]) from error

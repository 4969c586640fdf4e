"""Errors say whose fault it is and what dies of it.

``OperatorError``  somebody asked for what cannot be: one line on stderr, exit code 1.
``UsageError``     the command line itself is wrong: one line, exit code 2.
``ProtocolError``  the peer broke the protocol: its connection is closed, nothing else.
``InvariantBroken`` our own defect: the process ends, loudly.
"""

import re
from typing import Final

_NUMBER: Final = re.compile(r"\[Errno -?\d+\] ")


def plain(text: str) -> str:
    """Without the "[Errno 28] " of an OSError's own text: the words say it, the number is a programmer's."""
    return _NUMBER.sub("", text)


def words_of(error: BaseException) -> str:
    """An error in words, for people."""
    return plain(str(error)) or type(error).__name__


class HoldfastError(Exception):
    """Base of every error that this project raises on purpose."""

    exit_code = 1


class OperatorError(HoldfastError):
    """Refused or failed. The message is one line: what, why, what to do."""


class UsageError(HoldfastError):
    """The command line is wrong."""

    exit_code = 2


class ProtocolError(HoldfastError):
    """The peer sent what the protocol does not allow; the connection ends."""


class InvariantBroken(HoldfastError):
    """A rule that must never break is broken: a defect of this program."""

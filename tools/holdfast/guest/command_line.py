"""What the guest's and the checker's command lines share: a mistake is one line, and exit code 2.

They import nothing of the daemons, so this is argparse and not the daemons' click.
"""

import argparse
import sys
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """argparse without the usage text before every error; ``--help`` has it."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} ({self.prog} --help tells more)", file=sys.stderr)
        sys.exit(2)


def describe_os_error(error: OSError) -> str:
    """As a sentence for people: file and reason, without the number."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"

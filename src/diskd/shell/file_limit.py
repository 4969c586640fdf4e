"""How many files a daemon may have open at once."""

import contextlib
import resource
from typing import Final

# Far above what 64 hosts need; a bound all the same, since some kernels pay for each possible one.
_FILES_MAX: Final = 65536


def raise_file_limit() -> None:
    """The usual soft limit of 1,024 is soon reached: by a connection's descriptor and an image's several at
    `diskd run`, by two for each disk that is received, and one for each file below it, at `diskd target`."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, _FILES_MAX)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))

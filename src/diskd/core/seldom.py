"""How often the same thing is said: a client that knocks for ever must not fill a log."""

from typing import Final

import attrs

KEYS_MAX: Final = 256  # things told apart; while all of them are recent, nothing new is said


@attrs.define
class _Said:
    at_ns: int
    silenced: int = 0


class Seldom:
    """Each thing is said at once, and then at most once per ``every_ns``."""

    def __init__(self, every_ns: int) -> None:
        self._every_ns = every_ns
        self._said: dict[str, _Said] = {}

    def ask(self, key: str, now_ns: int) -> int | None:
        """None: keep silent. Else say it now, and how many times it was not said since the last time."""
        said = self._said.get(key)
        if said is None:
            if len(self._said) >= KEYS_MAX:
                self._forget(now_ns)
            if len(self._said) >= KEYS_MAX:
                return None
            self._said[key] = _Said(now_ns)
            return 0
        if now_ns < said.at_ns + self._every_ns:
            said.silenced += 1
            return None
        silenced = said.silenced
        self._said[key] = _Said(now_ns)
        return silenced

    def _forget(self, now_ns: int) -> None:
        for key in [key for key, said in self._said.items() if now_ns >= said.at_ns + self._every_ns]:
            del self._said[key]

"""The simulated store: linearizable, with leases and guarded transactions, as etcd has them.

It answers in the order of arrival; whether question and answer travel is the network's business.
"""

import attrs

from clusterd.core.effects import Compare, Put
from clusterd.core.events import StoreEntry


@attrs.define
class SimStore:
    revision: int = 1
    entries: dict[str, StoreEntry] = attrs.field(factory=dict)
    leases: dict[int, tuple[int, int]] = attrs.field(factory=dict)  # ttl, good until
    next_lease: int = 1000
    is_up: bool = True

    def expire(self, now: int) -> None:
        """Drop what the leases that ran out carried."""
        for lease in [lease for lease, (_, until) in self.leases.items() if now >= until]:
            self.revoke(lease)

    def revoke(self, lease: int) -> None:
        self.leases.pop(lease, None)
        gone = [key for key, entry in self.entries.items() if entry.lease == lease]
        if gone:
            self.revision += 1
            for key in gone:
                del self.entries[key]

    def restart(self, now: int) -> None:
        """Every lease gets its full time again, as the witness does."""
        self.is_up = True
        self.leases = {lease: (ttl, now + ttl) for lease, (ttl, _) in self.leases.items()}

    def grant(self, ttl_ns: int, now: int) -> int:
        self.next_lease += 1
        self.leases[self.next_lease] = (ttl_ns, now + ttl_ns)
        return self.next_lease

    def keep(self, lease: int, now: int) -> bool:
        self.expire(now)
        if lease not in self.leases:
            return False
        ttl = self.leases[lease][0]
        self.leases[lease] = (ttl, now + ttl)
        return True

    def read(self, now: int) -> tuple[int, tuple[StoreEntry, ...]]:
        self.expire(now)
        return self.revision, tuple(self.entries[key] for key in sorted(self.entries))

    def transact(
        self, compares: tuple[Compare, ...], puts: tuple[Put, ...], deletes: tuple[str, ...], now: int
    ) -> bool:
        """All or nothing; a put under a lease that is gone fails as etcd's does."""
        self.expire(now)
        for compare in compares:
            entry = self.entries.get(compare.key)
            found = 0
            if entry is not None:
                found = entry.create_revision if compare.target == "create" else entry.mod_revision
            if found != compare.revision:
                return False
        if any(put.lease and put.lease not in self.leases for put in puts):
            return False
        if puts or any(key in self.entries for key in deletes):
            self.revision += 1
        for put in puts:
            old = self.entries.get(put.key)
            created = old.create_revision if old else self.revision
            self.entries[put.key] = StoreEntry(put.key, put.value, created, self.revision, put.lease)
        for key in deletes:
            self.entries.pop(key, None)
        return True

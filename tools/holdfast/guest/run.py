"""The guest's life: write a record, flush, count it; through lost connections; until told or fenced.

    connect -> scan -> [ load writes, record, FLUSH, acknowledge ] ...
       ^                   | connection lost: back off, connect again, write the same record again
       +-------------------+
    fenced (policy refusal, confirmed ESHUTDOWN): note it outside, exit 10.   SIGTERM: exit 0.

What makes an acknowledgement trustworthy: its time is taken when the flush's reply is handled. A process
that was stopped in between (SIGSTOP, a stalled host) would note a time long after the flush, perhaps
after another owner had begun, and so accuse itself. So after a flush that took longer than
``CONFIRM_SECONDS_MIN`` the block is read back, until that is quick: a fenced run may not even read.

ESHUTDOWN is confirmed by one new connection, since a server that shuts down cleanly answers it too: only
a policy refusal, or ESHUTDOWN again on a fresh connection, is final.
"""

import os
import sys
import time
from typing import Final, NamedTuple

from holdfast.guest.acks import AcksFile, Kind, Line
from holdfast.guest.journal import (
    BLOCK_BYTES,
    RECORD_BYTES,
    RECORDS_PER_BLOCK,
    Layout,
    Record,
    decode_header,
    encode_header,
    encode_record,
    find_last,
    load_block,
    load_offset,
    load_target,
    plan_layout,
    ring_offset,
    slot_of,
)
from holdfast.guest.nbd import ConnectionLost, Fenced, NbdClient, RequestFailed

EXIT_FENCED: Final = 10
BACKOFF_SECONDS_MIN: Final = 0.05
BACKOFF_SECONDS_MAX: Final = 1.0
CONFIRM_SECONDS_MIN: Final = 0.1
CONFIRM_SECONDS_MAX: Final = 1.0  # A disk that is always slow must not keep the guest from going on.
LOAD_WRITES_PER_FLUSH_MAX: Final = 4096  # After a stall the load does not try to catch up without bound.


class Settings(NamedTuple):
    disk: str
    acks: str
    epoch: int
    node: str
    rate: float
    size_load: float
    boot_seconds: float = 0.0


def say(text: str) -> None:
    """One line for whoever reads the guest's output; only changes are told."""
    print(f"guest: {text}", file=sys.stderr, flush=True)


class Backoff:
    """Doubling waits between attempts, bounded."""

    def __init__(self) -> None:
        self._seconds = BACKOFF_SECONDS_MIN

    @property
    def is_fresh(self) -> bool:
        return self._seconds == BACKOFF_SECONDS_MIN

    def wait(self) -> None:
        time.sleep(self._seconds)
        self._seconds = min(2 * self._seconds, BACKOFF_SECONDS_MAX)


class Guest:
    """One run of the journal guest. ``step`` makes one acknowledged record."""

    def __init__(self, settings: Settings, acks: AcksFile) -> None:
        self._settings = settings
        self._acks = acks
        self._client: NbdClient | None = None
        self._layout: Layout | None = None
        self._records: list[bytes] = []  # the records of the ring block that is being filled
        self._sequence = 0  # the newest record that is known to be on the disk
        self._load_writes = 0
        self._suspected = False  # ESHUTDOWN was seen and not yet confirmed

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def step(self, load_writes: int) -> None:
        """Write ``load_writes`` load blocks and one record, flush, acknowledge. Raises Fenced.

        Lost connections and refused requests are survived: whatever was not acknowledged is written
        again, with the same bytes, so that repeating it changes nothing.
        """
        backoff = Backoff()
        record: Record | None = None
        while True:
            try:
                client, layout = self._connected()
                if record is None:
                    record = self._next_record(load_writes)
                self._write(client, layout, record)
                self._acks.append(self._line("ack", record.sequence))
            except Fenced as error:
                if error.is_final or self._suspected:
                    self._acks.append(self._line("refused", self._sequence + 1))
                    raise
                say(f"{error}; connecting again to make sure")
                self._suspected = True
                self.close()
            except (ConnectionLost, RequestFailed) as error:
                if backoff.is_fresh:
                    say(f"{error}; trying again")
                if not isinstance(error, RequestFailed):
                    self.close()
                backoff.wait()
            else:
                self._accept(record, layout)
                return

    def _accept(self, record: Record, layout: Layout) -> None:
        """The record is durable and acknowledged: it is the newest one."""
        self._suspected = False
        self._sequence, self._load_writes = record.sequence, record.load_writes
        self._records.append(encode_record(layout, record))
        if len(self._records) == RECORDS_PER_BLOCK:
            self._records = []

    def _line(self, kind: Kind, sequence: int) -> Line:
        settings = self._settings
        return Line(kind, settings.epoch, settings.node, sequence, time.monotonic_ns())

    def _next_record(self, load_writes: int) -> Record:
        settings = self._settings
        return Record(
            settings.epoch,
            self._sequence + 1,
            settings.node,
            self._load_writes + load_writes,
            time.time_ns(),
            time.monotonic_ns(),
        )

    def _write(self, client: NbdClient, layout: Layout, record: Record) -> None:
        for number in range(self._load_writes + 1, record.load_writes + 1):
            client.write(load_offset(layout, load_target(layout, number)), load_block(layout, number))
        block_index, index = slot_of(layout, record.sequence)
        block = b"".join(self._records) + encode_record(layout, record)
        if len(block) != (index + 1) * RECORD_BYTES:
            raise AssertionError("the block being filled does not fit the sequence")
        client.write(ring_offset(block_index), block.ljust(BLOCK_BYTES, b"\0"))
        begun, quick = time.monotonic(), CONFIRM_SECONDS_MIN
        client.flush()
        while time.monotonic() - begun > quick:
            begun, quick = time.monotonic(), min(2 * quick, CONFIRM_SECONDS_MAX)
            client.read(ring_offset(block_index), BLOCK_BYTES)

    def _connected(self) -> tuple[NbdClient, Layout]:
        if self._client is not None and self._layout is not None:
            return self._client, self._layout
        client = NbdClient(self._settings.disk)
        try:
            if client.is_read_only:
                raise ConnectionLost("the disk is read-only")
            if self._layout is None:
                self._layout = self._open(client)
        except BaseException:
            client.close()
            raise
        self._client = client
        return client, self._layout

    def _open(self, client: NbdClient) -> Layout:
        """Read the header (a fresh disk gets one) and find where the journal ends."""
        layout = decode_header(client.read(0, BLOCK_BYTES), client.size_bytes)
        if layout is None:
            layout = plan_layout(client.size_bytes, os.urandom(16))
            client.write(0, encode_header(layout))
            client.flush()
            say(f"new journal with {layout.slots} slots")
            return layout
        last = find_last(layout, lambda index: client.read(ring_offset(index), BLOCK_BYTES))
        if last is not None:
            self._sequence, self._load_writes = last.sequence, last.load_writes
            block_index, index = slot_of(layout, last.sequence)
            block = client.read(ring_offset(block_index), (index + 1) * RECORD_BYTES)
            if index + 1 < RECORDS_PER_BLOCK:
                self._records = [
                    block[start : start + RECORD_BYTES] for start in range(0, len(block), RECORD_BYTES)
                ]
            say(f"journal continues after record {last.sequence} of epoch {last.epoch} on {last.node}")
        return layout


def run_guest(settings: Settings, *, records_max: int | None = None) -> None:
    """Live. Returns after ``records_max`` records; raises Fenced, JournalError, OSError (the acks file)."""
    time.sleep(settings.boot_seconds)
    acks = AcksFile(settings.acks)
    guest = Guest(settings, acks)
    interval = 1.0 / settings.rate
    load_due = 0.0
    done = 0
    due = time.monotonic()
    try:
        while records_max is None or done < records_max:
            load_due = min(load_due + settings.size_load * interval, float(LOAD_WRITES_PER_FLUSH_MAX))
            load_writes = int(load_due)
            load_due -= load_writes
            guest.step(load_writes)
            done += 1
            now = time.monotonic()
            due = max(
                due + interval, now
            )  # after a stall the guest goes on at its pace, it does not catch up
            time.sleep(due - now)
    finally:
        guest.close()
        acks.close()

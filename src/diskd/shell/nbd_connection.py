"""One NBD connection over a real socket: moves bytes, asks the catalog, runs requests on the device.

The loop reads as much as the socket holds and handles every complete request in place where the device
can do so without waiting: plain ones many at a time (core.nbd_plain), others one by one (``*_nowait``); the
rest run as tasks, a bounded number at a time. Replies of a batch leave with one sendmsg. After a time budget
the loop sends what it has, which also lets other connections run.

    socket -> Session -> plain, in place -------> replies -> sendmsg
                      -> in place --------------^
                      -> task: await device.x --^

``drop`` ends a connection from outside (fencing, shutdown): nothing more is begun, what runs is finished and
answered; what has arrived by then is answered too, requests with ESHUTDOWN, options with ERR_SHUTDOWN; then
the socket is closed. All that within DROP_SECONDS_MAX.
"""

import errno
import itertools
import socket
import time
from collections import deque
from typing import Final

import structlog
import trio

from daemonkit.errors import HoldfastError, InvariantBroken
from daemonkit.units import MiB
from diskd.core import nbd_plain
from diskd.core import nbd_wire as wire
from diskd.core.nbd_haggling import Ended, ExportWanted, NamesWanted
from diskd.core.nbd_session import Request, RoomWanted, Session, State
from diskd.core.nbd_wire import Command, NbdError, Rep
from diskd.core.ports import Device, Export, ExportCatalog, InPlace
from diskd.errors import NoSuchExport
from diskd.shell.nbd_linger import Company, Lingering
from diskd.shell.nbd_memory import OWN_BYTES, Pool, Share
from diskd.shell.nbd_requests import ReadsInto, ServesInPlace, carry_out, cost_of, facts_of

# A client that haggles longer is not going to start; opening an export may have to wait for a drain.
HANDSHAKE_SECONDS_MAX: Final = 30.0
# QEMU keeps 16 requests in flight on a connection, libnbd's tools 64.
IN_FLIGHT_MAX: Final = 128
# Twice the largest request, so that one can be received while another is being served.
IN_FLIGHT_BYTES_MAX: Final = 2 * wire.REQUEST_BYTES_MAX
# Replies are sent when this much has gathered, or this much time has gone by: fairness among connections.
BATCH_BYTES_MAX: Final = 1 * MiB
BATCH_SECONDS_MAX: Final = 0.002
# Long enough for replies to a live peer, short enough that a dead one does not hold up fencing.
DROP_SECONDS_MAX: Final = 2.0
# How often a connection that is sent home is asked for what it still has to say: two full buffers' worth.
_LAST_LOOKS: Final = 4
# From this size on a read's buffer is used again; the spare ones of a connection, at most.
_REUSED_BYTES_MIN: Final = 64 << 10
_SPARE_MAX: Final = 4
# No layer does more than this without a thread: not worth a buffer.
_IN_PLACE_BYTES_MAX: Final = 1 << 20
# sendmsg refuses more buffers than this in one call (IOV_MAX).
_BUFFERS_MAX: Final = 1024

_READ: Final = Command.READ
_WRITE: Final = Command.WRITE

log = structlog.get_logger("nbd")


class Connection:
    """``run`` serves it to its end. ``reason`` says afterwards why it ended."""

    def __init__(
        self, sock: socket.socket, peer: str, catalog: ExportCatalog, company: Company, pool: Pool
    ) -> None:
        """``sock`` is a plain one that does not block: trio's would pass the scheduler on every call."""
        self._socket = sock
        self._peer = peer
        self._catalog = catalog
        self._session = Session()
        self._export: Export | None = None
        self._all = trio.CancelScope()
        self._reading = trio.CancelScope()
        self._send_lock = trio.Lock()
        self._unsent: deque[memoryview] = deque()
        self._in_place: InPlace | None = None
        self._reads_into: ReadsInto | None = None
        self._replies = nbd_plain.Replies()
        self._lingering = Lingering(company)
        self._lent: list[bytearray] = []
        self._spare: list[bytearray] = []
        self._batch_bytes = 0
        self._breathe_at = 0.0
        self._in_flight = 0
        self._in_flight_bytes = 0
        self._pool = pool
        self._payload_share: Share | None = None
        self._room = trio.Event()
        self._peer_gone = False
        self.name = ""
        self._requests = 0
        self.opened_at = trio.current_time()
        self.reason = "the client closed the connection"

    @property
    def requests(self) -> int:
        """How many it has made since it opened its export."""
        return self._requests + self._replies.requests

    def drop(self, reason: str) -> None:
        """End this connection from outside; see the module."""
        if not self._reading.cancel_called:
            self.reason = reason
            self._reading.cancel(reason=reason)
            self._all.deadline = min(self._all.deadline, trio.current_time() + DROP_SECONDS_MAX)

    async def run(self) -> None:
        """Never raises for anything that the peer or the device does; InvariantBroken comes out."""
        try:
            with self._all:
                async with trio.open_nursery() as tasks:
                    with self._reading:
                        await self._serve(tasks)
                    if self._reading.cancel_called and not self._peer_gone:
                        await self._send_home()
                await self._flush()
        finally:
            self._pool.give(self._payload_share)
            if self._export is not None:
                self._export.close()

    async def _serve(self, tasks: trio.Nursery) -> None:
        try:
            with trio.fail_after(HANDSHAKE_SECONDS_MAX):
                await self._haggle()
            if self._export is not None:
                await self._transmit(tasks, self._export)
        except trio.TooSlowError:
            self.reason = f"no export was chosen within {HANDSHAKE_SECONDS_MAX:g} s"
        except NbdError as error:
            self.reason = str(error)
        except OSError as error:
            self.reason = error.strerror or str(error)

    async def _send_home(self) -> None:
        """Refuse what arrives until everything that runs has been answered, and what has arrived by then."""
        self._session.shut_down(self.reason)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._refuse_arriving)
                while self._in_flight:
                    await self._room.wait()
                nursery.cancel_scope.cancel(reason="everything has been answered")
            for _ in range(_LAST_LOOKS):
                if not self._receive_nowait():
                    break
                self._refuse_received()
        except* (NbdError, OSError):
            # Nonsense, or gone: it is being closed anyway.
            pass

    async def _refuse_arriving(self) -> None:
        while self._session.state is not State.ENDED:
            self._refuse_received()
            await self._flush()
            await self._receive()
            await trio.lowlevel.checkpoint()

    def _refuse_received(self) -> None:
        session = self._session
        while (event := session.next_event()) is not None:
            if isinstance(event, Request):
                session.reply_error(event, errno.ESHUTDOWN, self.reason)
            elif isinstance(event, RoomWanted):
                session.refuse_room(errno.ESHUTDOWN, self.reason)

    # --- bytes

    def _receive_nowait(self) -> bool:
        """Take what the socket holds: False if that is nothing. At the end of the stream the session ends."""
        try:
            count = self._socket.recv_into(self._session.receive_buffer())
        except BlockingIOError:
            return False
        if count:
            self._session.received(count)
        else:
            self._session.finish()
        return True

    async def _receive(self) -> None:
        """As _receive_nowait, once there is something. Does not yield where it is there already."""
        while not self._receive_nowait():
            await trio.lowlevel.wait_readable(self._socket)

    def _send_nowait(self) -> bool:
        """Send what there is with one call, without a wait: False if something is left for ``_flush``."""
        if self._unsent or self._send_lock.locked():
            return False
        output = self._session.take_output()
        self._batch_bytes = 0
        if not output:
            return True
        if len(output) <= _BUFFERS_MAX:
            try:
                sent = self._socket.sendmsg(output)
            except OSError:
                # It would block, or the peer is gone, which _flush will find out too.
                sent = 0
            if sent == sum(map(len, output)):
                self._take_back()
                return True
        else:
            sent = 0
        self._unsent.extend(map(memoryview, output))
        self._forget_sent(sent)
        return False

    async def _flush(self) -> None:
        """Send everything that is to be sent. A peer that has gone costs nothing but its replies."""
        if self._send_nowait():
            return
        async with self._send_lock:
            self._batch_bytes = 0
            while not self._peer_gone:
                if not self._unsent:
                    output = self._session.take_output()
                    if not output:
                        self._take_back()
                        return
                    self._unsent.extend(map(memoryview, output))
                try:
                    await self._send_some()
                except OSError as error:
                    self._peer_gone = True
                    self.reason = error.strerror or str(error)
                    self._reading.cancel(reason="the peer has gone")
            self._session.take_output()
            self._unsent.clear()
            self._take_back()

    async def _send_some(self) -> None:
        """One sendmsg, or a wait until one is possible. What it did not take stays queued."""
        try:
            sent = self._socket.sendmsg(list(itertools.islice(self._unsent, _BUFFERS_MAX)))
        except BlockingIOError:
            await trio.lowlevel.wait_writable(self._socket)
            return
        self._forget_sent(sent)

    def _forget_sent(self, sent: int) -> None:
        while self._unsent and sent >= len(self._unsent[0]):
            sent -= len(self._unsent.popleft())
        if sent:
            self._unsent[0] = self._unsent[0][sent:]

    # Large reads in place go through buffers that are used again: new memory for each of them, filled with
    # zeroes first, takes longer than the read itself.

    def _lend(self, length: int) -> bytearray:
        if self._spare and len(self._spare[-1]) != length:
            self._spare.clear()
        buffer = self._spare.pop() if self._spare else bytearray(length)
        self._lent.append(buffer)
        return buffer

    def _take_back(self) -> None:
        """Everything has been sent: nobody looks at these buffers any more."""
        self._replies.sent()
        if self._lent:
            self._spare += self._lent
            self._lent.clear()
            del self._spare[_SPARE_MAX:]

    # --- haggling

    async def _haggle(self) -> None:
        session = self._session
        while session.state in (State.FLAGS, State.OPTIONS):
            event = session.next_event()
            if isinstance(event, NamesWanted):
                session.names_found(self._catalog.names())
            elif isinstance(event, ExportWanted):
                await self._answer_export(event)
            elif isinstance(event, Ended):
                self.reason = event.reason
            await self._flush()
            if event is None:
                await self._receive()
            else:
                # One answer may take a while: a flood of options must not take every turn.
                await trio.lowlevel.checkpoint()

    async def _answer_export(self, wanted: ExportWanted) -> None:
        try:
            if wanted.is_open:
                export = await self._catalog.open(wanted.name, peer=self._peer, drop=self.drop)
            else:
                export = await self._catalog.info(wanted.name)
        except NoSuchExport as error:
            self._refuse(wanted, Rep.ERR_UNKNOWN, str(error))
        except (HoldfastError, OSError) as error:
            if isinstance(error, InvariantBroken):
                raise
            message = error.strerror if isinstance(error, OSError) else str(error)
            self._refuse(wanted, Rep.ERR_POLICY, message or str(error))
        else:
            if self._session.export_found(facts_of(export)):
                self._export, self.name = export, wanted.name
                self._replies.counts = export.counts or self._replies.counts
                self.opened_at = trio.current_time()
                log.info("nbd.opened", peer=self._peer, export=wanted.name)
            else:
                export.close()

    def _refuse(self, wanted: ExportWanted, reply: Rep, message: str) -> None:
        self._session.export_refused(reply, message)
        if wanted.is_open:
            self.reason = message
            # The catalog says it, seldom: who is refused may knock for ever.
            log.debug("nbd.refused", peer=self._peer, export=wanted.name[:80], reason=message)

    # --- transmission

    async def _transmit(self, tasks: trio.Nursery, export: Export) -> None:
        session, device = self._session, export.device
        self._reads_into = device if isinstance(device, ReadsInto) else None
        self._in_place = device if isinstance(device, ServesInPlace) else None
        while True:
            is_more = self._serve_plain()
            event = None if is_more else session.next_event()
            if isinstance(event, Request):
                self._requests += 1
                share, self._payload_share = self._payload_share, None
                if self._serve_in_place(event, device):
                    self._pool.give(share)
                else:
                    await self._begin(event, share, tasks, export)
                if self._batch_bytes >= BATCH_BYTES_MAX:
                    await self._flush()
            elif isinstance(event, RoomWanted):
                await self._make_room(event)
            elif isinstance(event, Ended):
                self.reason = event.reason
                return
            elif session.state is State.ENDED:
                return
            else:
                if session.has_output and not self._send_nowait():
                    await self._flush()
                if not is_more and not self._receive_nowait() and not self._linger():
                    await trio.lowlevel.wait_readable(self._socket)
                    self._lingering.woken()
                    self._breathe_at = time.perf_counter() + BATCH_SECONDS_MAX
            if time.perf_counter() >= self._breathe_at:
                await self._breathe()

    def _serve_plain(self) -> bool:
        """What can be served many at a time. True: there is more, once the replies have been sent."""
        device = self._in_place
        try:
            if device is None or not device.begin_in_place():
                return False
        except OSError:
            # Each request is told one by one.
            return False
        return nbd_plain.serve(self._session, device, self._replies)

    def _linger(self) -> bool:
        """Look again for a moment. True where something came."""
        lingering = self._lingering
        if self._in_flight or not lingering.begin():
            # What runs needs the scheduler in order to end.
            return False
        while not self._receive_nowait():
            if not lingering.go_on():
                return False
        lingering.found()
        return True

    async def _breathe(self) -> None:
        """The time budget is used up: send what there is, and let others run."""
        await self._flush()
        await trio.lowlevel.checkpoint()
        self._breathe_at = time.perf_counter() + BATCH_SECONDS_MAX

    def _serve_in_place(self, request: Request, device: Device) -> bool:
        """True when the request has been answered."""
        session = self._session
        try:
            if request.command is _READ:
                data = self._read_in_place(request.offset, request.length, device)
                if data is None:
                    return False
                self._batch_bytes += request.length
                session.reply_data(request, data)
                return True
            if request.command is _WRITE and request.length and not request.fua:
                if not device.write_nowait(request.offset, request.data):
                    return False
                self._batch_bytes += request.length
                session.reply_written(request)
                return True
            if request.command is not Command.CACHE and (request.length or request.command is Command.FLUSH):
                # CACHE is a hint: what it asks for, the kernel's page cache does by itself.
                return False
            session.reply_done(request)
            return True
        except OSError as error:
            session.reply_error(request, error.errno, error.strerror or str(error))
            return True

    def _read_in_place(self, offset: int, length: int, device: Device) -> bytes | bytearray | None:
        if length < _REUSED_BYTES_MIN or self._reads_into is None:
            return device.read_nowait(offset, length) if length else b""
        if length > _IN_PLACE_BYTES_MAX:
            return None
        buffer = self._lend(length)
        if self._reads_into.read_into_nowait(offset, buffer):
            return buffer
        self._spare.append(self._lent.pop())
        return None

    async def _make_room(self, wanted: RoomWanted) -> None:
        """For the payload of a large write, which is received only then."""
        try:
            self._payload_share = await self._take_share(wanted.length)
        except trio.Cancelled:
            self._session.refuse_room(errno.ESHUTDOWN, self.reason)
            raise
        self._payload_share.peer_since = trio.current_time()
        self._session.grant_room()

    async def _take_share(self, size_bytes: int) -> Share:
        share = self._pool.take_nowait(size_bytes, self.drop)
        if share is None:
            await self._flush()
            share = await self._pool.take(size_bytes, self.drop)
        return share

    async def _find_room(self, cost: int, share: Share | None) -> Share | None:
        """Wait until a request may begin; what it has of the pool then. A small one never queues there: where
        nothing is free, it waits for what the connection has of its own."""
        while True:
            room, used = self._room, self._in_flight_bytes + cost
            if not self._in_flight or (self._in_flight < IN_FLIGHT_MAX and used <= IN_FLIGHT_BYTES_MAX):
                if share is not None or used <= OWN_BYTES:
                    return share
                if cost > OWN_BYTES:
                    return await self._take_share(cost)
                if (share := self._pool.take_nowait(cost, self.drop)) is not None:
                    return share
            await self._flush()
            await room.wait()

    async def _begin(
        self, request: Request, share: Share | None, tasks: trio.Nursery, export: Export
    ) -> None:
        """Start a task for the request, once there is room for it. ``share``: what its payload has."""
        cost = cost_of(request, len(self._session.contexts))
        if share is not None:
            share.peer_since = None
        try:
            share = await self._find_room(cost, share)
        except trio.Cancelled:
            self._pool.give(share)
            self._session.reply_error(request, errno.ESHUTDOWN, self.reason)
            raise
        self._in_flight += 1
        self._in_flight_bytes += cost
        tasks.start_soon(self._serve_waiting, request, cost, share, export)

    async def _serve_waiting(self, request: Request, cost: int, share: Share | None, export: Export) -> None:
        try:
            await self._execute(request, export)
            if share is not None:
                share.peer_since = trio.current_time()
            await self._flush()
        finally:
            self._pool.give(share)
            self._in_flight -= 1
            self._in_flight_bytes -= cost
            self._room.set()
            self._room = trio.Event()

    async def _execute(self, request: Request, export: Export) -> None:
        session = self._session
        try:
            await carry_out(request, session, export)
        except OSError as error:
            session.reply_error(request, error.errno, error.strerror or str(error))
        except InvariantBroken:
            raise
        except MemoryError:
            session.reply_error(request, errno.ENOMEM, "out of memory")
        except HoldfastError as error:
            session.reply_error(request, errno.EIO, str(error))
        except Exception:
            log.exception("nbd.request_failed", export=self.name, command=request.command.name)
            session.reply_error(request, errno.EIO, "internal error, see the log of diskd")

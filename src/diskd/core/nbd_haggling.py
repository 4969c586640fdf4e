"""The option haggling of one NBD connection: what each option means, and what is answered to it.

``handle`` takes one whole option. Most are answered at once; those that need the export catalog hand out
a question (``ExportWanted``, ``NamesWanted``), and wait for its answer. An option that cannot be granted
is answered with an error and costs only itself.

    EXPORT_NAME, GO         open the export: leads to transmission
    INFO                    look at the export
    LIST                    the names that would be accepted now
    STRUCTURED_REPLY        replies in chunks; required by the two below
    LIST_META_CONTEXT       which kinds of block status an export offers
    SET_META_CONTEXT        choose some; they hold for the export of that name only, and until chosen anew
    ABORT                   goodbye
    anything else           NBD_REP_ERR_UNSUP
"""

from collections.abc import Sequence
from typing import TypeAlias

import attrs

from diskd.core import nbd_wire as wire
from diskd.core.nbd_wire import Info, NbdError, Option, OptionError, Rep, TransmissionFlag


@attrs.frozen
class ExportFacts:
    """What the client is told of an export. ``points``: those offered as dirty-bitmap contexts."""

    size_bytes: int
    is_read_only: bool
    multi_conn: bool
    preferred_block_bytes: int
    points: tuple[str, ...] = ()
    fast_zero: bool = False


@attrs.frozen
class ExportWanted:
    """Answer with export_found or export_refused. ``is_open``: the client enters transmission with it."""

    name: str
    is_open: bool


@attrs.frozen
class NamesWanted:
    """Answer with names_found."""


@attrs.frozen
class Ended:
    """The client said goodbye (DISC, ABORT) or was refused; send what is left, then close."""

    reason: str


Question: TypeAlias = ExportWanted | NamesWanted


@attrs.frozen
class _Asked:
    """The option that waits for the catalog."""

    option: int
    name: str = ""
    infos: tuple[int, ...] = ()
    queries: tuple[str, ...] = ()


class Haggling:
    """Replies are appended to ``out``. After an NbdError, or an Ended, it is not to be used any more."""

    def __init__(self, out: list[bytes | bytearray | memoryview]) -> None:
        self._out = out
        self._count = 0
        self._asked: _Asked | None = None
        self._contexts_of = ""
        self._leaving: str | None = None
        self.no_zeroes = False
        self.structured = False
        self.contexts: tuple[tuple[int, str], ...] = ()

    @property
    def is_waiting(self) -> bool:
        return self._asked is not None

    def count_option(self) -> None:
        """Raises NbdError for a client that will never come to an end."""
        self._count += 1
        if self._count > wire.OPTIONS_MAX:
            raise NbdError(f"more than {wire.OPTIONS_MAX} options")

    def shut_down(self, message: str) -> None:
        """The server is going: refuse the option that waits, and all that follow but ABORT."""
        self._leaving = message
        if self._asked is not None and self._asked.option != Option.EXPORT_NAME:
            self._reply(self._asked.option, Rep.ERR_SHUTDOWN, wire.error_text(message))
        self._asked = None

    def refuse_oversized(self, option: int) -> None:
        """Answer an option whose data is skipped because it is too long."""
        message = f"an option may have at most {wire.OPTION_BYTES_MAX} bytes"
        self._reply(option, Rep.ERR_TOO_BIG, message.encode())

    def handle(self, option: int, data: bytes) -> Question | Ended | None:
        """One option. Raises NbdError where only closing the connection is left."""
        try:
            return self._handle(option, data)
        except OptionError as error:
            if option == Option.EXPORT_NAME:
                # This option has no error reply: "If the server is unwilling to allow the export, it
                # MUST terminate the session."
                raise NbdError(str(error)) from error
            self._reply(option, error.reply, wire.error_text(str(error)))
            return None

    def _handle(self, option: int, data: bytes) -> Question | Ended | None:
        if self._leaving is not None and option != Option.ABORT:
            raise OptionError(Rep.ERR_SHUTDOWN, self._leaving)
        match option:
            case Option.EXPORT_NAME:
                self._asked = _Asked(option, wire.decode_name(data))
                return ExportWanted(self._asked.name, is_open=True)
            case Option.GO | Option.INFO:
                request = wire.decode_export_request(data)
                self._asked = _Asked(option, request.name, infos=request.infos)
                return ExportWanted(request.name, is_open=option == Option.GO)
            case Option.LIST_META_CONTEXT | Option.SET_META_CONTEXT:
                return self._ask_contexts(option, data)
            case Option.ABORT:
                # The client may close without reading this; data that it sends along means nothing.
                self._reply(option, Rep.ACK)
                return Ended("the client ended the negotiation")
            case Option.LIST | Option.STRUCTURED_REPLY if data:
                raise OptionError(Rep.ERR_INVALID, "this option takes no data")
            case Option.LIST:
                self._asked = _Asked(option)
                return NamesWanted()
            case Option.STRUCTURED_REPLY:
                self.structured = True
                self._reply(option, Rep.ACK)
                return None
        raise OptionError(Rep.ERR_UNSUP, f"option {option} is not supported")

    def _ask_contexts(self, option: int, data: bytes) -> Question:
        if option == Option.SET_META_CONTEXT:
            # Whatever comes of it, the earlier choice no longer holds.
            self.contexts, self._contexts_of = (), ""
        if not self.structured:
            raise OptionError(Rep.ERR_INVALID, "negotiate structured replies first")
        request = wire.decode_context_request(data)
        self._asked = _Asked(option, request.name, queries=request.queries)
        return ExportWanted(request.name, is_open=False)

    def _reply(self, option: int, reply: Rep, data: bytes = b"") -> None:
        self._out.append(wire.option_reply(option, reply, data))

    def _answered(self) -> _Asked:
        asked, self._asked = self._asked, None
        assert asked is not None
        return asked

    def names_found(self, names: Sequence[str]) -> None:
        """The answer to NamesWanted."""
        option = self._answered().option
        for name in names:
            self._reply(option, Rep.SERVER, wire.server_entry(name))
        self._reply(option, Rep.ACK)

    def export_refused(self, reply: Rep, message: str) -> bool:
        """The catalog says no. False: there is no way to say so, the connection must end."""
        option = self._answered().option
        if option == Option.EXPORT_NAME:
            return False
        self._reply(option, reply, wire.error_text(message))
        return True

    def export_found(self, facts: ExportFacts) -> bool:
        """The catalog's answer to ExportWanted. True: the client is in transmission with it now."""
        asked = self._answered()
        match asked.option:
            case Option.LIST_META_CONTEXT:
                for name in wire.matching_contexts(asked.queries, facts.points, listing=True):
                    # An id means something only where the context was chosen; a listing has none to give.
                    self._reply(asked.option, Rep.META_CONTEXT, wire.meta_context(0, name))
                self._reply(asked.option, Rep.ACK)
                return False
            case Option.SET_META_CONTEXT:
                chosen = wire.matching_contexts(asked.queries, facts.points, listing=False)
                if len(chosen) > wire.CONTEXTS_MAX:
                    message = f"choose at most {wire.CONTEXTS_MAX} metadata contexts at a time"
                    self._reply(asked.option, Rep.ERR_TOO_BIG, message.encode())
                    return False
                self.contexts, self._contexts_of = tuple(enumerate(chosen, start=1)), asked.name
                for context_id, name in self.contexts:
                    self._reply(asked.option, Rep.META_CONTEXT, wire.meta_context(context_id, name))
                self._reply(asked.option, Rep.ACK)
                return False
            case Option.INFO:
                self._answer_infos(asked, facts)
                return False
        return self._enter(asked, facts)

    def _answer_infos(self, asked: _Asked, facts: ExportFacts) -> None:
        replies = [wire.info_export(facts.size_bytes, self._flags(facts))]
        if Info.NAME in asked.infos:
            replies.append(wire.info_name(asked.name))
        if Info.BLOCK_SIZE in asked.infos:
            replies.append(wire.info_block_size(facts.preferred_block_bytes))
        for reply in replies:
            self._reply(asked.option, Rep.INFO, reply)
        self._reply(asked.option, Rep.ACK)

    def _enter(self, asked: _Asked, facts: ExportFacts) -> bool:
        if self._contexts_of != asked.name:
            self.contexts = ()
        if asked.option == Option.EXPORT_NAME:
            padding = b"" if self.no_zeroes else bytes(124)
            head = wire.EXPORT_SIZE_FLAGS.pack(facts.size_bytes, self._flags(facts))
            self._out.append(head + padding)
            return True
        offered = {wire.BASE_ALLOCATION, *(wire.DIRTY_BITMAP + point for point in facts.points)}
        if not offered.issuperset(name for _, name in self.contexts):
            # A point was deleted since its context was chosen: refuse rather than answer for it (T4).
            message = "a chosen metadata context is gone: choose again"
            self._reply(asked.option, Rep.ERR_UNKNOWN, message.encode())
            return False
        self._answer_infos(asked, facts)
        return True

    def _flags(self, facts: ExportFacts) -> TransmissionFlag:
        flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_CACHE
        if facts.is_read_only:
            flags |= TransmissionFlag.READ_ONLY
        else:
            flags |= TransmissionFlag.SEND_FUA | TransmissionFlag.SEND_TRIM
            flags |= TransmissionFlag.SEND_WRITE_ZEROES
            if facts.fast_zero:
                flags |= TransmissionFlag.SEND_FAST_ZERO
        if facts.multi_conn:
            flags |= TransmissionFlag.CAN_MULTI_CONN
        if self.structured:
            flags |= TransmissionFlag.SEND_DF
        return flags

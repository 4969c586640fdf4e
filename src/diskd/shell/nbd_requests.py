"""What one request asks of an export, and what it costs; what a device can do, and a client is told."""

from typing import Final, Protocol, runtime_checkable

from diskd.core import nbd_wire as wire
from diskd.core.nbd_haggling import ExportFacts
from diskd.core.nbd_session import Request, Session
from diskd.core.nbd_wire import Command, Descriptor
from diskd.core.ports import Allocation, Device, Export, InPlace

_WITH_PAYLOAD: Final = (Command.READ, Command.WRITE)
# As objects of this process, until they are bytes on the wire.
_DESCRIPTOR_BYTES: Final = 64
_STATUS_BYTES: Final = wire.DESCRIPTORS_MAX * _DESCRIPTOR_BYTES
# The first look for one extent, and by how much each further one is larger: six cover a request of 4 GiB.
_FIRST_STEP_BYTES: Final = 256 << 10
_STEP_GROWTH: Final = 8


@runtime_checkable
class ServesInPlace(InPlace, Protocol):
    """A device that the plain requests can be served from."""


@runtime_checkable
class ReadsInto(Protocol):
    """A device that can also read into memory of ours: False where ``read_nowait`` answers None."""

    def read_into_nowait(self, offset: int, buffer: bytearray) -> bool: ...


def facts_of(export: Export) -> ExportFacts:
    """What a client is told of it."""
    return ExportFacts(
        size_bytes=export.device.size_bytes,
        is_read_only=export.device.is_read_only,
        multi_conn=export.multi_conn,
        preferred_block_bytes=export.preferred_block_bytes,
        points=tuple(export.contexts),
        fast_zero=export.fast_zero,
    )


def cost_of(request: Request, contexts: int) -> int:
    """The memory (bytes) that a request takes until its reply has been sent, at most."""
    if request.command in _WITH_PAYLOAD:
        return request.length
    if request.command is Command.BLOCK_STATUS and not request.wants_one:
        return contexts * _STATUS_BYTES
    return 0


async def carry_out(request: Request, session: Session, export: Export) -> None:
    """Do it, and lay the reply down. Raises OSError."""
    device, offset, length, fua = export.device, request.offset, request.length, request.fua
    match request.command:
        case Command.READ:
            session.reply_data(request, await device.read(offset, length))
            return
        case Command.BLOCK_STATUS:
            session.reply_status(request, await _block_status(request, session.contexts, export))
            return
        case Command.WRITE:
            await device.write(offset, request.data, fua=fua)
        case Command.WRITE_ZEROES:
            await device.write_zeroes(offset, length, may_trim=request.may_trim, fua=fua)
        case Command.TRIM:
            await device.trim(offset, length, fua=fua)
        case Command.FLUSH:
            await device.flush()
    session.reply_done(request)


async def _block_status(
    request: Request, contexts: tuple[tuple[int, str], ...], export: Export
) -> list[tuple[int, list[Descriptor]]]:
    """(id, descriptors) of each chosen context. Raises OSError."""
    count_max = 1 if request.wants_one else wire.DESCRIPTORS_MAX
    answers = []
    for context_id, name in contexts:
        if name == wire.BASE_ALLOCATION:
            if request.wants_one:
                runs = await _first_run(export.device, request.offset, request.length)
            else:
                runs = await export.device.allocation(request.offset, request.length)
            found = wire.allocation_descriptors(runs, count_max=count_max)
        else:
            report = export.contexts[name.removeprefix(wire.DIRTY_BITMAP)]
            extents = (await report()).extents
            found = wire.dirty_descriptors(extents, request.offset, request.length, count_max=count_max)
        answers.append((context_id, found))
    return answers


async def _first_run(device: Device, offset: int, length: int) -> list[Allocation]:
    """The allocation up to the first change of kind, or to the end of the range.

    Looked for in growing steps: qemu asks for one run at a time and for all that is left of the disk, and on
    a fragmented one thousands of runs lie within that.
    """
    found: list[Allocation] = []
    end, step = offset + length, _FIRST_STEP_BYTES
    while offset < end:
        found += await device.allocation(offset, min(step, end - offset))
        if any(run.kind != found[0].kind for run in found):
            break
        offset = found[-1].offset + found[-1].length
        step *= _STEP_GROWTH
    return found

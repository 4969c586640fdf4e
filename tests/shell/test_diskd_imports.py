"""The parts of an import that need no qemu-img: sparse files, and room that stays for the guests."""

import os

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from diskd.errors import Refused
from diskd.shell.imports import SparseFile, room_kept

BLOCK = 4096
PIECES = st.lists(
    st.tuples(st.integers(1, 3 * BLOCK), st.sampled_from([b"\0", b"\0", b"x", b"\0" * 300 + b"y"])),
    max_size=8,
)


@given(pieces=PIECES)
def test_whatever_the_pieces_the_file_holds_them(pieces, tmp_path_factory):
    path = tmp_path_factory.mktemp("sparse") / "disk.raw"
    file, whole = SparseFile(path), b""
    for length, pattern in pieces:
        data = (pattern * length)[:length]
        file.write(len(whole), data)
        whole += data
    file.finish(len(whole))
    file.close()
    assert path.read_bytes() == whole


def test_blocks_of_zeroes_become_holes(tmp_path):
    path = tmp_path / "disk.raw"
    file = SparseFile(path)
    file.write(100, b"a" * BLOCK + bytes(64 * BLOCK) + b"b")
    file.finish(100 * BLOCK)
    file.close()
    assert path.stat().st_blocks * 512 <= 4 * BLOCK
    with pytest.raises(FileExistsError):
        SparseFile(path)


async def test_an_import_stops_before_it_takes_the_last_room(tmp_path):
    looks = iter([None, Refused("only 7 bytes are free")])
    with pytest.raises(Refused, match="7 bytes"), trio.fail_after(20):
        async with room_kept(tmp_path, lambda _: next(looks)):
            await trio.sleep_forever()


async def test_what_fails_within_comes_out_as_it_is(tmp_path):
    with pytest.raises(OSError, match="broken"):
        async with room_kept(tmp_path, lambda _: None):
            raise OSError(os.EX_IOERR, "broken")
    async with room_kept(tmp_path, lambda _: None):
        pass

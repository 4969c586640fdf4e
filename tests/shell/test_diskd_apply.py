"""diskctl apply: what does not fit a raw file is refused before a byte of it is changed."""

import os

import attrs
import pytest
import trio
from diskd_frozen import MemoryLibrary
from diskd_target import stream_of

from daemonkit.diskd_api import BackupDisk
from daemonkit.errors import OperatorError
from diskd.core import applied
from diskd.errors import Refused
from diskd.shell.restore import apply_file, check_stream

MiB = 1 << 20
MARK = "user.holdfast.point"


@pytest.fixture
def chain(tmp_path):
    """Files of a full and of three differentials on top of each other, with the disk as of each."""
    library = MemoryLibrary(system=2 * MiB)
    disk, made, base = library.images["system"], [], None
    for number in range(4):
        disk.write(number * 65536, bytes([number + 1]) * 100000)
        disk.trim(4096, 4096)

        async def take(since):
            frozen = await library.begin_checkpoint("web", [BackupDisk("system", "system")], "")
            await frozen.end("keep")
            return frozen.point, stream_of(frozen, since)[0]

        base, stream = trio.run(take, base)
        path = tmp_path / f"export{number}"
        path.write_bytes(stream)
        made.append((path, bytes(disk.data), base))
    return made


@pytest.fixture
def raw(tmp_path, chain):
    path = tmp_path / "disk.raw"
    apply_file(chain[0][0], path)
    try:
        os.getxattr(path, MARK)
    except OSError:
        pytest.skip("the file system has no extended attributes")
    return path


def test_a_chain_in_order(chain, raw):
    for path, content, point in chain[1:]:
        apply_file(path, raw)
        assert raw.read_bytes() == content
        assert os.getxattr(raw, MARK).decode() == point


def test_the_wrong_base_is_refused_and_nothing_changes(chain, raw):
    apply_file(chain[1][0], raw)
    before = raw.read_bytes()
    with pytest.raises(Refused, match=r"as of .* already"):
        apply_file(chain[1][0], raw)
    with pytest.raises(Refused, match=f"as of {chain[1][2]}, but the export builds on {chain[2][2]}"):
        apply_file(chain[3][0], raw)
    assert raw.read_bytes() == before


def test_a_file_of_unknown_origin_needs_the_operators_word(chain, tmp_path, raw):
    stranger = tmp_path / "stranger.raw"
    stranger.write_bytes(raw.read_bytes())
    with pytest.raises(Refused, match="--trust-base"):
        apply_file(chain[1][0], stranger)
    assert stranger.read_bytes() == chain[0][1]
    apply_file(chain[1][0], stranger, trust_base=True)
    assert stranger.read_bytes() == chain[1][1]
    apply_file(chain[2][0], stranger)


def test_one_that_was_killed_half_way_is_applied_again_and_nothing_else_is(chain, raw):
    header = check_stream(chain[1][0])
    os.setxattr(raw, MARK, applied.under_way(header).encode())
    with raw.open("r+b") as file:
        file.seek(65536)
        file.write(b"half")
    with pytest.raises(Refused, match=f"applying {chain[1][2]} to this file was not completed"):
        apply_file(chain[2][0], raw)
    apply_file(chain[1][0], raw)
    assert raw.read_bytes() == chain[1][1]


@pytest.mark.parametrize("end", [0, 1, 100, 5000, -1, -56, -57])
def test_a_truncated_export_changes_nothing(chain, raw, tmp_path, end):
    short = tmp_path / "short"
    short.write_bytes(chain[1][0].read_bytes()[:end])
    with pytest.raises(OperatorError, match="nothing was applied"):
        apply_file(short, raw)
    assert raw.read_bytes() == chain[0][1]
    assert os.getxattr(raw, MARK).decode() == chain[0][2]


def test_what_a_mark_allows():
    base, point, other = ("rp-" + digit * 16 for digit in "123")
    header = attrs.make_class("Header", ["base", "point"])(base, point)
    applied.check_base(base, header, trust=False)
    applied.check_base(f"{base}>{point}", header, trust=False)
    for mark in (None, point, other, f"{base}>{other}", f"{other}>{point}", "nonsense"):
        with pytest.raises(Refused):
            applied.check_base(mark, header, trust=False)
        applied.check_base(mark, header, trust=True)

"""A restore at its client, and diskctl apply: verified, sparse, and never half."""

import pytest
import trio
from diskd_frozen import MemoryLibrary
from diskd_target import RaisesLeaf, start_target, stream_of
from diskd_target_peers import MiB, backup, exported, two_disks

from daemonkit.diskd_api import BackupDisk
from daemonkit.errors import OperatorError
from daemonkit.ports import Address
from daemonkit.rpc import Registry, serve
from diskd.core import target_calls as calls
from diskd.core.stream import (
    DiskHeader,
    ExportHeader,
    StreamAborted,
    StreamEncoder,
)
from diskd.errors import Refused
from diskd.shell.restore import RestoreFiles, apply_file, restore_point


@pytest.fixture
def library():
    return two_disks()


async def restore(address, point, directory, disk_format="raw"):
    with trio.fail_after(30):
        return await restore_point(
            address,
            calls.PointName("web", point),
            directory,
            disk_format=disk_format,
            key=None,
            on_progress=lambda _: None,
        )


async def test_restore_writes_config_and_disks_sparse(tmp_path, library, nursery):
    (tmp_path / "root").mkdir()
    address, _ = await start_target(nursery, tmp_path / "root")
    await backup(library, address)
    library.images["system"].trim(4 * MiB, 8 * MiB)
    library.images["system"].write(2 * MiB, b"v2" * 10000)
    second = await backup(library, address)
    restored = await restore(address, second.point, tmp_path / "out")
    assert (tmp_path / "out" / "system.raw").read_bytes() == library.images["system"].data
    assert (tmp_path / "out" / "journal.raw").read_bytes() == library.images["journal"].data
    assert (tmp_path / "out" / "vm.toml").read_text() == 'name = "web"\n'
    assert [path.name for path in restored.files] == ["system.raw", "journal.raw"]
    assert (tmp_path / "out" / "system.raw").stat().st_blocks * 512 < 17 * MiB
    with RaisesLeaf(Refused, "exists already"):
        await restore(address, second.point, tmp_path / "out")
    with RaisesLeaf(StreamAborted, "no point"):
        await restore(address, "rp-" + "f" * 16, tmp_path / "other")
    assert not (tmp_path / "other").exists()


async def test_a_restore_takes_over_what_an_interrupted_one_left_but_nothing_that_is_being_written(tmp_path):
    disk = DiskHeader("system", "system", MiB, 4096, 65536, 0, True, 0)
    header = ExportHeader("web", "rp-" + "1" * 16, None, "full", "crash", "", [disk])
    (tmp_path / ".system.raw.part").write_bytes(b"half" * MiB)
    first = RestoreFiles(tmp_path, header, "raw")
    with pytest.raises(Refused, match="just being written"):
        RestoreFiles(tmp_path, header, "raw")
    first.publish(StreamEncoder(header).summary())
    first.discard()
    assert (tmp_path / "system.raw").read_bytes() == bytes(MiB)
    with pytest.raises(Refused, match="exists already"):
        RestoreFiles(tmp_path, header, "raw")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["system.raw", "vm.toml"]


async def test_a_restore_of_damaged_data_fails_and_leaves_no_disk(tmp_path, library, nursery):
    (tmp_path / "root").mkdir()
    address, _ = await start_target(nursery, tmp_path / "root")
    first = await backup(library, address)
    path = tmp_path / "root" / "web" / first.point / "system.qcow2"
    data = bytearray(path.read_bytes())
    data[9 * MiB] ^= 4
    path.write_bytes(data)
    with RaisesLeaf(StreamAborted, "system.qcow2"):
        await restore(address, first.point, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


async def test_apply_verifies_before_it_writes(tmp_path):
    library = MemoryLibrary(system=2 * MiB)
    disk = library.images["system"]
    disk.write(0, b"one" * 10000)

    async def export(base):
        frozen = await library.begin_checkpoint("web", [BackupDisk("system", "system")], "")
        await frozen.end("keep")
        return frozen.point, stream_of(frozen, base)[0]

    point, full = await export(None)
    disk.write(8192, b"two" * 5000)
    disk.trim(0, 4096)
    _, difference = await export(point)
    (tmp_path / "full").write_bytes(full)
    (tmp_path / "difference").write_bytes(difference)
    raw = tmp_path / "disk.raw"
    with pytest.raises(Refused, match="does not exist"):
        apply_file(tmp_path / "difference", raw)
    with pytest.raises(OSError, match="directory"):
        apply_file(tmp_path / "full", tmp_path / "nowhere" / "disk.raw")
    apply_file(tmp_path / "full", raw)
    before = raw.read_bytes()
    bad = bytearray(difference)
    bad[-100] ^= 1
    (tmp_path / "bad").write_bytes(bad)
    with pytest.raises(OperatorError, match="nothing was applied"):
        apply_file(tmp_path / "bad", raw)
    assert raw.read_bytes() == before
    with pytest.raises(Refused, match="exists already"):
        apply_file(tmp_path / "full", raw)
    apply_file(tmp_path / "difference", raw)
    assert raw.read_bytes() == disk.data


async def exports():
    """The streams of a full and of a differential of two disks; the first is ``rp-...1``."""
    library, streams = two_disks(), []
    for base in (None, "rp-" + "0" * 15 + "1"):
        _, (data, _, _) = await exported(library, base)
        streams.append(data)
        library.images["journal"].write(0, b"new" * 1000)
    return streams


@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda full, _: full.replace(b"j" * 4096, b"j" * 4095 + b"k"), "digest"),
        (lambda full, _: full[:-100] + bytes([full[-100] ^ 1]) + full[-99:], ""),
        (lambda full, _: full[:-1], "ends"),
        (lambda _, differential: differential, "something else"),
        (
            lambda full, _: full.replace(b"rp-" + b"0" * 15 + b"1", b"rp-" + b"0" * 15 + b"3"),
            "something else",
        ),
        (lambda full, _: full.replace(b"web", b"wed"), "something else"),
    ],
)
async def test_whatever_a_target_or_a_wire_makes_of_a_point_is_not_restored(
    tmp_path, nursery, spoil, says, disk_format
):
    """B4: the restore verifies again, whoever has verified before."""
    full, differential = await exports()
    wrong = spoil(full, differential)
    assert wrong != full

    async def send(_params, _peer, stream):
        await stream.send_all(wrong)
        await stream.aclose()

    registry = Registry()
    registry.add_stream(calls.RESTORE, send)
    address = await nursery.start(serve, registry, Address("127.0.0.1", 0))
    with RaisesLeaf(OperatorError, says):
        await restore(address, "rp-" + "0" * 15 + "1", tmp_path / "out", disk_format)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []

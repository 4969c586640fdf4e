"""Several daemons' libraries over one root: owners, leases, and what becomes of checkpoints on the way."""

import errno
import random
import shutil
from pathlib import Path

import attrs
import pytest
import trio
from diskd_libraries import Hosts, hosts

from daemonkit.diskd_api import BackupDisk
from daemonkit.errors import HoldfastError
from daemonkit.units import MiB
from diskd.core import ownership
from diskd.core.ownership import Daemon, Owner
from diskd.errors import Fenced, Refused
from diskd.shell.image import Image
from diskd.shell.library import Library

BLOCK = 4096
SIZE = 8 * MiB


@pytest.fixture
def storage(tmp_path):
    with hosts(tmp_path) as made:
        yield made


async def until(condition, seconds: float = 20) -> None:
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for lies outside: no event tells it
            await trio.sleep(0.005)


async def write(library: Library, export: str, offset: int, data: bytes) -> None:
    opened = await library.open(export, peer="test", drop=lambda _: None)
    await opened.device.write(offset, data)
    await opened.device.flush()
    opened.close()


async def read(library: Library, export: str, offset: int, length: int) -> bytes:
    opened = await library.open(export, peer="test", drop=lambda _: None)
    data = await opened.device.read(offset, length)
    opened.close()
    return data


def disks(*images: str) -> list[BackupDisk]:
    return [BackupDisk(f"disk-{name}", name) for name in images]


async def point_of(library: Library, *images: str) -> str:
    frozen = await library.begin_checkpoint("web", disks(*images), "")
    await frozen.end("keep")
    await until(lambda: library.checkpoints() == [])
    return frozen.point


async def changed(library: Library, image: str, point: str) -> set[int]:
    report = await library.changes(image, point)
    assert report.exact
    return {
        block
        for start, length in report.extents
        for block in range(start // BLOCK, -(-(start + length) // BLOCK))
    }


async def test_what_one_makes_or_deletes_is_not_swept_by_another(storage: Hosts):
    images = storage.root / "images"
    async with storage.serving("n1") as one:
        await one.create_image("a", SIZE)
        shutil.copytree(images / "a", images / ".new-b@n1")
        shutil.copytree(images / "a", images / ".gone-c@n1")
        unborn = storage.root / "checkpoints" / ".new-cp-0123456789abcdef@n1"
        unborn.mkdir()
        async with storage.serving("n2", "host2"):
            assert (images / ".new-b@n1").is_dir()
            assert (images / ".gone-c@n1").is_dir()
            assert unborn.is_dir()
    async with storage.serving("n1"):
        assert [path.name for path in images.iterdir()] == ["a"]
        assert list((storage.root / "checkpoints").iterdir()) == []


async def test_names_are_the_roots_not_the_daemons(storage: Hosts):
    async with storage.serving("n1") as one, storage.serving("n2") as two:
        await one.create_image("a", SIZE)
        for wrong in (two.create_image("a", SIZE), two.delete_image("a"), two.release_image("a")):
            with pytest.raises(Refused, match=r"exists already|n1"):
                await wrong
        with pytest.raises(Refused, match="served by diskd n1 on host host1"):
            await two.open_image("a")
        with pytest.raises(Refused, match="there is no image"):
            await two.open_image("b")
        await one.release_image("a")
        await two.delete_image("a")
        assert one.images() == [] == two.images()


async def test_a_damaged_image_stays_its_owners_until_another_is_told(storage: Hosts):
    async with storage.serving("n1") as one:
        await one.create_image("a", SIZE)
    toml = storage.root / "images" / "a" / "image.toml"
    content = toml.read_bytes()
    toml.write_bytes(b"rot")
    async with storage.serving("n1") as one, storage.serving("n2", "host2") as two:
        assert (one.image("a").state, two.image("a").state) == ("damaged", "elsewhere")
        toml.write_bytes(content)
        await two.open_image("a")  # n1 could not open it, and says that it does not serve it
        assert one.image("a").state == "elsewhere"
        with pytest.raises(Refused, match="served by diskd n2"):
            await one.open_image("a")


async def test_a_damaged_owner_record_is_never_overruled(storage: Hosts):
    async with storage.serving("n1") as one:
        await one.create_image("a", SIZE)
    (record,) = (storage.root / "images" / "a").glob("owner.[0-9]*")
    record.write_bytes(record.read_bytes()[:-3])
    async with storage.serving("n2", "host2") as two:
        assert two.image("a").state == "damaged"
        for fenced in (None, "host1"):
            with pytest.raises(Refused, match=r"owner\.\d+ is damaged"):
                await two.open_image("a", fenced=fenced)
        record.unlink()
        assert (await two.open_image("a")).state == "open"


async def test_a_lease_put_back_from_an_older_copy_is_refused_until_it_is_given_up(storage: Hosts):
    lease = storage.root / "images" / "a" / "lease"
    async with storage.serving("n1") as one:
        await one.create_image("a", SIZE)
        await one.acquire_lease("a", 4, "n1/web")
        older = lease.read_bytes()
        await one.acquire_lease("a", 5, "n2/web")
    for damage in (older, None, b"rot"):
        lease.unlink() if damage is None else lease.write_bytes(damage)
        async with storage.serving("n1") as one:
            assert one.image("a").state == "damaged"
            assert "--lost-lease" in (one.image("a").reason or "")
            with pytest.raises(Refused, match="--lost-lease"):
                await one.open_image("a")
    async with storage.serving("n2", "host2") as two:
        with pytest.raises(Refused, match="--lost-lease"):
            await two.open_image("a")
        assert (await two.open_image("a", lost_lease=True)).epoch == 5
        assert two.lease("a").released
        with pytest.raises(Refused, match="at epoch 5"):
            await two.acquire_lease("a", 5, "n2/web")
        await two.acquire_lease("a", 6, "n2/web")


async def test_a_lease_is_not_changed_by_who_has_lost_the_image(storage: Hosts):
    """Before the regular look would have told: the answer itself needs the image to be ours."""
    async with storage.serving("n1") as one:
        await one.create_image("a", SIZE)
        await one.acquire_lease("a", 4, "n1/web")
        dropped: list[str] = []
        export = await one.open("a@4", peer="test", drop=dropped.append)
        directory = storage.root / "images" / "a"
        (record,) = directory.glob("owner.[0-9]*")
        number = int(record.name.removeprefix("owner."))
        taken = record.read_bytes()
        record.rename(directory / "hidden")
        with pytest.raises(Refused, match="gone"):
            await one.acquire_lease("a", 5, "n1/web")
        assert one.image("a").state == "damaged"
        assert dropped
        with pytest.raises((Fenced, OSError)):
            await export.device.write(0, b"x" * BLOCK)
        assert one.image("a").epoch == 4
        (directory / f"owner.{number}").write_bytes(taken)
        await one.open_image("a")


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", ["lock gone", "another lock", "record gone", "older record", "damaged record"]
)
async def test_an_image_whose_lock_or_record_is_not_what_it_was_is_not_served(storage: Hosts, what: str):
    """The look every few seconds finds it, whatever it is; the other images are served on."""
    directory = storage.root / "images" / "a"
    async with storage.serving("n1") as one:
        for name in ("a", "b"):
            await one.create_image(name, SIZE)
        (record,) = directory.glob("owner.[0-9]*")
        older, number = record.read_bytes(), int(record.name.removeprefix("owner."))
        await one.acquire_lease("a", 4, "n1/web")
        dropped: list[str] = []
        await one.open("a@4", peer="test", drop=dropped.append)
        (record,) = directory.glob("owner.[0-9]*")
        match what:
            case "lock gone":
                (directory / "owner.lock").unlink()
            case "another lock":
                (directory / "owner.lock").rename(directory / "hidden")
                (directory / "owner.lock").touch()
            case "record gone":
                record.unlink()
            case "older record":
                record.unlink()
                (directory / f"owner.{number}").write_bytes(older)
            case "damaged record":
                (directory / f"owner.{number + 2}").write_bytes(b"rot")
        await until(lambda: one.image("a").state == "damaged")
        assert "lost" in (one.image("a").reason or "") or what == "damaged record"
        assert dropped
        await write(one, "b", 0, b"1" * BLOCK)


def newest(directory: Path) -> Owner:
    (record,) = directory.glob("owner.[0-9]*")
    return ownership.decode(record.read_bytes(), int(record.name.removeprefix("owner.")))


async def test_a_stop_writes_nothing_into_an_image_that_somebody_else_has(storage: Hosts):
    """The close itself finds that out, whether or not the regular look has told."""
    directory = storage.root / "images" / "a"
    async with storage.serving("n1") as one:
        await one.create_image("a", SIZE)
        await write(one, "a", 0, b"1" * BLOCK)
        mine = newest(directory)
        other = Daemon("n2", "host2", "machine2", "boot2", "another")
        theirs = attrs.evolve(mine, number=mine.number + 1, daemon=other)
        (directory / f"owner.{theirs.number}").write_bytes(ownership.encode(theirs))
        (directory / f"owner.{mine.number}").unlink()
        before = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


class NeverFlushed:
    """A layer on storage that fails."""

    def __init__(self, image: Image) -> None:
        self._raw = image.raw

    def __getattr__(self, name: str):
        return getattr(self._raw, name)

    async def flush(self) -> None:
        raise OSError(errno.EIO, "simulated")


async def test_an_image_that_cannot_be_closed_cleanly_is_not_given_away(storage: Hosts):
    directory = storage.root / "images" / "a"
    async with storage.serving("n1") as one:
        await one.create_image("a", SIZE)
        await write(one, "a", 0, b"1" * BLOCK)
        opened = one.opened("a")
        assert opened is not None
        opened.image.layer = NeverFlushed(opened.image)
        with pytest.raises(Refused, match="stays with this daemon"):
            await one.release_image("a")
        assert (newest(directory).state, newest(directory).daemon.name) == ("serving", "n1")
        async with storage.serving("n2", "host2") as two:
            with pytest.raises(Refused, match="has not released it"):
                await two.open_image("a")
        assert (await one.open_image("a")).state == "open"


async def test_a_damaged_record_costs_no_other_image_its_clean_stop(storage: Hosts):
    async with storage.serving("n1") as one:
        for name in ("a", "b"):
            await one.create_image(name, SIZE)
        (record,) = (storage.root / "images" / "a").glob("owner.[0-9]*")
        number = int(record.name.removeprefix("owner."))
        record.with_name(f"owner.{number + 1}").write_bytes(b"rot")
    async with storage.serving("n1") as one:
        opened = one.opened("b")
        assert opened is not None
        assert opened.image.opened_how == "clean"


async def test_a_merge_goes_on_after_a_takeover(storage: Hosts):
    async with storage.doomed("n1a") as one:
        await one.create_image("a", SIZE)
        base = await point_of(one, "a")
        frozen = await one.begin_checkpoint("web", disks("a"), "")
        await write(one, "a", 0, b"1" * BLOCK)
        await write(one, "a", 5 * BLOCK, b"2" * 3 * BLOCK)
        assert frozen.point in [point.point for point in one.points("a")]
    async with storage.serving("n1b", checkpoint_resume_timeout_ns=0) as two:
        assert two.checkpoints() == []
        await two.open_image("a")
        await until(lambda: [info.state for info in two.checkpoints()] == ["pending"])
        assert await read(two, "a", 0, BLOCK) == b"1" * BLOCK
        assert await changed(two, "a", base) == {0, 5, 6, 7}
        (pending,) = two.checkpoints()
        assert (pending.checkpoint, pending.outcome) == (frozen.checkpoint, "pending")
        # The next contact with the target settles it here.
        again = await two.begin_checkpoint("web", disks("a"), "")
        await again.settle(frozen.point, committed=True)
        await again.end("discard")
        assert await changed(two, "a", frozen.point) == {0, 5, 6, 7}


async def test_a_pending_point_moves_with_its_image(storage: Hosts):
    async with storage.serving("n1") as one, storage.serving("n2", "host2") as two:
        await one.create_image("a", SIZE)
        frozen = await one.begin_checkpoint("web", disks("a"), "")
        await write(one, "a", 0, b"1" * BLOCK)
        await frozen.end("pending")
        await until(lambda: [info.state for info in one.checkpoints()] == ["pending"])
        await one.release_image("a")
        assert one.checkpoints() == []
        await two.open_image("a")
        (info,) = two.checkpoints()
        assert (info.checkpoint, info.state) == (frozen.checkpoint, "pending")
        await two.end_checkpoint(frozen.checkpoint, "keep")
        assert await changed(two, "a", frozen.point) == {0}


async def test_a_checkpoint_by_hand_stands_on_after_a_takeover(storage: Hosts):
    async with storage.doomed("n1a") as one:
        await one.create_image("a", SIZE)
        await write(one, "a", 0, b"1" * BLOCK)
        frozen = await one.begin_checkpoint("web", disks("a"), "", held_by="hand")
        await write(one, "a", 0, b"2" * BLOCK)
    async with storage.serving("n1b") as two:
        await two.open_image("a")
        assert await read(two, f"a:{frozen.checkpoint}", 0, BLOCK) == b"1" * BLOCK
        assert await read(two, "a", 0, BLOCK) == b"2" * BLOCK
        await two.end_checkpoint(frozen.checkpoint, "keep")
        await until(lambda: two.checkpoints() == [])
        assert await changed(two, "a", frozen.point) == {0}


async def test_a_checkpoint_goes_on_after_an_opening_that_failed(storage: Hosts):
    async with storage.doomed("n1a") as one:
        await one.create_image("a", SIZE)
        await write(one, "a", 0, b"1" * BLOCK)
        frozen = await one.begin_checkpoint("web", disks("a"), "", held_by="hand")
        await write(one, "a", 0, b"2" * BLOCK)
    head = storage.root / "images/a/checkpoint/head"
    whole = head.read_bytes()
    async with storage.serving("n1b") as two:
        head.write_bytes(b"damaged")
        with pytest.raises(HoldfastError, match="damaged"):
            await two.open_image("a")
        assert two.checkpoints() == []
        head.write_bytes(whole)
        await two.open_image("a")
        assert await read(two, f"a:{frozen.checkpoint}", 0, BLOCK) == b"1" * BLOCK
        await two.end_checkpoint(frozen.checkpoint, "keep")
        await until(lambda: two.checkpoints() == [])
        assert await read(two, "a", 0, BLOCK) == b"2" * BLOCK
        assert await changed(two, "a", frozen.point) == {0}


@pytest.mark.parametrize("other_host", [False, True])
async def test_a_checkpoint_of_two_images_waits_until_both_are_with_one_daemon(storage: Hosts, other_host):
    host, fenced = ("host2", "host1") if other_host else ("host1", None)
    async with storage.doomed("n1") as one:
        for name in ("a", "b"):
            await one.create_image(name, SIZE)
            await write(one, name, 0, name.encode() * BLOCK)
        frozen = await one.begin_checkpoint("web", disks("a", "b"), "", held_by="hand")
        for name in ("a", "b"):
            await write(one, name, 0, b"2" * BLOCK)
    async with storage.serving("n2", host) as two:
        await two.open_image("a", fenced=fenced)
        assert two.checkpoints() == []
        assert await read(two, "a", 0, BLOCK) == b"2" * BLOCK
        # Nothing is merged: what the record says of the frozen view still holds.
        assert (storage.root / "images" / "a" / "disk.raw").read_bytes()[:BLOCK] == b"a" * BLOCK
        with pytest.raises(Refused, match=rf"b of its checkpoint {frozen.checkpoint}"):
            await two.begin_checkpoint("web", disks("a"), "")
        # It may go back as it is, and come again.
        await two.release_image("a")
        await two.open_image("a")
        await two.open_image("b", fenced=fenced)
        for name in ("a", "b"):
            assert await read(two, f"{name}:{frozen.checkpoint}", 0, BLOCK) == name.encode() * BLOCK
            assert await read(two, name, 0, BLOCK) == b"2" * BLOCK
            image = two.opened(name)
            assert image is not None and image.stuck is None, "or the next checkpoint would be refused"
        await two.end_checkpoint(frozen.checkpoint, "keep")
        await until(lambda: two.checkpoints() == [])
        for name in ("a", "b"):
            assert (storage.root / "images" / name / "disk.raw").read_bytes()[:BLOCK] == b"2" * BLOCK


async def test_images_wander_at_random_and_no_change_is_missed(storage: Hosts):
    """Releases, kills with takeover on the same host, clean stops: every report is exact and complete."""
    rng = random.Random(7)
    written: set[int] = set()
    point: str | None = None
    epoch = 0
    for turn in range(14):
        name = rng.choice(("n1a", "n1b"))
        dies = rng.random() < 0.5
        async with storage.doomed(name) if dies else storage.serving(name) as library:
            if turn == 0:
                await library.create_image("a", SIZE)
                point = await point_of(library, "a")
            else:
                await library.open_image("a")
            assert point is not None
            assert await changed(library, "a", point) == written
            assert library.lease("a").epoch == epoch
            epoch += rng.randrange(1, 3)
            await library.acquire_lease("a", epoch, "n/web")
            block = rng.randrange(SIZE // BLOCK)
            await write(library, f"a@{epoch}", block * BLOCK, bytes([turn + 1]) * BLOCK)
            written.add(block)
            if not dies and rng.random() < 0.5:
                await library.release_lease("a", epoch, "n/web")
                await library.release_image("a")

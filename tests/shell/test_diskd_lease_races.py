"""Fencing at the images: requests that wait, connections that are replaced, many acquirers, kills."""

import errno
import random

import pytest
import trio
import trio.lowlevel
import trio.testing
from diskd_libraries import Hosts, hosts
from image_harness import GatedLayer

from daemonkit.units import MiB
from diskd.core import lease
from diskd.errors import Fenced, Refused
from diskd.shell.library import Library
from diskd.shell.open_image import CONNECTIONS_MAX

BLOCK = 4096
SIZE = 8 * MiB


@pytest.fixture
def storage(tmp_path):
    with hosts(tmp_path) as made:
        yield made


class Client:
    """One connection; writes in the background, and knows how they ended."""

    def __init__(self, library: Library, export: str) -> None:
        self.library = library
        self.name = export
        self.dropped: list[str] = []
        self.ended: dict[str, int] = {}  # by the write's name: errno, or 0

    async def connect(self) -> None:
        self.export = await self.library.open(self.name, peer="test", drop=self.dropped.append)

    async def write(self, name: str, offset: int, data: bytes) -> None:
        try:
            await self.export.device.write(offset, data)
        except OSError as error:
            self.ended[name] = error.errno or -1
        else:
            self.ended[name] = 0


@pytest.mark.parametrize("wait", ["first touch", "hold"])
async def test_a_higher_epoch_waits_for_the_submitted_and_refuses_the_waiting(storage: Hosts, wait):
    async with storage.serving("n1") as library:
        await library.create_image("a", SIZE)
        image = library._images["a"].image
        await library.acquire_lease("a", 1, "n1/web")
        client = Client(library, "a@1")
        await client.connect()
        await client.export.device.write(0, b"0" * BLOCK)  # its region is open now
        gated = image.layer = GatedLayer(image)
        answered = trio.Event()

        async def acquire() -> None:
            await library.acquire_lease("a", 2, "n2/web")
            answered.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.write, "submitted", 0, b"1" * BLOCK)
            await gated.arrived.wait()
            if wait == "first touch":
                await image.commit_turn.acquire()
                nursery.start_soon(client.write, "waiting", 4 * MiB, b"2" * BLOCK)
            else:
                image.is_held = True
                image._unheld = trio.Event()
                nursery.start_soon(client.write, "waiting", BLOCK, b"2" * BLOCK)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(acquire)
            with trio.fail_after(20):
                while library.lease("a").epoch == 1:  # noqa: ASYNC110 - it is durable in a thread
                    await trio.sleep(0.002)
            await trio.testing.wait_all_tasks_blocked()
            assert not answered.is_set(), "a submitted write may still land"
            with pytest.raises(Fenced):
                client.export.device.read_nowait(0, BLOCK)
            gated.gate.set()
            with trio.fail_after(20):
                await answered.wait()
            assert client.dropped
            assert client.ended["submitted"] == 0
            if wait == "first touch":
                image.commit_turn.release()
            else:
                image.is_held = False
                image._unheld.set()
        assert client.ended["waiting"] == errno.ESHUTDOWN
        second = Client(library, "a@2")
        await second.connect()
        assert await second.export.device.read(0, BLOCK) == b"1" * BLOCK
        for offset in (BLOCK, 4 * MiB):
            assert await second.export.device.read(offset, BLOCK) == bytes(BLOCK)
        second.export.close()


async def test_a_second_connection_of_an_epoch_waits_for_the_first_ones_writes(storage: Hosts):
    async with storage.serving("n1") as library:
        await library.create_image("a", SIZE)
        image = library._images["a"].image
        await library.acquire_lease("a", 1, "n1/web")
        first, second = Client(library, "a@1"), Client(library, "a@1")
        await first.connect()
        await first.export.device.write(0, b"0" * BLOCK)
        gated = image.layer = GatedLayer(image)
        connected = trio.Event()

        async def replace() -> None:
            await second.connect()
            connected.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.write, "submitted", 0, b"1" * BLOCK)
            await gated.arrived.wait()
            nursery.start_soon(replace)
            await trio.testing.wait_all_tasks_blocked()
            assert not connected.is_set()
            with pytest.raises(Fenced):
                await first.export.device.write(BLOCK, b"2" * BLOCK)
            gated.gate.set()
            with trio.fail_after(20):
                await connected.wait()
        assert first.dropped == ["a newer connection under the same epoch took over"]
        assert first.ended["submitted"] == 0
        assert await second.export.device.read(0, BLOCK) == b"1" * BLOCK
        second.export.close()


async def test_plain_access_ends_with_a_lease_and_returns_after_it(storage: Hosts):
    async with storage.serving("n1") as library:
        await library.create_image("a", SIZE)
        plain = [Client(library, "a") for _ in range(3)]
        for client in plain:
            await client.connect()
        await library.prepare_lease("a", 1, "n1/web")
        assert not any(client.dropped for client in plain)
        await library.acquire_lease("a", 1, "n1/web")
        for client in plain:
            assert client.dropped
            await client.write("late", 0, b"1" * BLOCK)
            assert client.ended["late"] == errno.ESHUTDOWN
        with pytest.raises(Refused, match="under lease"):
            await Client(library, "a").connect()
        await library.release_lease("a", 1, "n1/web")
        again = Client(library, "a")
        await again.connect()
        await again.write("now", 0, b"1" * BLOCK)
        for client in plain:  # those of before stay fenced: their world has moved on
            await client.write("later", 0, b"2" * BLOCK)
            assert client.ended["later"] == errno.ESHUTDOWN
        assert await again.export.device.read(0, BLOCK) == b"1" * BLOCK
        again.export.close()


async def test_a_stale_client_that_knocks_for_ever_leaves_nothing_behind(storage: Hosts):
    async with storage.serving("n1") as library:
        await library.create_image("a", SIZE)
        await library.acquire_lease("a", 1, "n1/web")
        await library.acquire_lease("a", 2, "n2/web")
        for _ in range(2000):
            with pytest.raises(Refused):
                await library.open("a@1", peer="test", drop=lambda _: None)
        image = library._images["a"]
        assert image._sessions == []
        assert library._exports._refusals.ask("a@1", 10**18) == 1999, "said once"


async def test_connections_that_have_ended_are_not_counted(storage: Hosts):
    async with storage.serving("n1") as library:
        await library.create_image("a", SIZE)
        for _ in range(CONNECTIONS_MAX + 1):
            opened = await library.open("a", peer="test", drop=lambda _: None)
            opened.close()


async def test_what_is_under_way_as_an_image_is_lost_ends_before_its_files_are_closed(storage: Hosts):
    """Their numbers would be other files' by then, to which a late write, or a merge, would go."""
    async with storage.serving("n1") as library:
        await library.create_image("a", SIZE)
        await library.acquire_lease("a", 1, "n1/web")
        opened = library.opened("a")
        client = Client(library, "a@1")
        await client.connect()
        await client.export.device.write(0, b"0" * BLOCK)
        gated = opened.image.layer = GatedLayer(opened.image)
        closed_at: dict[str, bool] = {}

        async def merge() -> None:
            with opened.merging():
                try:
                    await trio.sleep_forever()
                finally:
                    closed_at["merge"] = opened.image.files._is_closed

        async def write() -> None:
            await client.write("late", 0, b"1" * BLOCK)
            closed_at["write"] = opened.image.files._is_closed

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(merge)
                nursery.start_soon(write)
                await gated.arrived.wait()
                nursery.start_soon(opened.lose, "it was taken over")
                await trio.testing.wait_all_tasks_blocked()
                assert client.dropped
                gated.gate.set()
        assert (closed_at, client.ended) == ({"write": False, "merge": False}, {"late": 0})
        assert opened.image.files._is_closed


@pytest.mark.parametrize("seed", range(6))
async def test_of_many_acquirers_each_epoch_has_one_winner_and_no_answer_is_lost_by_a_kill(
    storage: Hosts, seed
):
    rng = random.Random(seed)
    answers: list[tuple[int, str]] = []
    for life in range(3):
        async with storage.doomed(f"n{life % 2}") as library:
            if life == 0:
                await library.create_image("a", SIZE)
            else:
                await library.open_image("a")
                assert library.lease("a").epoch >= max(epoch for epoch, _ in answers)

            async def acquire(library: Library, holder: str, epoch: int) -> None:
                try:
                    answer = await library.acquire_lease("a", epoch, holder)
                except Refused:
                    return
                assert (answer.epoch, answer.holder) == (epoch, holder)
                answers.append((epoch, holder))

            lowest = library.lease("a").epoch
            enough = trio.Event()
            async with trio.open_nursery() as nursery:
                for number in range(20):
                    nursery.start_soon(acquire, library, f"h{life}.{number}", lowest + rng.randrange(12))
                nursery.start_soon(_after, rng.randrange(1, 60), enough)
                await enough.wait()
                nursery.cancel_scope.cancel(reason="killed")
            if not answers:
                await acquire(library, "last", lowest + 20)
    epochs = [epoch for epoch, _ in answers]
    assert epochs == sorted(set(epochs)), "each epoch was answered to one, and never after a higher one"
    async with storage.serving("n0") as library:
        await library.open_image("a")
        assert library.lease("a").epoch >= epochs[-1]
        with pytest.raises(Refused):
            await library.acquire_lease("a", epochs[-1], "another")


async def _after(steps: int, enough: trio.Event) -> None:
    for _ in range(steps):
        await trio.lowlevel.checkpoint()
    enough.set()


async def test_a_lease_that_cannot_be_made_durable_is_not_answered(storage: Hosts):
    async with storage.serving("n1") as library:
        await library.create_image("a", SIZE)
        await library.acquire_lease("a", 1, "n1/web")
        client = Client(library, "a@1")
        await client.connect()
        directory = storage.root / "images" / "a"
        lock = directory / lease.LEASE_FILE
        lock.unlink()
        lock.mkdir()  # no file can take its place
        with pytest.raises(Refused, match="could not be made durable"):
            await library.acquire_lease("a", 2, "n2/web")
        assert library.lease("a").epoch == 1
        assert not client.dropped
        await client.write("on", 0, b"1" * BLOCK)
        assert client.ended["on"] == 0
        lock.rmdir()
        await library.acquire_lease("a", 3, "n2/web")
        assert client.dropped


async def test_a_promoted_connection_is_sent_home_when_its_image_is_handed_over(storage: Hosts):
    """It was prepared here, so the handover's epoch does not fence it; yet this is not the place for it."""
    async with storage.serving("n1") as library:
        await library.create_image("a", SIZE)
        await library.acquire_lease("a", 1, "n1/web")
        await library.prepare_lease("a", 2, "n2/web")
        client = Client(library, "a@2")
        await client.connect()
        await library.hand_over("a", 2, "n2/web")
        assert client.dropped == ["image a was handed over to n2/web"]
        with pytest.raises(OSError, match="handed over") as caught:
            await client.export.device.read(0, 512)
        assert caught.value.errno == errno.ESHUTDOWN


@pytest.mark.parametrize("verb", ["release_image", "delete_image"])
async def test_whoever_is_just_connecting_does_not_get_an_image_that_goes(storage: Hosts, verb: str):
    async with storage.serving("n1") as library:
        await library.create_image("a", SIZE)
        client = Client(library, "a")
        refused: list[str] = []

        async def connect() -> None:
            try:
                await client.connect()
            except Refused as error:
                refused.append(str(error))

        async with trio.open_nursery() as nursery, library._images["a"]._lock:
            nursery.start_soon(connect)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(getattr(library, verb), "a")
            await trio.testing.wait_all_tasks_blocked()
        assert client.dropped or refused

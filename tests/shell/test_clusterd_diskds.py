"""diskd's control as clusterd calls it, against a diskd that grants, refuses or keeps silent."""

import contextlib
from collections.abc import AsyncIterator
from functools import partial

import trio

from clusterd.config import DiskdAddresses
from clusterd.core.types import Disk
from clusterd.shell.diskds import Diskds
from daemonkit.diskd_api import (
    IMAGE_ACTIVITY,
    LEASE_ACQUIRE,
    LEASE_RELEASE,
    LEASE_SHOW,
    Activity,
    ActivityReport,
    ImageName,
    ImageNames,
    Lease,
    LeaseRequest,
)
from daemonkit.errors import OperatorError
from daemonkit.ports import Address
from daemonkit.rpc import Call, Registry, serve

ANY = Address("127.0.0.1", 0)
KEY = b"a cluster key of some length"
A, B, C = (Disk(name, f"web-{name}") for name in "abc")
ELSEWHERE = Disk("d", "web-d", "other")


class FakeDiskd:
    """Leases as diskd keeps them: epochs only go up; the same epoch and holder again is fine."""

    def __init__(self, *images: str) -> None:
        self.leases = {image: Lease(image, 0, None) for image in images}
        self.asked: list[str] = []
        self.dead_boots: list[str] | None = None

    def registry(self) -> Registry:
        registry = Registry()
        registry.add(LEASE_ACQUIRE, self.acquire)
        registry.add(LEASE_SHOW, self.show)
        registry.add(LEASE_RELEASE, self.release)
        registry.add(IMAGE_ACTIVITY, self.activity)
        return registry

    def find(self, image: str) -> Lease:
        if image not in self.leases:
            raise OperatorError(f"no image {image!r}")
        return self.leases[image]

    async def acquire(self, params: LeaseRequest, call: Call) -> Lease:
        self.asked.append(params.image)
        self.dead_boots = params.dead_boots
        held = self.find(params.image)
        if params.epoch < held.epoch or (params.epoch == held.epoch and params.holder != held.holder):
            raise OperatorError(f"epoch {params.epoch} is not above {held.epoch}")
        self.leases[params.image] = Lease(params.image, params.epoch, params.holder)
        return self.leases[params.image]

    async def release(self, params: LeaseRequest, call: Call) -> Lease:
        self.leases[params.image] = Lease(params.image, params.epoch, params.holder, released=True)
        return self.leases[params.image]

    async def show(self, params: ImageName, call: Call) -> Lease:
        return self.find(params.image)

    async def activity(self, params: ImageNames, call: Call) -> ActivityReport:
        seen = [
            Activity(image, self.leases[image].epoch, self.leases[image].holder, 1, 5)
            for image in params.images
            if image in self.leases
        ]
        return ActivityReport(seen, [image for image in params.images if image not in self.leases])


@contextlib.asynccontextmanager
async def reached(fake: FakeDiskd) -> AsyncIterator[Diskds]:
    """``main`` answers, ``silent`` takes connections and says nothing, ``gone`` refuses them."""
    async with trio.open_nursery() as nursery:
        address = await nursery.start(partial(serve, fake.registry(), ANY, keys=[KEY]))
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with listener:
            silent = Address("127.0.0.1", listener.socket.getsockname()[1])
            gone = Address("127.0.0.1", 1)
            named = {"main": address, "silent": silent, "gone": gone}
            addresses = {name: DiskdAddresses(where, where) for name, where in named.items()}
            yield Diskds(addresses, KEY, acquire_seconds_max=0.5)
        nursery.cancel_scope.cancel()


async def test_every_lease_is_asked_for_in_order_until_one_is_not_given() -> None:
    fake = FakeDiskd(A.image, B.image, C.image)
    async with reached(fake) as diskds:
        answers = await diskds.acquire((A, B), 4, "n1/web")
        assert [(answer.image, answer.outcome, answer.epoch) for answer in answers] == [
            (A.image, "acquired", 4),
            (B.image, "acquired", 4),
        ]
        assert fake.dead_boots == [], "always with the word to bring images along, if there are several diskd"
        await diskds.acquire((B,), 9, "n2/web", ("boot-1", "boot-2"))
        assert fake.dead_boots == ["boot-1", "boot-2"]
        fake.asked.clear()
        answers = await diskds.acquire((A, B, C), 5, "n1/web")
    assert fake.asked == [A.image, B.image]
    assert [(answer.outcome, answer.epoch) for answer in answers] == [("acquired", 5), ("refused", 9)]
    assert answers[1].reason == "epoch 5 is not above 9"


async def test_no_clear_answer_is_unanswered() -> None:
    async with reached(FakeDiskd()) as diskds:
        for disk in (Disk("x", "x", "gone"), Disk("x", "x", "silent"), ELSEWHERE):
            (answer,) = await diskds.acquire((disk,), 1, "n1/web")
            assert (answer.outcome, answer.epoch) == ("unanswered", 0)
            assert answer.reason


async def test_a_probe_is_good_only_if_every_image_was_shown() -> None:
    fake = FakeDiskd(A.image, B.image)
    async with reached(fake) as diskds:
        await diskds.acquire((A,), 7, "n1/web")
        reply = await diskds.probe((A, B))
        assert (reply.reached, reply.epochs) == (True, {A.image: 7, B.image: 0})
        assert (await diskds.probe(())).reached
        reply = await diskds.probe((A, C))
        assert (reply.reached, reply.epochs) == (False, {A.image: 7})
        assert "no image 'web-c'" in reply.reason
        reply = await diskds.probe((A, Disk("x", "x", "gone"), ELSEWHERE))
        assert not reply.reached


async def test_looking_leaves_out_what_is_not_seen_and_releasing_never_fails() -> None:
    fake = FakeDiskd(A.image)
    async with reached(fake) as diskds:
        await diskds.acquire((A,), 3, "n1/web")
        looks = await diskds.look((A, B, Disk("x", "x", "gone"), ELSEWHERE))
        assert [(look.disk, look.epoch, look.last_io_age_ns) for look in looks] == [(A, 3, 5)]
        await diskds.release((Disk("x", "x", "gone"), A, ELSEWHERE), 3, "n1/web")
    assert fake.leases[A.image].released

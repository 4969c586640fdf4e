"""Carries effects out in the simulated world, as the trio shell does in the real one.

Requests travel: each direction may be cut, and an answer that is lost leaves the outcome unknown.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import attrs

from clusterd.core import effects, events
from clusterd.core.picture import encode_picture
from clusterd.core.types import Disk
from clusterd.sim.hypervisor import Process
from daemonkit.errors import InvariantBroken
from daemonkit.units import MILLISECOND, SECOND

if TYPE_CHECKING:
    from clusterd.sim.world import Host, World

STORE_TIMEOUT_NS: Final = SECOND
LEASE_TIMEOUT_NS: Final = 2 * SECOND
LOOK_TIMEOUT_NS: Final = 2 * SECOND
SPAWN_NS: Final = 20 * MILLISECOND
STOP_NS: Final = 50 * MILLISECOND
PID_FIRST: Final = 100


@attrs.define
class Carrier:
    world: "World"
    next_pid: int = PID_FIRST
    spawned: set[tuple[str, int]] = attrs.field(factory=set)

    def carry(self, host: "Host", effect: object) -> None:
        """One effect."""
        match effect:
            case effects.Persist(ticket, document):
                host.document = document
                self._answer(host, MILLISECOND, events.Persisted(ticket))
            case effects.KeepPicture(picture):
                host.picture = encode_picture(picture)
            case effects.SendHeartbeat(data):
                self._heartbeat(host, data)
            case effects.NoteEvent(name, fields):
                self.world.note(host.name, name.value, fields)
            case effects.AnswerCommand(ticket):
                self.world.answers[ticket] = effect
            case effects.Exit():
                self.world.note(host.name, "exit", {"reason": effect.reason})
                self.world.kill_clusterd(host)
            case effects.SpawnRun() | effects.AdoptRun() | effects.StopRun():
                self._process(host, effect)
            case effects.AcquireLeases():
                self._acquire(host, effect)
            case effects.ReleaseLeases():
                pass  # releasing keeps the epoch; the simulated images need no more
            case effects.LookAtImages():
                self._look(host, effect)
            case effects.Probe():
                self._probe(host, effect)
            case effects.CheckReferences(request):
                self._answer(host, MILLISECOND, events.ReferencesAnswered(request, any_answered=True))
            case _:
                self._store(host, effect)

    def _answer(self, host: "Host", delay_ns: int, event: events.Event) -> None:
        generation = host.generation
        self.world.after(delay_ns, lambda: self.world.deliver(host, event, generation))

    def _heartbeat(self, host: "Host", data: bytes) -> None:
        world = self.world
        event = events.DatagramReceived("a", data)
        for name in world.names:
            delay = None if name == host.name else world.network.delay(host.name, name)
            if delay is not None:
                peer = world.hosts[name]
                world.after(delay, lambda p=peer: world.deliver(p, event, p.generation))  # type: ignore[misc] # mypy cannot infer a lambda with a default

    # -- the store

    def _store(self, host: "Host", effect: object) -> None:
        world = self.world
        if isinstance(effect, effects.RevokeSession):
            delay = world.network.delay(host.name, "store")
            lease = effect.lease
            if delay is not None and world.store.is_up:
                world.after(delay, lambda: world.store.revoke(lease))
            return
        request, execute = self._store_call(effect)
        failed = events.StoreFailed(request, "no answer within 1s")
        there = world.network.delay(host.name, "store")
        generation, asked_at = host.generation, world.now

        def fail() -> None:
            world.deliver(host, failed, generation)

        def arrive() -> None:
            back = world.network.delay("store", host.name)
            if not world.store.is_up:
                world.at(asked_at + STORE_TIMEOUT_NS, fail)
                return
            event = execute()
            if back is None:
                world.at(asked_at + STORE_TIMEOUT_NS, fail)  # it happened, but nobody here knows
            else:
                world.after(back, lambda: world.deliver(host, event, generation))

        if there is None:
            world.after(STORE_TIMEOUT_NS, fail)
        else:
            world.after(there, arrive)

    def _store_call(self, effect: object) -> tuple[int, Callable[[], events.Event]]:
        world, store = self.world, self.world.store
        match effect:
            case effects.ReadStore(request):
                return request, lambda: events.StoreSnapshot(request, *store.read(world.now))
            case effects.GrantSession(request, ttl_ns):
                return request, lambda: events.SessionGranted(request, store.grant(ttl_ns, world.now))
            case effects.KeepSession(request, lease):
                return request, lambda: events.SessionKept(request, store.keep(lease, world.now))
            case effects.WriteStore(request, compares, puts, deletes):

                def write() -> events.Event:
                    done = store.transact(compares, puts, deletes, world.now)
                    return events.StoreWritten(request, done, store.revision)

                return request, write
        raise InvariantBroken(f"the simulator does not know the effect {effect!r}")

    # -- diskd

    def _reaches_diskd(self, name: str) -> bool:
        storage = self.world.storage
        return storage.is_up and (storage.per_host or self.world.network.is_open(name, "diskd"))

    def _loses_diskd(self, sender: str, receiver: str) -> bool:
        return not self.world.storage.per_host and self.world.network.loses(sender, receiver)

    def _acquire(self, host: "Host", effect: effects.AcquireLeases) -> None:
        world = self.world
        answers: list[events.LeaseAnswer] = []
        for disk in effect.disks:
            if self._loses_diskd(host.name, "diskd") or not world.storage.is_up:
                answers.append(events.LeaseAnswer(disk.image, "unanswered", 0, "no answer"))
                break
            refusal = self._bring(host, disk, effect)
            if refusal is not None:
                epoch = world.storage.image(disk.image).epoch
                answers.append(events.LeaseAnswer(disk.image, "refused", epoch, refusal))
                break
            granted, epoch = world.storage.acquire(disk.image, effect.epoch, effect.holder)
            if self._loses_diskd("diskd", host.name):  # it happened, but nobody here knows
                answers.append(events.LeaseAnswer(disk.image, "unanswered", 0, "no answer"))
                break
            outcome = "acquired" if granted else "refused"
            answers.append(events.LeaseAnswer(disk.image, outcome, epoch, "" if granted else "older epoch"))
            if not granted:
                break
        silent = any(answer.outcome == "unanswered" for answer in answers)
        delay = LEASE_TIMEOUT_NS if silent else 2 * MILLISECOND
        self._answer(host, delay, events.LeasesAnswered(effect.request, tuple(answers)))

    def _bring(self, host: "Host", disk: Disk, effect: effects.AcquireLeases) -> str | None:
        """Where every host has its own diskd: the image comes here, or the reason why not. A host's diskd
        starts with it, and has again under this boot what it had."""
        world, image = self.world, self.world.storage.image(disk.image)
        if world.storage.per_host and image.at not in (None, host.name):
            owner = world.hosts[str(image.at)]
            # One that lives and answers fences its own run, and hands the image over.
            if not owner.is_up or not world.network.is_open(host.name, owner.name):
                if world.boot_id(owner) not in effect.dead_boots:
                    return f"it belongs to the diskd of {owner.name}, which does not answer"
                if owner.is_up:
                    raise InvariantBroken(f"S2: {disk.image} is taken from {owner.name}, which lives")
        image.at = host.name
        return None

    def _look(self, host: "Host", effect: effects.LookAtImages) -> None:
        world = self.world
        if not self._reaches_diskd(host.name):
            self._answer(host, LOOK_TIMEOUT_NS, events.ImagesSeen(effect.request, ()))
            return
        looks = tuple(self._one_look(disk) for disk in effect.disks)
        delay = world.network.delay(host.name, "diskd") or 0
        self._answer(host, delay, events.ImagesSeen(effect.request, looks))

    def _one_look(self, disk: Disk) -> events.ImageLook:
        image = self.world.storage.image(disk.image)
        age = None if image.last_io is None else self.world.now - image.last_io
        return events.ImageLook(disk, image.epoch, image.holder, age)

    def _probe(self, host: "Host", effect: effects.Probe) -> None:
        world, target = self.world, self.world.hosts[effect.node]
        reason = ""
        if target is not host and not world.network.is_open(host.name, target.name):
            reason = f"{target.name} did not answer"
        elif target.core is None or target.paused_at is not None:
            reason = f"{target.name} did not answer"
        elif effect.disks and not self._reaches_diskd(target.name):
            reason = f"diskd did not answer {target.name}"
        epochs = {} if reason else {d.image: world.storage.image(d.image).epoch for d in effect.disks}
        answer = events.ProbeAnswered(effect.request, not reason, reason, epochs)
        self._answer(host, LOOK_TIMEOUT_NS if reason else 3 * MILLISECOND, answer)

    # -- processes

    def _process(self, host: "Host", effect: effects.SpawnRun | effects.AdoptRun | effects.StopRun) -> None:
        if isinstance(effect, effects.StopRun):
            self._stop(host, effect)
            return
        vm, epoch = effect.config.name, effect.epoch
        found = host.hypervisor.find(vm, epoch)
        if found is None and isinstance(effect, effects.AdoptRun):
            gone = events.RunEnded(vm, epoch, None, "it was gone when clusterd came back")
            self._answer(host, MILLISECOND, gone)
            return
        if found is None:
            assert isinstance(effect, effects.SpawnRun)
            found = self._spawn(host, effect)
        self._answer(host, SPAWN_NS, events.RunStarted(vm, epoch, found.pid))

    def _spawn(self, host: "Host", effect: effects.SpawnRun) -> Process:
        """The truth of S2, S7 is asserted here, where a process comes to life."""
        world, vm = self.world, effect.config.name
        others = world.processes_of(vm)
        if (vm, effect.epoch) in self.spawned:
            raise InvariantBroken(f"S1: {vm}@{effect.epoch} is spawned a second time, on {host.name}")
        self.spawned.add((vm, effect.epoch))
        if any(other is host for other, _ in others):
            raise InvariantBroken(f"S7: {vm} is spawned on {host.name}, where it runs already")
        if others and not effect.config.disks and not effect.config.stateless:
            raise InvariantBroken(f"S2: {vm} without disks is spawned on {host.name}, but runs elsewhere")
        for disk in effect.config.disks:
            epoch = world.storage.image(disk.image).epoch
            if epoch < effect.epoch:
                raise InvariantBroken(f"S2: {vm}@{effect.epoch} is spawned, but {disk.image} is at {epoch}")
        self.next_pid += 1
        images = tuple(disk.image for disk in effect.config.disks)
        process = Process(vm, effect.epoch, self.next_pid, images)
        host.hypervisor.processes[vm] = process
        if images:
            world.after(SPAWN_NS, lambda: self._write(host, process))
        return process

    def _write(self, host: "Host", process: Process) -> None:
        """The journal guest: one acknowledged record after the other; it dies of ESHUTDOWN."""
        world = self.world
        if host.hypervisor.processes.get(process.vm) is not process:
            return
        if not process.is_paused and self._reaches_diskd(host.name):
            for image in process.images:
                gone = world.storage.per_host and world.storage.image(image).at != host.name
                if gone or not world.storage.write(image, process.epoch, host.name, world.now):
                    world.end_process(host, process, 1, "its write was refused")
                    return
                world.acknowledged[image] = world.acknowledged.get(image, 0) + 1
        world.after(world.write_interval_ns, lambda: self._write(host, process))

    def _stop(self, host: "Host", effect: effects.StopRun) -> None:
        world = self.world

        def stop() -> None:
            found = host.hypervisor.find(effect.vm, effect.epoch)
            if found is not None:
                world.end_process(host, found, None, "killed" if effect.force else "terminated")
            else:
                self._answer(host, MILLISECOND, events.RunEnded(effect.vm, effect.epoch, None, "gone"))

        world.after(MILLISECOND if effect.force else STOP_NS, stop)

"""The simulated world: an event heap, hosts with their clusterd and processes, faults, and the truth.

Nothing here knows time but the heap, and nothing is random but the generator of the seed: equal seeds give
byte-identical traces. Every heartbeat goes through encode and decode, every record through the store's
bytes, every restart through the state document. After each step the invariants are asserted.
"""

import heapq
import random
from collections.abc import Callable
from typing import Any, Final

import attrs

from clusterd.core import effects, events
from clusterd.core.commands import Command
from clusterd.core.invariants import check_core, check_ready
from clusterd.core.node import NodeCore
from clusterd.core.picture import decode_picture
from clusterd.core.records import PropertyTexts, encode_record, prefix
from clusterd.core.state import begin_incarnation, decode_state, encode_state
from clusterd.core.types import Identity
from clusterd.sim.carrier import Carrier
from clusterd.sim.hypervisor import Process, SimHypervisor
from clusterd.sim.network import SimNetwork
from clusterd.sim.storage import SimStorage
from clusterd.sim.store import SimStore
from clusterd.sim.trace import line
from daemonkit.errors import InvariantBroken
from daemonkit.units import MILLISECOND, GiB

CLUSTER: Final = "sim"
STEPS_PER_INSTANT_MAX: Final = 100_000  # more events at one instant are a livelock
WRITE_INTERVAL_NS: Final = 100 * MILLISECOND
QUEUE_MAX: Final = 100_000


@attrs.define
class Host:
    """One machine. ``core`` None: its clusterd does not run. ``generation`` counts its starts."""

    name: str
    boot: int = 1
    document: bytes | None = None
    picture: bytes | None = None
    core: NodeCore | None = None
    generation: int = 0
    is_up: bool = True
    paused_at: int | None = None
    queue: list[events.Event] = attrs.field(factory=list)
    deadline_at: int | None = None
    hypervisor: SimHypervisor = attrs.field(factory=SimHypervisor)


@attrs.define
class World:
    """``cut_after``: crash-anywhere: called before each effect; True kills this clusterd there."""

    names: list[str]
    seed: int = 1
    now: int = 0
    randomness: random.Random = attrs.field(init=False)
    network: SimNetwork = attrs.field(init=False)
    store: SimStore = attrs.field(factory=SimStore)
    storage: SimStorage = attrs.field(factory=SimStorage)
    hosts: dict[str, Host] = attrs.field(init=False)
    carrier: Carrier = attrs.field(init=False)
    heap: list[tuple[int, int, Callable[[], None]]] = attrs.field(factory=list)
    pushed: int = 0
    steps: int = 0
    trace: list[str] = attrs.field(factory=list)
    noted: set[str] = attrs.field(factory=set)
    answers: dict[int, effects.AnswerCommand] = attrs.field(factory=dict)
    acknowledged: dict[str, int] = attrs.field(factory=dict)  # by image, counted by the guests
    cut_after: Callable[[Host, object], bool] | None = None
    node_memory_bytes: int = 4 * GiB
    write_interval_ns: int = WRITE_INTERVAL_NS

    def __attrs_post_init__(self) -> None:
        self.randomness = random.Random(self.seed)
        self.network = SimNetwork(random.Random(self.seed + 1))
        self.hosts = {name: Host(name) for name in self.names}
        self.carrier = Carrier(self)

    # -- time

    def at(self, when: int, action: Callable[[], None]) -> None:
        self.pushed += 1
        heapq.heappush(self.heap, (when, self.pushed, action))

    def after(self, delay_ns: int, action: Callable[[], None]) -> None:
        self.at(self.now + delay_ns, action)

    def run_until(self, when: int) -> None:
        """Everything up to and including ``when``."""
        instant, count = self.now, 0
        while self.heap and self.heap[0][0] <= when:
            at, _, action = heapq.heappop(self.heap)
            if at != instant:
                instant, count = at, 0
            count += 1
            if count > STEPS_PER_INSTANT_MAX:
                raise InvariantBroken(f"L1: more than {STEPS_PER_INSTANT_MAX} events at {at}")
            self.now = at
            self.steps += 1
            action()
        self.now = max(self.now, when)

    def run_for(self, duration_ns: int) -> None:
        self.run_until(self.now + duration_ns)

    def run_while(self, condition: Callable[[], bool], until: int, step_ns: int = 50 * MILLISECOND) -> bool:
        """Run until ``condition`` is no longer true, at most until then; whether it ended."""
        while condition():
            if self.now >= until:
                return False
            self.run_until(min(until, self.now + step_ns))
        return True

    # -- set-up

    def set_properties(self, texts: dict[str, str]) -> None:
        """Before the first start: as an operator would have set them."""
        if texts:
            key = prefix(CLUSTER) + "properties"
            put = effects.Put(key, encode_record(PropertyTexts(texts)))
            self.store.transact((), (put,), (), self.now)

    def start_all(self) -> None:
        for host in self.hosts.values():
            self.after(int(self.randomness.random() * 20 * MILLISECOND), lambda h=host: self.start(h))  # type: ignore[misc] # mypy cannot infer a lambda with a default

    def start(self, host: Host) -> None:
        """Start clusterd on a host that is up: state is read, the incarnation raised and made durable."""
        if host.core is not None or not host.is_up:
            return
        state = begin_incarnation(decode_state(host.document))
        host.document = encode_state(state)
        identity = Identity(
            host.name,
            CLUSTER,
            self.boot_id(host),
            (b"key of the simulation",),
            peers=tuple(name for name in self.names if name != host.name),
            memory_bytes=self.node_memory_bytes,
            vcpus=64,
            fresh_id=f"store-of-{host.name}",
        )
        host.generation += 1
        host.core = NodeCore(identity, state, decode_picture(host.picture) if host.picture else None)
        host.deadline_at = None
        self.deliver(host, events.Started(), host.generation)

    def boot_id(self, host: Host) -> str:
        return f"{host.name}-boot-{host.boot}"

    # -- events and effects

    def deliver(self, host: Host, event: events.Event, generation: int) -> None:
        """Feed an event to a clusterd, unless it has been replaced since."""
        core = host.core
        if core is None or host.generation != generation:
            return
        if host.paused_at is not None:
            if len(host.queue) < QUEUE_MAX:
                host.queue.append(event)
            return
        ready = core.handle(event, self.now)
        if ready is not effects.NOTHING:
            check_ready(core, ready)
            if ready.act:
                check_core(core)
            self.carry(host, ready)
        if host.core is core:
            self._arm(host, core)

    def _arm(self, host: Host, core: NodeCore) -> None:
        due = core.next_deadline()
        if due is None or due == host.deadline_at:
            return
        host.deadline_at = due
        generation = host.generation

        def fire() -> None:
            if host.deadline_at == due and host.generation == generation:
                host.deadline_at = None
                self.deliver(host, events.DeadlineReached(), generation)

        self.at(max(due, self.now), fire)

    def carry(self, host: Host, ready: effects.Ready) -> None:
        """Persist, send, act, one after the other; crash-anywhere may cut in before any of them."""
        for effect in ((ready.persist,) if ready.persist else ()) + ready.send + ready.act:
            if self.cut_after is not None and self.cut_after(host, effect):
                self.kill_clusterd(host)
                return
            self.carrier.carry(host, effect)
            if host.core is None:
                return

    def note(self, who: str, what: str, fields: dict[str, Any] | None = None) -> None:
        self.noted.add(what)
        self.trace.append(line(self.now, who, what, fields))

    # -- faults

    def kill_clusterd(self, host: Host) -> None:
        host.core, host.paused_at, host.deadline_at = None, None, None
        host.queue.clear()

    def power_off(self, host: Host) -> None:
        self.kill_clusterd(host)
        host.is_up = False
        host.hypervisor.processes.clear()

    def power_on(self, host: Host) -> None:
        if not host.is_up:
            host.is_up, host.boot = True, host.boot + 1
        self.start(host)

    def pause(self, host: Host, *, processes: bool) -> None:
        host.paused_at = self.now
        if processes:
            for process in host.hypervisor.processes.values():
                process.is_paused = True

    def resume(self, host: Host) -> None:
        """What came meanwhile is drained first, then the stall is measured, then time goes on."""
        for process in host.hypervisor.processes.values():
            process.is_paused = False
        if host.paused_at is None:
            return
        stalled, host.paused_at = self.now - host.paused_at, None
        queued, host.queue = host.queue, []
        datagrams = [event for event in queued if isinstance(event, events.DatagramReceived)]
        others = [event for event in queued if not isinstance(event, events.DatagramReceived)]
        for event in (*datagrams, events.LoopStalled(stalled), *others, events.DeadlineReached()):
            self.deliver(host, event, host.generation)

    def end_process(self, host: Host, process: Process, exit_code: int | None, reason: str) -> None:
        """The process is gone; clusterd hears of it, if it runs."""
        host.hypervisor.processes.pop(process.vm, None)
        ended = events.RunEnded(process.vm, process.epoch, exit_code, reason)
        generation = host.generation
        self.after(MILLISECOND, lambda: self.deliver(host, ended, generation))

    # -- operators and observers

    def command(self, node: str, command: Command) -> int:
        """Give a command to a node's clusterd; the ticket under which ``answers`` will have the answer."""
        self.pushed += 1
        ticket = self.pushed
        host = self.hosts[node]
        self.deliver(host, events.CommandGiven(ticket, command), host.generation)
        return ticket

    def statuses(self) -> dict[str, dict[str, Any]]:
        """The status documents of all clusterds that answer."""
        return {
            host.name: host.core.status(self.now)
            for host in self.hosts.values()
            if host.core is not None and host.paused_at is None
        }

    def processes_of(self, vm: str) -> list[tuple[Host, Process]]:
        """The truth: every live process of a VM, wherever it is."""
        return [
            (host, host.hypervisor.processes[vm])
            for host in self.hosts.values()
            if vm in host.hypervisor.processes
        ]

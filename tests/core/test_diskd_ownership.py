"""Who may open an image: the table, and the record, raced by several daemons and crashed at every step."""

import contextlib
from random import Random

import attrs
import pytest
from step_contract import steps

from diskd.core import lease, ownership
from diskd.core.lease import LeaseState
from diskd.core.ownership import Daemon, Lost, Owner
from diskd.core.steps import Create, Remove, Step
from diskd.errors import Damaged, Refused
from diskd.sim.disk import Crashed, SimDisk

ME = Daemon("n1", "host1", "machine1", "boot1", "run1")
AGAIN = attrs.evolve(ME, instance="run2")
AFTER_BOOT = attrs.evolve(ME, boot_id="boot2", instance="run2")
NEIGHBOUR = attrs.evolve(ME, name="n1b", instance="run3")
OTHER = Daemon("n2", "host2", "machine2", "boot9", "run4")
NAMESAKE = attrs.evolve(OTHER, name="n1")
CLONE = attrs.evolve(OTHER, machine_id="machine1")
REBOOTED_NEIGHBOUR = attrs.evolve(NEIGHBOUR, boot_id="boot0")


def record(daemon: Daemon, state: ownership.State = "serving") -> Owner:
    return Owner(7, state, daemon, 10**18)


@pytest.mark.parametrize(
    ("owner", "start", "opened", "fenced"),
    [
        (None, "open", "open", "open"),
        (record(ME), "open", "open", "open"),
        (record(AGAIN), "open", "open", "open"),
        (record(AFTER_BOOT), "open", "open", "open"),
        (record(ME, "closed"), "open", "open", "open"),
        (record(ME, "released"), "leave", "open", "open"),
        (record(OTHER, "released"), "leave", "open", "open"),
        (record(OTHER, "closed"), "leave", "open", "open"),
        (record(NAMESAKE, "closed"), "open", "open", "open"),  # a name that moved, after a clean stop
        (record(NEIGHBOUR), "leave", "open", "open"),
        (record(OTHER), "leave", "refuse_other_host", "open"),
        (record(NAMESAKE), "leave", "refuse_other_host", "open"),
        (record(CLONE), "leave", "refuse_other_host", "open"),
        (record(REBOOTED_NEIGHBOUR), "leave", "refuse_other_host", "refuse_other_host"),
    ],
)
def test_the_table(owner, start, opened, fenced):
    assert ownership.decide(owner, ME, lock_is_free=True, wish="start") == start
    assert ownership.decide(owner, ME, lock_is_free=True, wish="open") == opened
    assert ownership.decide(owner, ME, lock_is_free=True, wish="open", fenced="host2") == fenced
    assert ownership.decide(owner, ME, lock_is_free=True, wish="start", fenced="host2") == start
    # Whoever holds the lock lives, whatever the record and the operator say.
    assert ownership.decide(owner, ME, lock_is_free=False, wish="start") == "leave"
    for word in (None, "host1", "host2"):
        assert ownership.decide(owner, ME, lock_is_free=False, wish="open", fenced=word) == "refuse_held"


def test_another_hosts_name_is_no_word_on_this_one():
    for word in ("host1", "n2", "", "HOST2"):
        assert (
            ownership.decide(record(OTHER), ME, lock_is_free=True, wish="open", fenced=word)
            == "refuse_other_host"
        )


def test_a_proof_of_death_counts_for_that_very_boot():
    for owner, dead, verdict in (
        (record(OTHER), {"boot9"}, "open"),
        (record(NAMESAKE), {"boot9", "boot3"}, "open"),
        (record(OTHER), {"boot8"}, "refuse_other_host"),
        (record(OTHER), {"host2", "machine2"}, "refuse_other_host"),
        (record(OTHER), set(), "refuse_other_host"),
    ):
        decided = ownership.decide(owner, ME, lock_is_free=True, wish="open", dead_boots=dead)
        assert decided == verdict
        held = ownership.decide(owner, ME, lock_is_free=False, wish="open", dead_boots=dead)
        assert held == "refuse_held"


def test_a_refusal_names_the_holder_and_what_to_do():
    held = ownership.refusal("web", "refuse_held", record(OTHER), "10.0.0.2:10810", None)
    assert "served by diskd n2 on host host2 (since 2001-09-09 01:46:40Z, control 10.0.0.2:10810)" in held
    assert "diskctl --control 10.0.0.2:10810 image release web" in held
    away = ownership.refusal("web", "refuse_other_host", record(OTHER), None, None)
    assert "diskctl image open web --fenced host2" in away
    wrong = ownership.refusal("web", "refuse_other_host", record(OTHER), None, "host3")
    assert "--fenced host3 names another host than host2" in wrong
    assert "ask again" in ownership.refusal("web", "refuse_held", None, None, None)
    for text in (held, away, wrong):
        assert "\n" not in text


def test_the_record_reads_back_and_damage_is_seen():
    owner = attrs.evolve(record(ME), lease_sequence=3, lease_epoch=9)
    data = ownership.encode(owner)
    assert ownership.decode(data, 7) == owner
    with pytest.raises(Damaged):
        ownership.decode(data, 8)
    for place in range(len(data)):
        for flip in (0x01, 0x80):
            damaged = bytearray(data)
            damaged[place] ^= flip
            with pytest.raises(Damaged):
                ownership.decode(bytes(damaged), 7)
        with pytest.raises(Damaged):
            ownership.decode(data[:place], 7)
    for wrong in (
        attrs.evolve(owner, daemon=attrs.evolve(ME, name="No Name")),
        attrs.evolve(owner, daemon=attrs.evolve(ME, host="a\nb")),
        attrs.evolve(owner, daemon=attrs.evolve(ME, instance="")),
        attrs.evolve(owner, lease_epoch=-1),
        attrs.evolve(owner, state="sleeping"),
    ):
        with pytest.raises(Damaged):
            ownership.decode(ownership.encode(wrong), 7)


def test_each_change_is_the_next_number_and_sweeps_what_is_older():
    disk = SimDisk(Random(1))
    assert disk.run(ownership.load()) is None
    mine = disk.run(ownership.take(None, ME, 5))
    assert (mine.number, mine.state, disk.names()) == (1, "serving", ["owner.1"])
    mine = disk.run(ownership.note_lease(mine, 4, 11))
    assert disk.run(ownership.check(mine)) == mine
    mine = disk.run(ownership.leave(mine, "released"))
    assert disk.names() == ["owner.3"]
    taken = disk.run(ownership.take(disk.run(ownership.load()), OTHER, 6))
    assert (taken.daemon, taken.since_ns, taken.lease_sequence, taken.lease_epoch) == (OTHER, 6, 4, 11)
    with pytest.raises(Lost, match="diskd n2 on host host2"):
        disk.run(ownership.check(mine))
    with pytest.raises(Lost, match="diskd n2"):
        disk.run(ownership.note_lease(mine, 5, 12))
    disk.run(removed(taken))
    with pytest.raises(Lost, match="gone"):
        disk.run(ownership.check(taken))


def removed(owner: Owner):
    yield Remove(ownership.file_name(owner.number))


def test_a_newer_record_that_cannot_be_read_is_not_overruled():
    """Whoever has the image now: it is not the daemon whose record is no longer the newest."""
    disk = SimDisk(Random(1))
    mine = disk.run(ownership.take(None, ME, 5))
    disk.run(steps(Create(ownership.file_name(2), b"rot")))
    for script in (ownership.check(mine), ownership.note_lease(mine, 1, 1), ownership.leave(mine, "closed")):
        with pytest.raises(Lost, match=r"owner\.2 is damaged"):
            disk.run(script)
    assert disk.peek(ownership.file_name(2)) == b"rot"


def test_an_older_copy_in_place_of_the_record_is_not_believed():
    disk = SimDisk(Random(1))
    older = disk.run(ownership.take(None, ME, 5))
    mine = disk.run(ownership.note_lease(older, 4, 11))
    disk.run(removed(mine))
    disk.run(steps(Create(ownership.file_name(older.number), ownership.encode(older))))
    with pytest.raises(Lost, match="gone"):
        disk.run(ownership.check(mine))


def test_what_failed_after_it_was_written_is_not_somebody_elses():
    disk = SimDisk(Random(1))
    mine = disk.run(ownership.take(None, ME, 5))
    disk.run(ownership.note_lease(mine, 1, 1))  # its answer was lost: an error after the fact
    again = disk.run(ownership.check(mine))
    assert (again.number, again.lease_epoch) == (2, 1)
    last = disk.run(ownership.note_lease(mine, 2, 2))
    assert (last.number, last.lease_epoch, disk.names()) == (3, 2, ["owner.3"])


def test_one_that_slept_through_others_does_not_win():
    """It saw nothing; meanwhile others took the image, passed it on, and swept the numbers below."""
    disk = SimDisk(Random(1))
    first = disk.run(ownership.take(None, OTHER, 1))
    second = disk.run(ownership.note_lease(first, 1, 1))
    assert disk.names() == ["owner.2"]
    with pytest.raises(Lost, match="diskd n2"):
        disk.run(ownership.take(None, ME, 2))
    assert disk.names() == ["owner.2"]
    assert disk.run(ownership.check(second)) == second


def test_who_was_overtaken_finds_out_however_often_the_sweeping_was_cut_short():
    """Of two older records the one that its owner looks behind must not go first."""
    ends = 0
    for first in range(12):
        for second in range(12):
            disk = SimDisk(Random(1))
            mine = disk.run(ownership.take(None, ME, 1))
            for crash_at in (first, second):
                disk.crash_in = crash_at
                with contextlib.suppress(Crashed):
                    disk.run(ownership.take(disk.run(ownership.load()), OTHER, 2))
                disk.daemon_crash()
            newest = disk.run(ownership.load())
            assert newest is not None
            if newest.daemon == OTHER:
                ends += 1
                with pytest.raises(Lost, match="n2"):
                    disk.run(ownership.check(mine))
    assert ends > 100


def test_another_run_of_the_same_daemon_is_somebody_else():
    """It may live still, without its lock: on storage that passes none on, or under a cloned machine id."""
    disk = SimDisk(Random(1))
    mine = disk.run(ownership.take(None, ME, 1))
    taken = disk.run(ownership.take(mine, AGAIN, 2))
    for script in (ownership.check(mine), ownership.note_lease(mine, 1, 1), ownership.leave(mine, "closed")):
        with pytest.raises(Lost, match="n1"):
            disk.run(script)
    assert disk.run(ownership.check(taken)) == taken


class Racer:
    """One daemon's script, one step at a time."""

    def __init__(self, disk: SimDisk, me: Daemon) -> None:
        self.disk = disk
        self.me = me
        self.script = self._take()
        self.step: Step | None = next(self.script)
        self.owner: Owner | None = None
        self.lost = False

    def _take(self):
        found = yield from ownership.load()
        if ownership.decide(found, self.me, lock_is_free=True, wish="open", fenced="host2") != "open":
            raise Lost("not allowed")
        return (yield from ownership.take(found, self.me, 1))

    def advance(self) -> None:
        try:
            try:
                result = self.disk.execute(self.step)
            except OSError as error:
                self.step = self.script.throw(error)
            else:
                self.step = self.script.send(result)
        except StopIteration as stop:
            self.step, self.owner = None, stop.value
        except Lost:
            self.step, self.lost = None, True


@pytest.mark.parametrize("seed", range(60))
def test_of_several_at_once_the_newest_record_is_one_ones(seed):
    """Steps of all, in any order: at the end exactly one finds itself the owner, and the others know."""
    rng = Random(seed)
    disk = SimDisk(Random(seed))
    if seed % 3:
        disk.run(ownership.take(None, attrs.evolve(OTHER, instance="dead"), 0))
    racers = [Racer(disk, attrs.evolve(ME, name=f"r{number}", instance=f"r{number}")) for number in range(4)]
    while busy := [racer for racer in racers if racer.step is not None]:
        rng.choice(busy).advance()
    newest = disk.run(ownership.load())
    assert newest is not None
    still = []
    for racer in racers:
        assert racer.lost or racer.owner is not None
        if racer.owner is not None:
            try:
                still.append(disk.run(ownership.check(racer.owner)))
            except Lost:
                continue
    assert still == [newest]


@pytest.mark.parametrize("kind", ["power", "daemon"])
def test_a_crash_at_any_step_leaves_an_owner_and_never_a_lower_lease(kind):
    for crash_at in range(40):
        rng = Random(crash_at)
        disk = SimDisk(rng)
        disk.run(lease.persist(LeaseState()))
        answered = LeaseState()
        owner: Owner | None = None
        disk.crash_in = crash_at
        try:
            owner = disk.run(ownership.take(disk.run(ownership.load()), ME, 1))
            state = disk.run(lease.load())
            for epoch in range(1, 9):
                owner, state = disk.run(lease.change_owned(owner, state, lease.acquire, epoch, "n1/web"))
                answered = state
        except Crashed:
            pass
        disk.power_loss() if kind == "power" else disk.daemon_crash()
        found = disk.run(ownership.load())
        assert (found is None) <= (owner is None)
        state = disk.run(lease.load())
        assert state.epoch >= answered.epoch
        taken = disk.run(ownership.take(found, OTHER, 2))
        ownership.check_lease(taken, state.sequence, state.epoch)  # never wrongly called an older copy
        assert len([name for name in disk.names() if name.startswith("owner.")]) == 1


def test_an_older_copy_of_the_lease_is_known_as_one():
    disk = SimDisk(Random(1))
    disk.run(lease.persist(LeaseState()))
    owner, state = disk.run(ownership.take(None, ME, 1)), LeaseState()
    copies = []
    for decision, epoch in ((lease.acquire, 5), (lease.prepare, 6), (lease.release, 5), (lease.acquire, 6)):
        copies.append(disk.peek(lease.LEASE_FILE))
        owner, state = disk.run(lease.change_owned(owner, state, decision, epoch, "n1/web"))
    ownership.check_lease(owner, state.sequence, state.epoch)
    for copy in copies:
        older = lease.decode(copy)
        with pytest.raises(Damaged, match=r"older copy: it says epoch .*--lost-lease"):
            ownership.check_lease(owner, older.sequence, older.epoch)
    lost = lease.decode(disk.peek(lease.LEASE_FILE))
    owner, state = disk.run(lease.replace_lost(owner))
    with pytest.raises(Damaged, match="older copy"):  # found again after all, its epoch is over all the same
        ownership.check_lease(owner, lost.sequence, lost.epoch)
    assert disk.run(ownership.load()) == owner
    assert (state.epoch, state.is_free) == (6, True)
    ownership.check_lease(owner, state.sequence, state.epoch)
    with pytest.raises(Refused):
        lease.acquire(state, 6, "n1/web")
    assert lease.acquire(state, 7, "n1/web").epoch == 7
    assert disk.run(lease.load()) == state


def test_who_has_lost_the_image_cannot_change_its_lease():
    disk = SimDisk(Random(1))
    disk.run(lease.persist(LeaseState()))
    mine = disk.run(ownership.take(None, ME, 1))
    mine, state = disk.run(lease.change_owned(mine, LeaseState(), lease.acquire, 5, "n1/web"))
    theirs = disk.run(ownership.take(mine, OTHER, 2))
    theirs, newer = disk.run(lease.change_owned(theirs, state, lease.acquire, 6, "n2/web"))
    for decision, epoch in ((lease.acquire, 7), (lease.acquire, 5), (lease.release, 5)):
        with pytest.raises(Lost, match="n2"):
            disk.run(lease.change_owned(mine, state, decision, epoch, "n1/web"))
    assert disk.run(lease.load()) == newer

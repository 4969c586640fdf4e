"""The lease machine (S1): tables, and persistence crashed at every step."""

from random import Random

import pytest

from diskd.core import lease
from diskd.core.lease import EPOCH_MAX, Claim, LeaseState
from diskd.errors import Damaged, Fenced, Refused
from diskd.sim.disk import Crashed, SimDisk

FREE = LeaseState()
HELD = LeaseState(5, "n1/web")
RELEASED = LeaseState(5, "n1/web", released=True)
PREPARED = LeaseState(5, "n1/web", prepared=7, prepared_holder="n2/web")


@pytest.mark.parametrize(
    ("state", "epoch", "holder", "after"),
    [
        (FREE, 1, "a", LeaseState(1, "a")),
        (FREE, EPOCH_MAX, "a", LeaseState(EPOCH_MAX, "a")),
        (HELD, 6, "n2/web", LeaseState(6, "n2/web")),
        (HELD, 5, "n1/web", HELD),
        (RELEASED, 6, "n1/web", LeaseState(6, "n1/web")),
        (PREPARED, 7, "n2/web", LeaseState(7, "n2/web")),
        (PREPARED, 8, "n3/web", LeaseState(8, "n3/web")),
        (PREPARED, 6, "n3/web", LeaseState(6, "n3/web", prepared=7, prepared_holder="n2/web")),
        (PREPARED, 5, "n1/web", PREPARED),
    ],
)
def test_acquire(state, epoch, holder, after):
    assert lease.acquire(state, epoch, holder) == after


@pytest.mark.parametrize(
    ("state", "epoch", "holder"),
    [
        (HELD, 5, "n2/web"),  # the same epoch, another holder
        (HELD, 4, "n1/web"),  # lower, the same holder
        (HELD, 1, "n9/web"),
        (RELEASED, 5, "n1/web"),  # a delayed copy of an old request
        (PREPARED, 7, "n3/web"),  # prepared for somebody else
        (FREE, 0, "a"),
        (FREE, -1, "a"),
        (FREE, EPOCH_MAX + 1, "a"),
        (FREE, 1, ""),
        (FREE, 1, "a\nb"),
        (FREE, 1, "x" * 256),
    ],
)
def test_acquire_refused(state, epoch, holder):
    with pytest.raises(Refused):
        lease.acquire(state, epoch, holder)


def test_prepare_and_release():
    assert lease.prepare(HELD, 7, "n2/web") == PREPARED
    assert lease.prepare(PREPARED, 7, "n2/web") is PREPARED
    assert lease.prepare(PREPARED, 9, "n3/web").prepared == 9
    for state, epoch, holder in ((HELD, 5, "n1/web"), (PREPARED, 6, "x"), (PREPARED, 7, "x")):
        with pytest.raises(Refused):
            lease.prepare(state, epoch, holder)
    assert lease.release(HELD, 5, "n1/web") == RELEASED
    assert lease.release(RELEASED, 5, "n1/web") is RELEASED
    assert lease.release(PREPARED, 7, "n2/web") == HELD
    for epoch, holder in ((4, "n1/web"), (5, "n2/web"), (6, "n1/web")):
        with pytest.raises(Refused):
            lease.release(HELD, epoch, holder)


@pytest.mark.parametrize(
    ("state", "claim", "read", "write"),
    [
        (FREE, Claim(None, 0), None, None),
        (HELD, Claim(None, 0), Fenced, Fenced),
        (RELEASED, Claim(None, 0), Fenced, Fenced),  # leased and released since
        (RELEASED, Claim(None, 5), None, None),
        (HELD, Claim(5), None, None),
        (HELD, Claim(4), Fenced, Fenced),
        (HELD, Claim(6), Fenced, Fenced),
        (RELEASED, Claim(5), Fenced, Fenced),
        (PREPARED, Claim(5), None, None),
        (PREPARED, Claim(7), None, PermissionError),
        (LeaseState(7, "n2/web"), Claim(7), None, None),
        (LeaseState(7, "n2/web"), Claim(5), Fenced, Fenced),
    ],
)
def test_what_a_claim_may_do(state, claim, read, write):
    for check, error in ((lease.check_read, read), (lease.check_write, write)):
        if error is None:
            check(state, claim)
        else:
            with pytest.raises(error):
                check(state, claim)


def test_admission():
    assert lease.admit(FREE, None) == Claim(None, 0)
    assert lease.admit(RELEASED, None) == Claim(None, 5)
    assert lease.admit(HELD, 5) == Claim(5)
    assert lease.admit(PREPARED, 7) == Claim(7)
    for state, epoch in ((HELD, None), (HELD, 4), (HELD, 6), (RELEASED, 5), (FREE, 1), (PREPARED, 6)):
        with pytest.raises(Refused):
            lease.admit(state, epoch)


@pytest.mark.parametrize(
    ("text", "epoch"),
    [
        ("1", 1),
        (str(EPOCH_MAX), EPOCH_MAX),
        (str(EPOCH_MAX + 1), None),
        ("0", None),
        ("01", None),
        ("", None),
        ("+1", None),
        ("-1", None),
        (" 1", None),
        ("1_0", None),
        ("²", None),
        ("9" * 400, None),
    ],
)
def test_epochs_are_canonical_decimal(text, epoch):
    assert lease.parse_epoch(text) == epoch


@pytest.mark.parametrize("state", [FREE, HELD, RELEASED, PREPARED])
def test_the_file_reads_back_and_damage_is_seen(state):
    data = lease.encode(state)
    assert lease.decode(data) == state
    for place in range(len(data)):
        for flip in (0x01, 0x80):
            damaged = bytearray(data)
            damaged[place] ^= flip
            with pytest.raises(Damaged):
                lease.decode(bytes(damaged))
        with pytest.raises(Damaged):
            lease.decode(data[:place])


def test_a_missing_lease_file_is_damage():
    with pytest.raises(Damaged):
        SimDisk(Random(1)).run(lease.load())


@pytest.mark.parametrize("kind", ["power", "daemon"])
@pytest.mark.parametrize("seed", range(20))
def test_a_crash_at_any_step_never_takes_an_acknowledged_epoch_back(seed, kind):
    """Nothing is acknowledged before it is durable, and nothing else is durable either."""
    rng = Random(seed)
    for crash_at in range(12):
        disk = SimDisk(Random(seed * 100 + crash_at))
        disk.run(lease.persist(LeaseState()))
        state, acknowledged = LeaseState(), LeaseState()
        disk.crash_in = crash_at
        try:
            for _ in range(20):
                decision = rng.choice((lease.acquire, lease.acquire, lease.prepare, lease.release))
                epoch = rng.randrange(1, 12)
                try:
                    state = disk.run(lease.change(state, decision, epoch, f"n{epoch % 3}"))
                except Refused:
                    continue
                acknowledged = state
        except Crashed:
            pass
        disk.power_loss() if kind == "power" else disk.daemon_crash()
        found = disk.run(lease.load())
        assert found.epoch >= acknowledged.epoch
        assert found == acknowledged

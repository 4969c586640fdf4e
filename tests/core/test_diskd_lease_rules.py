"""Every transition of a lease from every kind of state, and how often a refused client is spoken of."""

import attrs
import pytest

from diskd.core import lease
from diskd.core.lease import LeaseState
from diskd.core.seldom import KEYS_MAX, Seldom
from diskd.errors import Refused

NONE = LeaseState()
HELD = LeaseState(5, "a")
FREE = LeaseState(5, "a", released=True)
AHEAD = LeaseState(5, "a", prepared=7, prepared_holder="b")
FREE_AHEAD = LeaseState(5, "a", released=True, prepared=7, prepared_holder="b")
NEW_AHEAD = LeaseState(prepared=7, prepared_holder="b")
STATES = {
    "none": NONE,
    "held": HELD,
    "free": FREE,
    "ahead": AHEAD,
    "free_ahead": FREE_AHEAD,
    "new_ahead": NEW_AHEAD,
}

# By state and call (epoch and holder): the state afterwards; what is not here is refused.
ACQUIRE = {
    ("none", 5, "a"): HELD,
    ("none", 7, "b"): LeaseState(7, "b"),
    ("held", 5, "a"): HELD,
    ("held", 6, "a"): LeaseState(6, "a"),
    ("held", 6, "b"): LeaseState(6, "b"),
    ("held", 7, "a"): LeaseState(7, "a"),
    ("held", 7, "b"): LeaseState(7, "b"),
    ("free", 6, "a"): LeaseState(6, "a"),
    ("free", 6, "b"): LeaseState(6, "b"),
    ("free", 7, "a"): LeaseState(7, "a"),
    ("free", 7, "b"): LeaseState(7, "b"),
    ("ahead", 5, "a"): AHEAD,
    # A run in between (the destination died, the source's host too): the prepared one stays ahead of it.
    ("ahead", 6, "a"): LeaseState(6, "a", prepared=7, prepared_holder="b"),
    ("ahead", 6, "b"): LeaseState(6, "b", prepared=7, prepared_holder="b"),
    ("ahead", 7, "b"): LeaseState(7, "b"),
    ("free_ahead", 6, "a"): LeaseState(6, "a", prepared=7, prepared_holder="b"),
    ("free_ahead", 6, "b"): LeaseState(6, "b", prepared=7, prepared_holder="b"),
    ("free_ahead", 7, "b"): LeaseState(7, "b"),
    ("new_ahead", 5, "a"): LeaseState(5, "a", prepared=7, prepared_holder="b"),
    ("new_ahead", 7, "b"): LeaseState(7, "b"),
}
PREPARE = {
    ("none", 7, "b"): NEW_AHEAD,
    ("held", 7, "b"): AHEAD,
    ("free", 7, "b"): FREE_AHEAD,
    ("ahead", 7, "b"): AHEAD,
    ("free_ahead", 7, "b"): FREE_AHEAD,
    ("new_ahead", 7, "b"): NEW_AHEAD,
}
RELEASE = {
    ("held", 5, "a"): FREE,
    ("free", 5, "a"): FREE,
    ("ahead", 5, "a"): FREE_AHEAD,
    ("ahead", 7, "b"): HELD,
    ("free_ahead", 5, "a"): FREE_AHEAD,
    ("free_ahead", 7, "b"): FREE,
    ("new_ahead", 7, "b"): NONE,
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("epoch", [4, 5, 6, 7])
@pytest.mark.parametrize("holder", ["a", "b"])
@pytest.mark.parametrize("verb", ["acquire", "prepare", "release"])
def test_every_transition(name, epoch, holder, verb):
    table = {"acquire": ACQUIRE, "prepare": PREPARE, "release": RELEASE}[verb]
    decision = {"acquire": lease.acquire, "prepare": lease.prepare, "release": lease.release}[verb]
    state = STATES[name]
    after = table.get((name, epoch, holder))
    # Any epoch above everything known is as good as any other; the tables name some.
    above = state.epoch < epoch and (state.prepared is None or epoch > state.prepared)
    if after is None and above and verb == "acquire":
        after = LeaseState(epoch, holder)
    if after is None and above and verb == "prepare":
        after = attrs.evolve(state, prepared=epoch, prepared_holder=holder)
    # Below what is prepared for another, and above what is held, is a run of its own.
    between = state.epoch < epoch and state.prepared is not None and epoch < state.prepared
    if after is None and between and verb == "acquire":
        after = LeaseState(epoch, holder, prepared=state.prepared, prepared_holder=state.prepared_holder)
    if after is None:
        with pytest.raises(Refused):
            decision(state, epoch, holder)
    else:
        assert decision(state, epoch, holder) == after


def test_a_live_migration_that_is_given_up_leaves_the_source_writing():
    state = lease.prepare(HELD, 7, "b")
    lease.check_write(state, lease.admit(state, 5))
    state = lease.release(state, 7, "b")
    assert state == HELD
    lease.check_write(state, lease.admit(state, 5))
    with pytest.raises(Refused):
        lease.admit(state, 7)


def test_what_is_said_seldom():
    seldom = Seldom(60)
    assert [seldom.ask("a", now) for now in (0, 1, 59)] == [0, None, None]
    assert seldom.ask("b", 59) == 0
    assert seldom.ask("a", 60) == 2
    assert seldom.ask("a", 119) is None
    assert seldom.ask("a", 500) == 1
    assert seldom.ask("a", 600) == 0


def test_many_different_things_are_not_said_either():
    seldom = Seldom(60)
    said = [seldom.ask(f"export-{number}", 5) for number in range(3 * KEYS_MAX)]
    assert said.count(0) == KEYS_MAX
    assert seldom.ask("another", 64) is None
    assert seldom.ask("another", 65) == 0

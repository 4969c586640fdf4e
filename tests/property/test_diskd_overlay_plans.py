"""What is decided in place is what the plan says; what is put together is what the script writes."""

from random import Random

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st

from diskd.core import avhd, overlay
from diskd.core.avhd import DATA, PARENT, ZERO, AvhdMap, Head
from diskd.core.merge import Merge
from diskd.core.steps import Read, Write

BLOCK = 512
BLOCKS = 60
SIZE = BLOCKS * BLOCK - 100
HEAD = Head("cp-0123456789abcdef", "uuid", SIZE, BLOCK, "0011223344556677", "live")
CHANGES = st.lists(
    st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, 20), st.sampled_from([PARENT, DATA, ZERO])),
    max_size=6,
)


def made(changes) -> AvhdMap:
    states = AvhdMap.empty(HEAD)
    for first, count, state in changes:
        states.set_range(first, min(count, BLOCKS - first), state)
    return states


@given(CHANGES, st.integers(0, BLOCKS - 1), st.data())
@settings(max_examples=150, deadline=None)
def test_uniform_is_one_run(changes, first, data):
    states = made(changes)
    count = data.draw(st.integers(1, BLOCKS - first))
    found = {states.state(block) for block in range(first, first + count)}
    assert states.uniform(first, count) == (found.pop() if len(found) == 1 else None)


@given(CHANGES, st.data())
@settings(max_examples=300, deadline=None)
def test_quick_agrees_with_the_plan(changes, data):
    states = made(changes)
    unit = data.draw(st.sampled_from([1, BLOCK]))
    offset = data.draw(st.integers(0, (SIZE - 1) // unit)) * unit
    length = min(data.draw(st.integers(1, 9)) * data.draw(st.sampled_from([1, 100, BLOCK])), SIZE - offset)
    merge = other = None
    if data.draw(st.booleans()):
        merge = Merge(states, 16)
        merge.start_batch()
        if data.draw(st.booleans()):
            merge.submit_clear()
        other = attrs.evolve(merge, batch=set(merge.batch))
    where = overlay.quick(states, merge, offset, length)
    pieces = overlay.plan_write(states, other, offset, length)
    if where is None:
        kinds = {piece.kind for piece in pieces or ()}
        bases = {piece.base for piece in pieces or ()}
        assert pieces is None or "copy_up" in kinds or len(bases) > 1
        return
    assert pieces is not None and {piece.kind for piece in pieces} == {where}
    if merge is not None and other is not None:
        assert merge.batch == other.batch, "the same blocks have left the batch"


@given(CHANGES, st.integers(0, SIZE - 1), st.data())
@settings(max_examples=150, deadline=None)
def test_in_place_writes_the_bytes_of_the_script(changes, offset, data):
    states = made(changes)
    content = Random(offset).randbytes(data.draw(st.integers(1, SIZE - offset)))
    parent = Random(7).randbytes(SIZE)
    pieces = overlay.plan_write(states, None, offset, len(content))
    assert pieces is not None
    by_script, in_place = bytearray(SIZE), bytearray(SIZE)
    script = overlay.write_avhd(states, pieces, offset, content)
    result = None
    try:
        while True:
            match script.send(result):
                case Write(avhd.DATA_FILE, start, part):
                    by_script[start : start + len(part)] = part
                    result = None
                case Read(avhd.PARENT_FILE, start, length):
                    result = parent[start : start + length]
    except StopIteration:
        pass
    around = {}
    for piece in pieces:
        if piece.kind == "copy_up" and piece.base == PARENT:
            start, length = overlay.block_range(states, piece)
            around[start] = parent[start : start + length]
    for start, part in overlay.assemble(states, pieces, offset, content, around):
        in_place[start : start + len(part)] = part
    assert in_place == by_script

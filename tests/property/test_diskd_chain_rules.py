"""The rules over chains against a naive model: whatever backups, prunes, syntheses, crashes and losses were,
every point that the rules call restorable restores to what the disks were at its cut, and nothing else.

Source and target are modelled by what the rules see of them: a source's points and changed blocks per image,
a target's manifests and what each file of a point holds. Everything is decided by the real rules.
"""

import attrs
import pytest
from diskd_manifests import manifest
from hypothesis import given, settings
from hypothesis import strategies as st

from diskd.core.catalog import (
    chain_of,
    check_incoming,
    commit_time,
    dependants,
    header_of,
    is_restorable,
    offered,
)
from diskd.core.copy_plan import SourceDisk, choose_base
from diskd.core.retention import Keep, plan_prune
from diskd.errors import Damaged, NoSuchPoint, Refused

BLOCKS = 8


class Image:
    """A live disk in blocks, and what has changed since each of its points."""

    def __init__(self, name):
        self.name, self.size, self.blocks = name, BLOCKS, {}
        self.changed = {}  # point -> blocks

    def write(self, block, value):
        if block < self.size:
            self.blocks[block] = value
            for changed in self.changed.values():
                changed.add(block)

    def resize(self, size):
        # What lies beyond a smaller end is gone; what a disk grows by counts as changed since every point.
        for block in range(min(size, self.size), max(size, self.size)):
            self.blocks.pop(block, None)
            for changed in self.changed.values():
                changed.add(block)
        self.size = size

    def content(self):
        return tuple(self.blocks.get(block, 0) for block in range(self.size))


class Target:
    """``files``: of each point, on what it was put, and what it holds of each disk; the model's own record,
    which no rule reads or writes. ``points``: its manifests, for the rules."""

    def __init__(self, name):
        self.name, self.points, self.files = name, {}, {}

    def chain(self, point):
        """The points below, itself first; None where one is missing or lacks a disk."""
        links = []
        while point is not None:
            if point not in self.files:
                return None
            links.append(point)
            point = self.files[point][0]
        disks = set(self.files[links[0]][1])
        return links if all(disks <= set(self.files[link][1]) for link in links) else None

    def restore(self, point):
        """As `target restore` reads: the newest file of the chain that has a block, within its size."""
        found = {}
        chain = self.chain(point)
        for name, (virtual_size, _) in self.files[point][1].items():
            content = [0] * virtual_size
            for link in reversed(chain):
                size, blocks = self.files[link][1][name]
                content = [value if block < size else 0 for block, value in enumerate(content)]
                for block, value in blocks.items():
                    if block < len(content):
                        content[block] = value
            found[name] = tuple(content)
        return found

    def synthesize(self, point):
        content = self.restore(point)
        self.files[point] = None, {name: (len(all_), dict(enumerate(all_))) for name, all_ in content.items()}
        self.points[point] = attrs.evolve(self.points[point], base=None, kind="full", synthetic=True)

    def remove(self, point):
        del self.points[point], self.files[point]


class Source:
    """One VM: its disks, and its points that wait for a target's word (B3)."""

    def __init__(self):
        self.images = {name: Image(name) for name in ("a", "b")}
        self.disks = {"one": "a"}
        self.pending = {}  # point -> target

    def forget(self, point):
        for image in self.images.values():
            image.changed.pop(point, None)

    def settle(self, target):
        for point in [point for point, at in self.pending.items() if at is target]:
            del self.pending[point]
            if point not in target.points:
                self.forget(point)

    def at_source(self):
        return {
            name: SourceDisk(image, [p for p in self.images[image].changed if p not in self.pending])
            for name, image in self.disks.items()
        }


class World:
    def __init__(self):
        self.sources = [Source(), Source()]
        self.targets = [Target("t1"), Target("t2")]
        self.truth, self.count = {}, 0
        self.lost = set()

    def backup(self, source, target, mode, since, outcome):
        """``outcome``: "kept", "unacknowledged" (committed, B3), or "failed" (anywhere before the commit)."""
        source.settle(target)
        at_target = offered(target.points)
        if mode == "auto" and not at_target and target.points:
            return self.refused(source, target, None)
        try:
            base = choose_base(mode, since, at_target=at_target, at_source=source.at_source())
        except NoSuchPoint:
            return self.refused(source, target, since)
        self.count += 1
        new = manifest(self.count, disks=tuple(source.disks), at=commit_time("2026-01-01", target.points))
        disks = [
            attrs.evolve(
                disk, image=source.disks[disk.name], virtual_size=source.images[source.disks[disk.name]].size
            )
            for disk in new.disks
        ]
        kind = "full" if base is None else "differential"
        new = attrs.evolve(new, base=base, kind=kind, disks=disks)
        header = attrs.evolve(
            header_of(new, config=""),
            disks=[attrs.evolve(d, size_bytes=d.size_bytes << 20) for d in header_of(new, config="").disks],
        )
        check_incoming(header, target.points)
        files = {}
        for name, image_name in source.disks.items():
            image = source.images[image_name]
            blocks = set(range(image.size)) if base is None else image.changed[base]
            files[name] = (image.size, {b: image.blocks.get(b, 0) for b in blocks if b < image.size})
        self.truth[new.point] = {name: source.images[i].content() for name, i in source.disks.items()}
        for image_name in source.disks.values():
            source.images[image_name].changed[new.point] = set()
        if outcome != "failed":
            target.points[new.point], target.files[new.point] = new, (base, files)
        if outcome == "failed":
            source.forget(new.point)
        elif outcome == "unacknowledged":
            source.pending[new.point] = target
        return base is None and mode == "auto" and bool(at_target)

    def refused(self, source, target, since):
        """A refusal is right: there is no point that both sides hold for all disks as they are now."""
        known = source.at_source()
        for point in [since] if since else list(target.points):
            if point in target.points and is_restorable(target.points, point):
                images = {disk.name: disk.image for disk in target.points[point].disks}
                assert any(
                    point not in disk.points or images.get(name) != disk.image for name, disk in known.items()
                )
        return False

    def prune(self, target, keep, crash_after):
        whole = [point for point in target.points if target.chain(point)]
        plan = plan_prune(target.points, keep)
        steps = [(target.synthesize, p) for p in plan.synthesize] + [(target.remove, p) for p in plan.remove]
        for step, point in steps[:crash_after]:
            if step == target.remove:
                assert dependants(target.points, point) == []
            step(point)
            self.check()
            # What is left of what was whole is whole; the newest of it are left, whenever it crashed.
            assert all(target.chain(other) for other in whole if other in target.points)
            assert set(whole[-keep.last :]) <= set(target.points)
        if crash_after >= len(steps):
            assert [point for point in target.points if target.chain(point)] == whole[
                -keep.last :
            ] or self.lost

    def check(self):
        for target in self.targets:
            for point in target.points:
                chain = target.chain(point)
                assert is_restorable(target.points, point) == (chain is not None)
                if chain:
                    assert [link.point for link in chain_of(target.points, point)] == chain
                    assert target.restore(point) == self.truth[point]
                else:
                    # Only what a lost point took with it.
                    with pytest.raises(Damaged):
                        chain_of(target.points, point)
                    assert self.lost
            assert all(is_restorable(target.points, p.point) for p in offered(target.points))


# Mostly one source and one target: what needs a history of several steps should not be rare.
WHO = st.sampled_from([0, 0, 0, 0, 1, 2, 3])
POINT = st.integers(1, 4)
LAYOUTS = [{"one": "a"}, {"one": "a", "two": "b"}, {"one": "b", "two": "a"}, {"two": "b"}]
WRITE = st.tuples(st.just("write"), WHO, st.sampled_from("ab"), st.integers(0, 11), st.integers(1, 99))
BACKUP = st.tuples(
    st.just("backup"),
    WHO,
    WHO,
    st.sampled_from(["auto", "auto", "auto", "full", "since", "since"]),
    POINT,
    st.sampled_from(["kept", "kept", "kept", "unacknowledged", "failed"]),
)
RARE = st.one_of(
    st.tuples(st.just("resize"), WHO, st.sampled_from("ab"), st.integers(1, 12)),
    st.tuples(st.just("disks"), WHO, st.sampled_from(LAYOUTS)),
    st.tuples(st.just("disks"), WHO, st.sampled_from(LAYOUTS[1:3])),
    st.tuples(st.just("prune"), WHO, st.integers(1, 3), st.integers(0, 8)),
    st.tuples(st.just("synthesize"), WHO, POINT),
    st.tuples(st.just("source_loses"), WHO, st.sampled_from("ab"), POINT),
    st.tuples(st.just("target_loses"), WHO, POINT),
)
ACTIONS = st.one_of(WRITE, BACKUP, BACKUP, RARE)


def point_name(number):
    return f"rp-{number:016x}"


@settings(max_examples=1000, deadline=None)
@given(st.lists(ACTIONS, min_size=8, max_size=30))
def test_every_restorable_point_is_what_the_disks_were(actions):
    world = World()
    for verb, who, *rest in actions:
        source, target = world.sources[who % 2], world.targets[who // 2]
        if verb == "write":
            image, block, value = rest
            source.images[image].write(block, value)
        elif verb == "resize":
            source.images[rest[0]].resize(rest[1])
        elif verb == "disks":
            source.disks = dict(rest[0])
        elif verb == "backup":
            to, mode, number, outcome = rest
            silent_full = world.backup(
                source, world.targets[to % 2], mode, point_name(number) if mode == "since" else None, outcome
            )
            assert not silent_full, "never a full that was not asked for (T4)"
        elif verb == "prune" and target.points:
            world.prune(target, Keep(last=rest[0]), rest[1])
        elif verb == "synthesize":
            point = point_name(rest[0])
            if point in target.points and is_restorable(target.points, point):
                target.synthesize(point)
        elif verb == "source_loses":
            source.images[rest[0]].changed.pop(point_name(rest[1]), None)
        elif verb == "target_loses" and point_name(rest[0]) in target.points:
            target.remove(point_name(rest[0]))
            world.lost.add(point_name(rest[0]))
        world.check()


def test_the_model_notices_a_wrong_chain():
    """Were a differential put on another base than its own, the check would fail."""
    world = World()
    source, target = world.sources[0], world.targets[0]
    source.images["a"].write(1, 11)
    world.backup(source, target, "auto", None, "kept")
    source.images["a"].write(1, 12)
    world.backup(source, target, "full", None, "kept")
    source.images["a"].write(2, 13)
    world.backup(source, target, "auto", None, "kept")
    world.check()
    newest = target.points[point_name(3)]
    assert newest.base == point_name(2)
    target.points[newest.point] = attrs.evolve(newest, base=point_name(1))
    with pytest.raises(AssertionError):
        world.check()


def test_a_target_that_lost_all_good_points_is_not_given_a_silent_full():
    world = World()
    source, target = world.sources[0], world.targets[0]
    world.backup(source, target, "auto", None, "kept")
    world.backup(source, target, "auto", None, "kept")
    target.remove(point_name(1))
    world.lost.add(point_name(1))
    world.backup(source, target, "auto", None, "kept")
    assert list(target.points) == [point_name(2)]
    with pytest.raises(Refused):
        chain_of(target.points, point_name(1))

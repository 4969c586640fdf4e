"""A recovery's plan against a naive model of the truth: what lives is never freed, and no epoch comes again.

The model draws what really happened to each VM (runs, one after the other, each with a greater epoch), who of
the nodes is asked, and how far behind the newest picture is. What must hold of the plan is then said from the
truth alone.
"""

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterd.core import records
from clusterd.core import testimony as t
from clusterd.core.picture import Picture
from clusterd.core.recovery import Evidence, Plan, Request, plan
from clusterd.core.store_identity import Marks
from clusterd.core.types import FINAL_RUN_STATES, UNSTARTED_RUN_STATES, Disk, VmConfig
from clusterd.core.vm_fate import LeaseSeen

NODES = ("n1", "n2", "n3", "n4")
PREFIX = "/holdfast/p/"


@attrs.frozen
class Truth:
    """``runs``: (node, epoch), in order. ``lives``: the last is alive. ``fenced``: so is the one before,
    though its leases are gone. ``begun``: a start of this (node, epoch) leased the first disk only.
    ``known``: how many of the runs the picture knows, and ``is_recorded`` whether it knows that the last of
    them ended. ``is_bare``: it knows the assignment of that one, but nothing of the run."""

    config: VmConfig
    runs: tuple[tuple[str, int], ...]
    lives: bool
    fenced: bool
    begun: tuple[str, int] | None
    known: int
    is_recorded: bool
    released: bool
    is_bare: bool = False


@st.composite
def truths(draw: st.DrawFn) -> tuple[list[Truth], frozenset[str], bool]:
    epoch, found = 0, []
    for number in range(draw(st.integers(1, 3))):
        disks = draw(st.integers(0, 2))
        runs = []
        for node in draw(st.lists(st.sampled_from(NODES), max_size=3)):
            epoch += draw(st.integers(1, 3))
            runs.append((node, epoch))
        config = VmConfig(
            f"vm{number}",
            argv=("guest",),
            stateless=disks == 0 and draw(st.booleans()),
            disks=tuple(Disk(f"d{i}", f"vm{number}-{i}") for i in range(disks)),
        )
        lives = bool(runs) and draw(st.booleans())
        begun = None
        if disks == 2 and runs and draw(st.booleans()):
            epoch += 1
            begun = (draw(st.sampled_from(NODES)), epoch)
        known = draw(st.integers(0, len(runs)))
        ended = known < len(runs) or not lives
        fenced = disks > 0 and len(runs) > 1 and runs[-2][0] != runs[-1][0] and draw(st.booleans())
        found.append(
            Truth(
                config,
                tuple(runs),
                lives,
                fenced,
                begun,
                known,
                ended and draw(st.booleans()),
                not lives and begun is None and draw(st.booleans()),
                draw(st.booleans()),
            )
        )
    asked = frozenset({"n1"}) | draw(st.frozensets(st.sampled_from(NODES)))
    return found, asked, draw(st.booleans())


def live_runs(truth: Truth) -> list[tuple[str, int]]:
    live = [truth.runs[-1]] if truth.lives else []
    return live + ([truth.runs[-2]] if truth.fenced else [])


def leases(truth: Truth) -> list[LeaseSeen]:
    if not truth.runs:
        return []
    node, epoch = truth.runs[-1]
    holder = None if truth.released else f"{node}/{truth.config.name}"
    found = [LeaseSeen("main", disk.image, epoch, holder) for disk in truth.config.disks]
    if truth.begun is not None:
        holder = f"{truth.begun[0]}/{truth.config.name}"
        found[0] = LeaseSeen("main", truth.config.disks[0].image, truth.begun[1], holder)
    return found


def picture(found: list[Truth]) -> Picture:
    values: dict[str, object] = {f"members/{node}": records.Member(node) for node in NODES}
    newest = 0
    for truth in found:
        head = f"vms/{truth.config.name}"
        values[f"{head}/spec"] = records.VmSpec(truth.config)
        if truth.known:
            node, epoch = truth.runs[truth.known - 1]
            newest = max(newest, epoch)
            state = "failed" if truth.is_recorded else "online"
            leased = len(truth.config.disks)
            values[f"{head}/assignment"] = records.Assignment(node, epoch)
            if truth.is_bare:
                continue
            values[f"{head}/run"] = records.Run(node, epoch, state, f"{node}-boot", leased=leased)
    values["epoch"] = records.EpochCounter(newest)
    kept = tuple((key, records.encode_record(value)) for key, value in sorted(values.items()))
    return Picture("c", 0, 50, kept)


def evidence(found: list[Truth], asked: frozenset[str], has_picture: bool) -> Evidence:
    testimonies = {}
    for node in sorted(asked):
        runs = tuple(
            t.LiveRun(truth.config, epoch, "online", f"{node}-boot", 100 + epoch)
            for truth in found
            for on, epoch in live_runs(truth)
            if on == node
        )
        testimonies[node] = t.Testimony(node, f"{node}-boot", "c", False, 0, "", 0, runs)
    return Evidence(
        "n1",
        Marks("c", 0, 60),
        testimonies,
        {node: "it does not answer" for node in NODES if node not in asked},
        picture(found) if has_picture else None,
        tuple(lease for truth in found for lease in leases(truth)),
        {},
        PREFIX,
        1,
        (),
    )


def is_free(made: Plan, vm: str) -> bool:
    """Whether the leader would start it somewhere without waiting for anything."""
    spec = records.decode_record(records.VmSpec, vm, made.records[f"vms/{vm}/spec"])
    if spec.desired == "offline" or f"vms/{vm}/doubt" in made.records:
        return False
    if f"vms/{vm}/assignment" not in made.records or f"vms/{vm}/run" not in made.records:
        return True
    run = records.decode_record(records.Run, vm, made.records[f"vms/{vm}/run"])
    return run.state in (*FINAL_RUN_STATES, *UNSTARTED_RUN_STATES)


def is_known(truth: Truth, asked: frozenset[str], has_picture: bool) -> bool:
    return has_picture or any(node in asked for node, _ in live_runs(truth))


@settings(max_examples=300)
@given(truths())
def test_what_lives_is_never_freed_and_no_epoch_comes_again(
    drawn: tuple[list[Truth], frozenset[str], bool],
) -> None:
    found, asked, has_picture = drawn
    told = evidence(found, asked, has_picture)
    request = Request(without=tuple(node for node in NODES if node not in asked))
    made = plan(told, request)
    assert made.digest == plan(told, request).digest
    for key, value in made.records.items():
        kind = records.kind_of(key)
        assert kind is not None
        records.decode_record(kind, key, value)
    for truth in found:
        epochs = [epoch for _, epoch in truth.runs]
        if truth.begun is not None:
            epochs.append(truth.begun[1])
        if truth.config.disks or (has_picture and truth.known == len(truth.runs)):
            assert made.epoch > max(epochs, default=0)
        if is_known(truth, asked, has_picture):
            judge(truth, made, asked)


def judge(truth: Truth, made: Plan, asked: frozenset[str]) -> None:
    """What the truth demands of this VM's fate."""
    vm, fate = truth.config.name, made.fates[truth.config.name]
    place = fate.assignment and (fate.assignment.owner, fate.assignment.epoch)
    # A run that is fenced on all its disks, and that nobody tells of, hinders nobody.
    if truth.lives or any(node in asked for node, _ in live_runs(truth)):
        could_hide = not truth.config.disks and truth.config.stateless
        assert could_hide or not is_free(made, vm)
    if fate.assignment is not None and place in truth.runs:
        # An epoch is one process: one that was used is nobody's to start.
        assert fate.run is not None and fate.run.state not in UNSTARTED_RUN_STATES
    if not truth.config.disks and not truth.config.stateless and truth.lives:
        node, epoch = truth.runs[-1]
        assert place == (node, epoch) if node in asked else node in fate.doubts
    if truth.lives:
        node, epoch = truth.runs[-1]
        begun_elsewhere = truth.begun is not None and truth.begun[0] not in asked
        if begun_elsewhere:
            assert place == truth.begun
        elif node in asked or truth.config.disks:
            assert place == (node, epoch)
            assert fate.kind == ("lives" if node in asked else "elsewhere")
    elif not truth.fenced and asked == frozenset(NODES):
        assert fate.kind in ("ended", "unstarted")
        assert is_free(made, vm)

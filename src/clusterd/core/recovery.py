"""What a lost store is rebuilt to: a pure plan from what nodes and diskd tell (S6).

Theory of operation. The *base* is the newest picture that anybody kept of this store, or what is left in it.
The runs are the truth about the VMs (``vm_fate``): the base only fills in what no run or lease says. Nothing
is concluded from silence: who does not answer must be named by the operator (``without``), and what may live
there keeps the VM. The epoch counter goes above everything seen by anybody, by more than any silent node
can have seen meanwhile.

A plan is refused for a store that is good, for one of another cluster (unless its id is named), and while
somebody is silent who was not named. The same evidence gives the same plan, byte for byte (``digest``): what
an operator was shown is what is done. ``rebuilding`` carries it out.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any, Final

import attrs

from clusterd.core import records
from clusterd.core.events import StoreEntry
from clusterd.core.picture import Picture, is_kept
from clusterd.core.store_identity import GOOD, Marks, StoreHead, judge_store, read_head
from clusterd.core.testimony import Testimony
from clusterd.core.types import FINAL_RUN_STATES, Desired, Disk, VmConfig
from clusterd.core.vm_fate import Fate, Known, LeaseSeen, node_of, vm_fate
from clusterd.errors import Refused

EPOCH_MARGIN: Final = 1 << 16  # more starts than a node can have seen that the asked ones have not
DROPPED_HEADS: Final = ("presence/",)  # kept for the boot ids only


@attrs.frozen
class Request:
    """``without``, ``without_diskd``: whom not to wait for. ``replace_id``: of the foreign store that may be
    overwritten."""

    without: tuple[str, ...] = ()
    without_diskd: tuple[str, ...] = ()
    replace_id: str | None = None


@attrs.frozen
class Evidence:
    """``silent``: configured peers that told nothing, and why. ``silent_diskds``: likewise those that have
    images of VMs. ``picture``: the newest of all answering nodes. ``entries``: what the store holds now."""

    asked: str
    marks: Marks
    testimonies: dict[str, Testimony]
    silent: dict[str, str]
    picture: Picture | None
    leases: tuple[LeaseSeen, ...]
    silent_diskds: dict[str, str]
    prefix: str
    revision: int
    entries: tuple[StoreEntry, ...]


@attrs.frozen
class Plan:
    """``records``: what the store shall hold, key (without prefix) to value, but for ``id`` and what tells of
    the recovery itself. ``base``: where what the runs do not say comes from."""

    store_id: str
    number: int
    epoch: int
    condition: str
    base: str
    fates: dict[str, Fate]
    records: dict[str, bytes] = attrs.field(repr=False)
    warnings: tuple[str, ...]
    without: tuple[str, ...]
    answered: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Equal for equal plans."""
        parts = [self.store_id, str(self.number), self.condition, *self.without, *self.answered]
        document = json.dumps([parts, {key: value.decode() for key, value in sorted(self.records.items())}])
        return hashlib.blake2b(document.encode(), digest_size=16).hexdigest()


def newest_picture(found: Iterable[Picture | None]) -> Picture | None:
    """Of these pictures of one cluster."""
    return max((one for one in found if one is not None), key=lambda one: one.age_key, default=None)


def disks_of(evidence: Evidence) -> tuple[Disk, ...]:
    """All disks of which diskd is to be asked: those of the base's VMs and of the runs."""
    base, _ = _base(evidence, read_head(evidence.prefix, evidence.entries))
    view = _Base.of(base)
    configs = [view.parsed[f"vms/{vm}/spec"].config for vm in view.vms()]
    configs += [run.config for told in evidence.testimonies.values() for run in told.runs]
    return tuple(sorted({disk for config in configs for disk in config.disks}))


def plan(evidence: Evidence, request: Request) -> Plan:
    """The plan, or Refused with the reason and what to do."""
    head = read_head(evidence.prefix, evidence.entries)
    condition = _check_store(evidence, head, request)
    base, said = _base(evidence, head)
    view = _Base.of(base)
    evidence = _without_the_forgetful(evidence, view)
    _check_silent(evidence, request, view)
    configs, desired, warnings = _specifications(evidence, view)
    asked = {name: testimony.boot_id for name, testimony in sorted(evidence.testimonies.items())}
    epoch = _newest_epoch(evidence, head, view) + EPOCH_MARGIN
    told = (t.recovery for t in evidence.testimonies.values())
    number = max([head.recovery, evidence.marks.recovery, *told]) + 1
    # A boot that is not known has a word of its own, which no proof of before can be about.
    boots = {name: view.parsed[f"presence/{name}"].boot_id for name in view.named("presence")}
    unasked = {name: boots.get(name, f"unknown-{number}") for name in sorted(request.without)}
    fates: dict[str, Fate] = {}
    for vm, config in sorted(configs.items()):
        known = _known(evidence, view, vm, config, desired[vm])
        fates[vm] = vm_fate(known, asked, unasked)
        warnings += [f"VM {vm}: {text}" for text in fates[vm].warnings]
    return Plan(
        evidence.marks.store_id or "",
        number,
        epoch,
        condition,
        said,
        fates,
        _records(view, configs, fates, epoch) | _unsettled(evidence, fates, unasked, epoch),
        tuple(warnings),
        tuple(sorted(request.without)),
        tuple(asked),
    )


def _check_store(evidence: Evidence, head: StoreHead, request: Request) -> str:
    marks = evidence.marks
    if marks.store_id is None:
        raise Refused(f"{evidence.asked} knows no store so far: ask a node that has been in the cluster")
    condition, why = judge_store(marks, head, evidence.revision)
    if condition in GOOD:
        raise Refused("the store is good: there is nothing to recover")
    if condition == "foreign" and head.id != marks.store_id and request.replace_id != head.id:
        raise Refused(f"{why}; to overwrite that cluster's records for good: --replace {head.id}")
    for name, testimony in sorted(evidence.testimonies.items()):
        if testimony.store_id not in (None, marks.store_id):
            raise Refused(
                f"{name} knows another cluster id ({testimony.store_id}): stop its clusterd (VMs go on), make"
                f" sure that no VM of it runs, remove its state.json, and recover --without {name}"
            )
        if testimony.store_known and testimony.store_id is not None:
            raise Refused(
                f"{name} uses this store, and takes it for good: stop its clusterd (VMs go on), and recover"
                f" --without {name}"
            )
    return condition


def _base(evidence: Evidence, head: StoreHead) -> tuple[Picture | None, str]:
    """The newest picture of this cluster's own store, and where it is from."""
    found: list[tuple[Picture, str]] = []
    own = evidence.marks.store_id
    if evidence.picture is not None and evidence.picture.store_id == own:
        found.append((evidence.picture, "the newest picture that a node kept"))
    inside = tuple(
        (entry.key[len(evidence.prefix) :], entry.value)
        for entry in sorted(evidence.entries, key=lambda entry: entry.key)
        if is_kept(entry.key[len(evidence.prefix) :])
    )
    rest = head.recovering
    if own is not None and head.id == own:
        found.append((Picture(own, head.recovery, evidence.revision, inside), "what the store holds"))
    elif own is not None and rest is not None and rest.base_id == own:
        held = Picture(own, rest.base_number, rest.base_revision, inside)
        found.append((held, "what the store holds, in part rebuilt already"))
    if not found:
        return None, "nothing but the runs: no node kept a picture of the store"
    picture, said = max(found, key=lambda pair: pair[0].age_key)
    return picture, f"{said} (revision {picture.revision})"


@attrs.frozen
class _Base:
    """The base, parsed."""

    values: dict[str, bytes]
    parsed: dict[str, Any]

    @classmethod
    def of(cls, picture: Picture | None) -> "_Base":
        values = dict(picture.records) if picture else {}
        kinds = {key: kind for key in values if (kind := records.kind_of(key)) is not None}
        return cls(values, {key: records.decode_record(kinds[key], key, values[key]) for key in kinds})

    def named(self, folder: str) -> list[str]:
        return [key[len(folder) + 1 :] for key in self.parsed if key.startswith(f"{folder}/")]

    def vms(self) -> list[str]:
        return [key[4:-5] for key in self.parsed if key.startswith("vms/") and key.endswith("/spec")]


def _without_the_forgetful(evidence: Evidence, base: _Base) -> Evidence:
    """A member whose state file is new does not know what it ran: its word that nothing lives is none."""
    members = base.named("members")
    forgetful = {n for n, t in evidence.testimonies.items() if t.store_id is None and n in members}
    why = "its state file is new: it does not know what runs there"
    return attrs.evolve(
        evidence,
        testimonies={n: t for n, t in evidence.testimonies.items() if n not in forgetful},
        silent=evidence.silent | dict.fromkeys(forgetful, why),
    )


def _check_silent(evidence: Evidence, request: Request, base: _Base) -> None:
    """S2, S6: whoever may run something is asked, or named by the operator."""
    for name in request.without:
        if name in evidence.testimonies:
            raise Refused(f"{name} answers: leave out --without {name}")
    unnamed = f"it is a member, but the configuration of {evidence.asked} names no such peer"
    expected = dict.fromkeys(base.named("members"), unnamed)
    for vm in base.vms():
        assignment, run = base.parsed.get(f"vms/{vm}/assignment"), base.parsed.get(f"vms/{vm}/run")
        is_over = assignment and run and run.epoch == assignment.epoch and run.state in FINAL_RUN_STATES
        if assignment is not None and not is_over:
            expected.setdefault(assignment.owner, f"VM {vm} is assigned to it")
        doubt = base.parsed.get(f"vms/{vm}/doubt")
        for node in doubt.nodes if doubt is not None else ():
            expected.setdefault(node, f"VM {vm} may live on it, unseen since an earlier recovery")
    for lease in evidence.leases:
        holder = node_of(lease.holder)
        if holder is not None:
            expected.setdefault(holder, f"it holds the lease of image {lease.image}")
    expected |= evidence.silent
    missing = {
        n: why for n, why in expected.items() if n not in evidence.testimonies and n not in request.without
    }
    if missing:
        told = "; ".join(f"{name}: {why}" for name, why in sorted(missing.items()))
        names = " ".join(f"--without {name}" for name in sorted(missing))
        raise Refused(
            f"not every node tells what runs on it ({told}): bring it back, or recover {names}: what may run"
            " there then stays assigned to it"
        )
    silent = {n: why for n, why in evidence.silent_diskds.items() if n not in request.without_diskd}
    if silent:
        told = "; ".join(f"{name}: {why}" for name, why in sorted(silent.items()))
        names = " ".join(f"--without-diskd {name}" for name in sorted(silent))
        raise Refused(f"diskd does not tell who holds its images ({told}): bring it back, or recover {names}")


def _specifications(
    evidence: Evidence, base: _Base
) -> tuple[dict[str, VmConfig], dict[str, Desired], list[str]]:
    configs: dict[str, VmConfig] = {}
    desired: dict[str, Desired] = {}
    warnings: list[str] = []
    for vm in base.vms():
        spec = base.parsed[f"vms/{vm}/spec"]
        configs[vm], desired[vm] = spec.config, spec.desired
    newest: dict[str, int] = {}
    for name, testimony in sorted(evidence.testimonies.items()):
        for run in testimony.runs:
            vm = run.config.name
            if vm in base.vms() or run.epoch < newest.get(vm, 0):
                continue
            if vm not in configs:
                warnings.append(
                    f"VM {vm} is known only by its run on {name}: its specification is that run's"
                )
            configs[vm], desired[vm], newest[vm] = run.config, "online", run.epoch
    return configs, desired, warnings


def _known(evidence: Evidence, base: _Base, vm: str, config: VmConfig, desired: Desired) -> Known:
    images = {(disk.diskd, disk.image) for disk in config.disks}
    lives = [
        (name, run)
        for name, testimony in sorted(evidence.testimonies.items())
        for run in testimony.runs
        if run.config.name == vm
    ]
    for _, run in lives:
        images |= {(disk.diskd, disk.image) for disk in run.config.disks}
    leases = tuple(lease for lease in evidence.leases if (lease.diskd, lease.image) in images)
    assignment, run_ = base.parsed.get(f"vms/{vm}/assignment"), base.parsed.get(f"vms/{vm}/run")
    if assignment is None or (run_ is not None and run_.epoch != assignment.epoch):
        run_ = None
    boots = {name: base.parsed[f"presence/{name}"].boot_id for name in base.named("presence")}
    is_seen = all(diskd not in evidence.silent_diskds for diskd, _ in images)
    return Known(config, desired, assignment, run_, tuple(lives), leases, is_seen=is_seen, boots=boots)


def _newest_epoch(evidence: Evidence, head: StoreHead, base: _Base) -> int:
    """The newest epoch that anybody has seen anywhere."""
    seen = [evidence.marks.epoch, head.epoch, *(lease.epoch for lease in evidence.leases)]
    for testimony in evidence.testimonies.values():
        seen += [testimony.epoch, *(run.epoch for run in testimony.runs)]
    inside = {e.key[len(evidence.prefix) :]: e.value for e in evidence.entries}
    for key, value in [*base.values.items(), *inside.items()]:
        kind: Any = records.kind_of(key)
        if kind in (records.EpochCounter, records.Assignment, records.Run):
            record: Any = base.parsed.get(key) if base.values.get(key) == value else None
            record = record or records.decode_record(kind, key, value)
            seen.append(record.epoch)
    return max(seen)


def _records(
    base: _Base, configs: dict[str, VmConfig], fates: dict[str, Fate], epoch: int
) -> dict[str, bytes]:
    """Everything, as bytes. What is taken over from the base is so to the byte."""
    found = {
        key: value
        for key, value in base.values.items()
        if key in base.parsed and not key.startswith(("vms/", *DROPPED_HEADS))
    }
    for key in found:
        node = base.parsed[key]
        if isinstance(node, records.NodeRecord) and node.window is not None:
            # It may be that of an earlier isolation: a window may become longer, never shorter.
            begun = attrs.evolve(node.window, elapsed_ns=0, ended=False)
            found[key] = records.encode_record(attrs.evolve(node, window=begun))
    found["epoch"] = records.encode_record(records.EpochCounter(epoch))
    changes = base.parsed.get("vmset", records.VmSet()).changes
    found["vmset"] = records.encode_record(records.VmSet(changes + 1))
    for vm, config in configs.items():
        fate, head = fates[vm], f"vms/{vm}"
        wanted: dict[str, Any] = {
            f"{head}/spec": records.VmSpec(config, fate.desired),
            f"{head}/assignment": fate.assignment,
            f"{head}/run": fate.run,
            f"{head}/doubt": records.Doubt(fate.doubts) if fate.doubts else None,
        }
        for key, record in wanted.items():
            if record is None:
                continue
            same = base.parsed.get(key) == record
            found[key] = base.values[key] if same else records.encode_record(record)
        owner = fate.assignment.owner if fate.assignment else None
        if owner is not None and fate.kind in ("lives", "elsewhere"):
            found.setdefault(f"members/{owner}", records.encode_record(records.Member(owner)))
    return found


def _unsettled(
    evidence: Evidence, fates: dict[str, Fate], unasked: dict[str, str], epoch: int
) -> dict[str, bytes]:
    """Whoever may have a stale run is not up before it has stopped it: what was taken from whom before is not
    kept (its revisions were of another store), so it is said anew."""
    stale = set(unasked)
    for name, testimony in evidence.testimonies.items():
        for run in testimony.runs:
            assignment = fates[run.config.name].assignment
            if assignment is None or (assignment.owner, assignment.epoch) != (name, run.epoch):
                stale.add(name)
    moved = records.encode_record(records.MovedAway(records.NOT_ASKED, epoch))
    return {f"moves/{name}": moved for name in sorted(stale)}


def document(made: Plan) -> dict[str, Any]:
    """The plan as ``clusterctl store recover --json`` prints it."""
    return {
        "cluster": made.store_id,
        "store": made.condition,
        "recovery": made.number,
        "epoch": made.epoch,
        "base": made.base,
        "answered": list(made.answered),
        "without": list(made.without),
        "members": sorted(key[8:] for key in made.records if key.startswith("members/")),
        "vms": {vm: fate.document() for vm, fate in made.fates.items()},
        "warnings": list(made.warnings),
        "digest": made.digest,
    }

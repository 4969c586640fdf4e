"""SAN mode's rules: what san.toml may say, the states of a snapshot, its record on a disk that crashes."""

import json
from random import Random

import attrs
import pytest

from daemonkit.errors import InvariantBroken
from diskd.core.ports import ChangeReport
from diskd.core.san import (
    MappedDisk,
    Provider,
    Record,
    RecordedDisk,
    advance,
    choose_provider,
    create_argv,
    decode_record,
    delete_argv,
    encode_mapping,
    load,
    parse_providers,
    persist,
    record_file,
    recover,
    seen_at,
)
from diskd.core.sealed_line import seal
from diskd.errors import Damaged, Refused
from diskd.sim.disk import SimDisk

POINT = "rp-" + "1" * 16
RECORD = Record(POINT, "cp-" + "2" * 16, "web", "fast", "backup", [RecordedDisk("root", "system")])

GOOD = """
[providers.array]
kind = "command"
command = ["/usr/local/sbin/snap", "--fast"]
timeout_s = 120
[providers.sub]
kind = "btrfs"
subvolume = "/srv/vm"
directory = "/srv/snapshots"
[providers.ref]
kind = "reflink"
directory = "/srv/vm/.snapshots"
"""


def test_providers():
    found = parse_providers(GOOD)
    assert sorted(found) == ["array", "ref", "sub"]
    array, sub, ref = found["array"], found["sub"], found["ref"]
    assert array.timeout_ns == 120 * 10**9
    assert create_argv(array, "s", "/srv/vm/diskd") == [
        "/usr/local/sbin/snap",
        "--fast",
        "create",
        "s",
        "/srv/vm/diskd",
    ]
    assert delete_argv(array, "s", "/r")[-3:] == ["delete", "s", "/r"]
    assert create_argv(sub, "s", "/r")[-2:] == ["/srv/vm", "/srv/snapshots/s"]
    assert seen_at(array, "s", "/r", "/snapshots/s/diskd\n") == "/snapshots/s/diskd"
    assert seen_at(sub, "s", "/srv/vm/diskd", "Create a snapshot ...") == "/srv/snapshots/s/diskd"
    assert seen_at(sub, "s", "/srv/vm", "") == "/srv/snapshots/s"
    assert seen_at(ref, "s", "/anywhere", "") == "/srv/vm/.snapshots/s"
    assert choose_provider(found, "ref") is ref
    with pytest.raises(Refused, match="known: array, ref, sub"):
        choose_provider(found, "other")
    assert parse_providers("") == {}


@pytest.mark.parametrize("said", ["", "relative/path", "/one\n/two\n", "done\n"])
def test_a_command_must_say_one_path(said):
    with pytest.raises(Refused, match="absolute path"):
        seen_at(Provider("command", ["/bin/snap"]), "s", "/r", said)


def test_a_root_outside_the_subvolume_is_refused():
    with pytest.raises(Refused, match="subvolume"):
        seen_at(Provider("btrfs", subvolume="/srv/vm", directory="/s"), "s", "/srv/vmother", "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[providers", "san.toml"),
        ("[other]", "unknown key"),
        ("[providers.a]\nkind = 'zfs'", "kind"),
        ("[providers.a]\nkind = 'command'", "needs command"),
        ("[providers.a]\nkind = 'command'\ncommand = ['snap']", "absolute"),
        ("[providers.a]\nkind = 'btrfs'\ndirectory = '/s'", "needs subvolume"),
        ("[providers.a]\nkind = 'reflink'\ndirectory = 's'", "absolute"),
        ("[providers.a]\nkind = 'reflink'\ndirectory = '/s'\ncommand = ['/x']", "does not take command"),
        ("[providers.a]\nkind = 'reflink'\ndirectory = '/s'\ntimeout_s = 0", "timeout_s"),
        ("[providers.'../a']\nkind = 'reflink'\ndirectory = '/s'", "not a provider's name"),
    ],
)
def test_what_san_toml_may_not_say(text, reason):
    with pytest.raises(Refused, match=reason):
        parse_providers(text)


def test_the_life_of_a_snapshot():
    standing = advance(RECORD, "created", path="/snapshots/s")
    assert (standing.state, standing.path) == ("standing", "/snapshots/s")
    releasing = advance(standing, "release", outcome="keep")
    assert advance(releasing, "release", outcome="discard").outcome == "keep"
    assert advance(releasing, "deleted").state == "gone"
    failed = advance(RECORD, "release", outcome="discard")
    assert (failed.state, failed.outcome) == ("releasing", "discard")


@pytest.mark.parametrize(
    ("state", "event", "with_"),
    [
        ("creating", "deleted", {}),
        ("creating", "created", {}),
        ("standing", "created", {"path": "/x"}),
        ("standing", "deleted", {}),
        ("standing", "release", {}),
        ("releasing", "created", {"path": "/x"}),
        ("gone", "release", {"outcome": "keep"}),
    ],
)
def test_what_is_not_in_the_table_is_a_defect(state, event, with_):
    with pytest.raises(InvariantBroken):
        advance(attrs.evolve(RECORD, state=state), event, **with_)


@pytest.mark.parametrize(
    ("held_by", "state", "outcome"),
    [
        ("backup", "creating", "discard"),
        ("backup", "standing", "pending"),
        ("hand", "creating", "discard"),
        ("hand", "standing", None),
    ],
)
def test_what_a_restart_does(held_by, state, outcome):
    assert recover(attrs.evolve(RECORD, held_by=held_by, state=state)) == outcome
    assert recover(attrs.evolve(RECORD, held_by=held_by, state="releasing", outcome="keep")) == "keep"


def stages():
    standing = advance(RECORD, "created", path="/snapshots/s")
    releasing = advance(standing, "release", outcome="keep")
    return [RECORD, standing, releasing, advance(releasing, "deleted")]


class Crash(Exception):
    """The machine stops here."""


def run_some(disk, script, steps):
    """At most so many steps of it; how many are left."""
    try:
        step = next(script)
        while steps:
            steps -= 1
            step = script.send(disk.execute(step))
    except StopIteration:
        return steps
    raise Crash


@pytest.mark.parametrize("seed", range(20))
def test_a_crash_at_every_step_leaves_one_of_two_states(seed):
    """Before and after a power loss at any step of any change, the record is the old or the new one."""
    rng = Random(seed)
    for crash_at in range(12):
        disk, left = SimDisk(rng), crash_at
        known = [None]
        try:
            for record in stages():
                known = [known[-1], record]
                left = run_some(disk, persist(record), left)
                known = [record]
        except Crash:
            pass
        disk.power_loss()
        records, damaged = disk.run(load())
        assert damaged == []
        found = records[0] if records else None
        assert len(records) <= 1
        assert found in [None if record is None or record.state == "gone" else record for record in known]


def test_damaged_records_are_named_and_harm_no_other():
    disk = SimDisk(Random(1))
    disk.run(persist(RECORD))
    other = attrs.evolve(RECORD, point="rp-" + "3" * 16)
    disk.run(persist(other))
    disk.poke(record_file(POINT), 5, b"?")
    assert disk.run(load()) == ([other], [record_file(POINT)])


@pytest.mark.parametrize(
    "change",
    [
        {"point": "../../etc"},
        {"checkpoint": "x"},
        {"vm": "A"},
        {"provider": "../x"},
        {"state": "gone"},
        {"state": "standing"},
        {"outcome": "keep"},
        {"disks": [RecordedDisk("root", "../x")]},
    ],
)
def test_records_that_lie_are_damage(change):
    data = seal(1, json.loads(json.dumps(attrs.asdict(attrs.evolve(RECORD, **change)))))
    with pytest.raises(Damaged):
        decode_record(data)


def test_the_mapping_tells_where_everything_is():
    record = advance(RECORD, "created", path="/snapshots/s")
    report = ChangeReport([(0, 4096), (8192, 4096)], exact=True, over_report_bytes=0)
    disk = MappedDisk(
        "root", "system", 1 << 20, 4096, "/snapshots/s/images/system/disk.raw", {"rp-0": report}
    )
    found = json.loads(encode_mapping(record, config="name = 'web'", consistency="crash", disks=[disk]))
    assert (found["format"], found["version"], found["point"]) == ("holdfast-san-mapping", 1, POINT)
    assert found["disks"][0]["raw"] == "/snapshots/s/images/system/disk.raw"
    assert found["disks"][0]["changes"]["rp-0"]["extents"] == [[0, 4096], [8192, 4096]]

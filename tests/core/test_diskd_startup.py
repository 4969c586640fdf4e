"""What a host is told before diskd serves on it (core/startup.py), and the sample configuration."""

import tomllib
from pathlib import Path

import attrs
import pytest

from daemonkit.units import SECOND, GiB, MiB
from diskd.config import Settings, load_settings, show_settings
from diskd.core.startup import Facts, file_system_of, judge
from diskd.errors import Refused

EXAMPLE = Path(__file__).resolve().parents[2] / "docs/diskd.toml.example"
GOOD = Facts(
    root="/srv/disks",
    file_system="ext4",
    write_error=None,
    makes_holes=True,
    punches_holes=True,
    shared_dir="/dev/shm",
    shared_file_system="tmpfs",
    shared_bytes=GiB,
    bitmap_bytes=100 * MiB,
    newest_ns=5,
    now_ns=10,
    files_max=65536,
)
UNKNOWN = attrs.evolve(
    GOOD, file_system=None, makes_holes=None, punches_holes=None, shared_file_system=None, newest_ns=None
)


@pytest.mark.parametrize("facts", [GOOD, UNKNOWN])
def test_a_good_host_and_one_of_which_little_is_known_are_told_nothing(facts):
    assert judge(facts) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"write_error": "Read-only file system"}, ["/srv/disks", "Read-only", "read-write"]),
        ({"makes_holes": False, "file_system": "vfat"}, ["vfat", "sparse", "ext4"]),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(changes, words):
    with pytest.raises(Refused) as caught:
        judge(attrs.evolve(GOOD, **changes))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("changes", "check", "words"),
    [
        ({"punches_holes": False, "file_system": "nfs4"}, "punch", ["nfs4", "trim"]),
        ({"shared_file_system": "overlay"}, "shared_dir", ["overlay", "tmpfs"]),
        ({"shared_bytes": 64 * MiB}, "shared_memory", ["64MiB", "100MiB", "enlarge"]),
        ({"shared_bytes": 150 * MiB}, "shared_memory", ["backup", "enlarge"]),
        ({"newest_ns": 10 + 3600 * SECOND}, "clock", ["3600 s", "NTP"]),
        ({"files_max": 1024}, "open_files", ["1024", "LimitNOFILE"]),
    ],
)
def test_what_will_hurt_is_told_with_a_remedy(changes, check, words):
    (warned,) = judge(attrs.evolve(GOOD, **changes))
    assert warned.check == check
    assert all(word in warned.text for word in words)


def test_the_file_system_is_that_of_the_longest_mount_and_of_the_last_on_it():
    mounts = "\n".join(
        [
            "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw",
            "30 22 0:25 / /srv rw shared:9 - xfs /dev/sdb rw",
            "31 30 0:26 / /srv/my\\040disks rw - btrfs /dev/sdc rw",
            "32 31 0:27 / /srv/my\\040disks rw - vfat /dev/sdd rw",
            "nonsense",
        ]
    )
    assert file_system_of(mounts, "/home") == "ext4"
    assert file_system_of(mounts, "/srv") == "xfs"
    assert file_system_of(mounts, "/srvx") == "ext4"
    assert file_system_of(mounts, "/srv/my disks/a") == "vfat"
    assert file_system_of("", "/srv") is None


def test_the_sample_configuration_says_every_default_and_nothing_else():
    assert load_settings(EXAMPLE) == Settings()
    assert set(tomllib.loads(EXAMPLE.read_text())) == set(show_settings(Settings()))

"""Chapters (a), (c), (d), (e) and the end: what happens to the VM when cables are pulled."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import clusterd
import daemonkit
import diskd
from daemonkit.units import format_size
from holdfast.demo import disk
from holdfast.demo.stage import Row
from holdfast.demo.story import JOURNAL, SYSTEM, VM, Story

JOURNAL_SIZE = "32MiB"
WINDOW_SECONDS = 8.0
ISOLATION_SECONDS_MAX = 10.0
PROPERTIES = {
    "heartbeat_interval": "200ms",
    "heartbeat_threshold": "5",
    "resiliency_period": f"{WINDOW_SECONDS:g}s",
    "quarantine_threshold": "3",
    "quarantine_duration": "10s",
}
TARGET_DELAY = "150ms"
# How long the guest takes from its start to its first write: about what a small Linux needs to boot.
BOOT_SECONDS = 3.0


def begin(story: Story) -> None:
    stage = story.stage
    stage.chapter("a", "three nodes, and a VM with two disks")
    stage.lab_up(3, PROPERTIES)
    stage.lab_do("delay", "diskd", "target", TARGET_DELAY)
    stage.say("n1, n2, n3, their store, diskd and the backup target run, every link through a proxy")
    _make_disks(story)
    _add_vm(story)
    vm = stage.wait_vm(VM, "n2", "online", 30)
    stage.expect(vm["owner"] == "n1", f"the VM starts on its preferred node n1, not on {vm['owner']}")
    story.wait_writing(15)
    stage.say(f"VM {VM} is online on n1, pid {vm['pid']}, epoch {vm['epoch']}, and its journal grows")


def _make_disks(story: Story) -> None:
    stage = story.stage
    files = stage.directory / "files"
    for package in (daemonkit, clusterd, diskd):
        source = Path(package.__file__ or "").parent
        shutil.copytree(source, files / "srv" / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    (files / "var").mkdir()
    disk.make_system(story.model, files)
    stage.command("diskctl", "image", "import", SYSTEM, str(story.model))
    stage.command("diskctl", "image", "create", JOURNAL, JOURNAL_SIZE)
    made = "ext4, made from real files" if disk.has_e2fsprogs() else "plain bytes: e2fsprogs is not installed"
    stage.say(f"{SYSTEM}: {format_size(disk.SYSTEM_BYTES)}, {made}; {JOURNAL}: {JOURNAL_SIZE}, the guest's")


def _add_vm(story: Story) -> None:
    stage = story.stage
    guest = [
        sys.executable,
        "-m",
        "holdfast.guest",
        "--disk",
        "{disk:journal}",
        "--acks",
        str(story.acks_path),
    ]
    guest += ["--epoch", "{epoch}", "--node", "{node}", "--rate", "40", "--size-load", "60"]
    guest += ["--boot", f"{BOOT_SECONDS:g}"]
    lines = [
        f"name = {json.dumps(VM)}",
        'driver = "process"',
        f"argv = {json.dumps(guest)}",
        'memory = "64MiB"',
        "vcpus = 1",
        'preferred_nodes = ["n1"]',
    ]
    for name, image in (("system", SYSTEM), ("journal", JOURNAL)):
        lines += ["[[disks]]", f"name = {json.dumps(name)}", f"image = {json.dumps(image)}", 'diskd = "main"']
    path = stage.directory / "web.toml"
    path.write_text("\n".join(lines) + "\n")
    stage.command("clusterctl", "vm", "add", str(path))
    if story.stage.vm(VM, "n2").get("desired") != "online":
        stage.command("clusterctl", "vm", "start", VM)


def short_cut(story: Story) -> None:
    stage = story.stage
    stage.chapter("c", f"n1's cables pulled for less than the window of {WINDOW_SECONDS:g} s")
    before = stage.vm(VM, "n2")
    begin_ns = time.monotonic_ns()
    stage.lab_do("isolate", "n1")
    stage.wait_node("n1", "n2", "isolated", ISOLATION_SECONDS_MAX)
    vm = stage.wait_vm(VM, "n2", "unmonitored", 5)
    stage.say(f"n2 sees n1 isolated and {VM} unmonitored; window left {vm['window_remaining_s']:.1f} s")
    stage.expect(vm["pid"] == before["pid"], "the pid is unchanged")
    story.wait_writing(5)
    stage.say("the guest executes on: its journal grows")
    stage.lab_do("heal")
    stage.wait_node("n1", "n2", "up", 15)
    after = stage.wait_vm(VM, "n2", "online", 10)
    same = (after["pid"], after["epoch"], after["owner"]) == (before["pid"], before["epoch"], before["owner"])
    stage.expect(same, f"the same run returns (pid, epoch, owner): {before} became {after}")
    story.wait_writing(5)
    downtime = story.downtime_seconds(begin_ns, time.monotonic_ns())
    stage.say(f"cables back: n1 up, {VM} online, same pid {after['pid']}; longest pause {downtime:.2f} s")
    stage.rows.append(Row("cables pulled, short", "same run returns", downtime, WINDOW_SECONDS))


def long_cut(story: Story) -> None:
    stage = story.stage
    stage.chapter("d", "n1's cables pulled for longer than the window")
    before = stage.vm(VM, "n2")
    begin_ns = time.monotonic_ns()
    stage.lab_do("isolate", "n1")
    stage.wait_vm(VM, "n2", "unmonitored", ISOLATION_SECONDS_MAX)
    # An isolated clusterd that sees the newer epoch stops its own copy, and may be quicker than the copy's
    # next write. Hung, as here, it leaves the fence alone between that copy and the disk.
    stage.lab_do("pause", "n1.clusterd")
    stage.say(f"n1 is isolated, {VM} unmonitored; its clusterd hangs; now the window runs out")
    after = stage.wait_vm(VM, "n2", "online", WINDOW_SECONDS + 20, other_than="n1")
    stage.expect(after["epoch"] > before["epoch"], "the new run has a higher epoch")
    story.wait_writing(10, epoch=after["epoch"])
    downtime = story.downtime_seconds(begin_ns, time.monotonic_ns())
    stage.say(f"fenced and failed over: online on {after['owner']}, epoch {after['epoch']}, {downtime:.2f} s")
    refused = stage.wait(
        "the old copy's write is refused",
        10,
        lambda: [line for line in story.acks() if line.kind == "refused" and line.epoch == before["epoch"]],
    )
    stage.say(f"the old copy on n1 was refused at record {refused[0].sequence}")
    stage.lab_do("resume", "n1.clusterd")
    stage.lab_do("heal")
    stage.wait_node("n1", after["owner"], "up", 20)
    stage.wait("the old process has ended", 10, lambda: not Path(f"/proc/{before['pid']}").exists())
    stage.say("n1 is back and up; nothing of the old run is left on it")
    stage.rows.append(
        Row("cables pulled, long", f"failed over to {after['owner']}", downtime, WINDOW_SECONDS, downtime)
    )
    next(row for row in stage.rows if row.what == "cables pulled, short").without_window_s = downtime


def flapping(story: Story) -> None:
    stage = story.stage
    observer = next(n for n in sorted(stage.lab["nodes"]) if n != stage.vm(VM, "n1")["owner"])
    node = stage.vm(VM, observer)["owner"]
    stage.chapter("e", f"{node} flaps, with the VM on it")
    begin_ns = time.monotonic_ns()
    for number in (1, 2, 3):
        stage.lab_do("isolate", node)
        stage.wait_node(node, observer, "isolated", ISOLATION_SECONDS_MAX)
        stage.lab_do("heal")
        stage.wait_node(node, observer, "quarantined" if number == 3 else "up", 20)
        stage.say(f"ungraceful exit {number} of {node}, and back")
    entry = stage.status(observer)["nodes"][node]
    left = entry["quarantine_remaining_s"]
    stage.say(f"{node} is quarantined for another {left:.1f} s")
    vm = stage.wait_vm(VM, observer, "online", 30, other_than=node)
    story.wait_writing(15, epoch=vm["epoch"])
    downtime = story.downtime_seconds(begin_ns, time.monotonic_ns())
    stage.say(f"drained: {VM} is online on {vm['owner']}, epoch {vm['epoch']}")
    stage.wait_node(node, observer, "up", left + 20)
    stage.say(f"the quarantine is over: {node} is up again")
    stage.rows.append(Row(f"{node} flaps", f"quarantined, VM on {vm['owner']}", downtime))


def end(story: Story) -> None:
    """Take the lab down, and look for anything that it left behind."""
    stage = story.stage
    stage.lab_do("down")
    mark = str(stage.directory).encode()

    def left() -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    if mark in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
                except OSError:
                    continue  # It ended while we looked.
        return found

    stage.wait("no process is left behind", 5, lambda: not left())
    stage.say("the lab is down; no process is left behind")

"""The demo's chapters, in the order in which they are told; a broken promise raises DemoFailed."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import attrs

import clusterd
import daemonkit
import diskd
from daemonkit.units import format_size
from holdfast.demo import disk
from holdfast.demo.stage import COMMAND_SECONDS_MAX, DemoFailed, Row, Stage
from holdfast.guest.acks import Line, parse_acks

VM = "web"
SYSTEM, JOURNAL = "web-system", "web-journal"
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


@attrs.frozen
class Backup:
    """One committed point: what diskd reported, and what both disks were at that instant."""

    title: str
    report: dict[str, Any]
    truth: disk.Truth

    @property
    def changed_bytes(self) -> int:
        return sum(entry["changed_bytes"] for entry in self.report["disks"])

    @property
    def sent_bytes(self) -> int:
        return sum(entry["sent_bytes"] for entry in self.report["disks"])

    @property
    def is_exact(self) -> bool:
        return all(entry["exact"] for entry in self.report["disks"])


@attrs.define
class Story:
    """What the chapters hand on to each other."""

    stage: Stage
    backups: list[Backup] = attrs.field(factory=list)
    changes: int = 0

    @property
    def model(self) -> Path:
        """The system disk as the demo's own file system driver knows it."""
        return self.stage.directory / "system.raw"

    @property
    def acks_path(self) -> Path:
        return self.stage.directory / "journal.acks"

    def acks(self) -> list[Line]:
        return parse_acks(self.acks_path.read_bytes()) if self.acks_path.exists() else []

    def nbd_uri(self, export: str) -> str:
        return f"nbd://{self.stage.lab['diskd']['nbd']}/{export}"

    # --- the guest as its acknowledgements show it -----------------------------------------------

    def wait_writing(self, seconds_max: float, *, epoch: int | None = None) -> Line:
        """Until the guest (of that epoch) acknowledges another record from now on."""
        since = time.monotonic_ns()

        def probe() -> Line | None:
            fresh = [line for line in self.acks()[-50:] if line.kind == "ack" and line.monotonic_ns > since]
            return fresh[-1] if fresh and (epoch is None or fresh[-1].epoch == epoch) else None

        return self.stage.wait("the guest writes", seconds_max, probe)

    def downtime_seconds(self, begin_ns: int, end_ns: int) -> float:
        """The longest time without an acknowledged write between two instants of CLOCK_MONOTONIC."""
        times = [line.monotonic_ns for line in self.acks() if line.kind == "ack"]
        inside = [instant for instant in times if begin_ns <= instant <= end_ns]
        edges = [begin_ns, *inside, end_ns]
        return max(later - earlier for earlier, later in itertools.pairwise(edges)) / 1e9

    # --- backups --------------------------------------------------------------------------------

    def backup(self, title: str, *options: str) -> Backup:
        """Back up under load, and copy both frozen disks through NBD meanwhile: the independent truth.

        The target is far away (its link is slow), and it is stopped as soon as the disks are frozen, so
        that the checkpoint stands while the copies are made. The guest must not notice (B2): it has to go
        on writing while the target does not answer.
        """
        stage = self.stage
        argv: tuple[str, ...] = ("diskctl", "backup", "--vm", VM, "--image", SYSTEM, "--image", JOURNAL)
        argv += ("--target", stage.address_of("diskd", "target"))
        argv += ("--config", str(stage.directory / "web.toml"), "--json", *options)
        process = subprocess.Popen(
            stage.binary(argv),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=stage.environment,
        )
        try:
            checkpoint = self._checkpoint_of(process)
            os.kill(stage.lab["target"]["pid"], signal.SIGSTOP)
            copies = {}
            for name, image in (("system", SYSTEM), ("journal", JOURNAL)):
                copies[name] = stage.directory / f"truth-{len(self.backups)}-{name}.raw"
                disk.copy_out(self.nbd_uri(f"{image}:{checkpoint}"), copies[name])
            self.wait_writing(5)
        finally:
            os.kill(stage.lab["target"]["pid"], signal.SIGCONT)
        out, err = process.communicate(timeout=COMMAND_SECONDS_MAX)
        if process.returncode:
            raise DemoFailed(f"{title} failed: {err.strip()}")
        report = json.loads(out.strip().splitlines()[-1])
        backup = Backup(title, report, disk.Truth(report["point"], copies))
        self.backups.append(backup)
        difference = disk.first_difference(copies["system"], self.model)
        stage.expect(difference is None, f"the frozen system disk is what was written to it ({difference})")
        stage.say(
            f"{report['kind']} backup {report['point']}: {format_size(backup.changed_bytes)} changed, "
            f"{format_size(backup.sent_bytes)} sent, {'exact' if backup.is_exact else 'not exact'}; "
            "the guest went on writing while the target was stopped"
        )
        return backup

    def _checkpoint_of(self, process: subprocess.Popen[str]) -> str:
        """The checkpoint's id, from the progress lines of a running backup."""
        assert process.stdout is not None
        for line in process.stdout:
            checkpoint = json.loads(line).get("progress", {}).get("checkpoint")
            if checkpoint:
                return str(checkpoint)
        assert process.stderr is not None
        raise DemoFailed(f"the backup ended before its checkpoint stood: {process.stderr.read().strip()}")

    def change_system(self) -> int:
        """Change files on the system disk as its guest would; returns the bytes that were written."""
        self.changes += 1
        before = self.stage.directory / "system.before.raw"
        shutil.copyfile(self.model, before)
        disk.change(self.model, self.changes)
        blocks = disk.changed_blocks(before, self.model)
        epoch = self.stage.vm(VM, self.some_up_node())["epoch"]
        disk.write_through(self.nbd_uri(f"{SYSTEM}@{epoch}"), self.model, blocks)
        return len(blocks) * disk.BLOCK_BYTES

    def some_up_node(self) -> str:
        """A node that every node calls up: its view is asked where any would do."""
        for name in self.stage.lab["nodes"]:
            done = self.stage.attempt(
                "clusterctl", "--node", self.stage.lab["nodes"][name]["control"], "status", "--json"
            )
            if done.returncode == 0 and json.loads(done.stdout)["nodes"].get(name, {}).get("state") == "up":
                return str(name)
        raise DemoFailed("no node calls itself up")


# --- the chapters ---------------------------------------------------------------------------------


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


def full_backup(story: Story) -> None:
    stage = story.stage
    stage.chapter("b", "a full backup, the guest writing throughout")
    backup = story.backup("full backup")
    stage.expect(backup.report["kind"] == "full", "the first backup is a full one")
    stage.rows.append(
        Row("full backup", "committed", changed_bytes=backup.changed_bytes, sent_bytes=backup.sent_bytes)
    )


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
    stage.say(f"n1 is isolated, {VM} unmonitored; now the window runs out")
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
    stage.rows.append(Row(f"{node} flaps", f"quarantined, drained to {vm['owner']}", downtime))


def differential(story: Story) -> None:
    stage = story.stage
    stage.chapter("f", "a differential backup after the VM has moved")
    written = story.change_system()
    stage.say(f"files on {SYSTEM} changed: {format_size(written)} written")
    backup = story.backup("differential after the moves")
    _check_differential(story, backup, exact=True)
    truth = _truly_changed(story.backups[-2], backup)
    stage.expect(
        backup.changed_bytes <= truth["system"] * 1.05 + _journal_bound(story, backup),
        f"the differential is about what the guest wrote ({backup.changed_bytes} of {truth} bytes)",
    )
    stage.rows.append(_row_of(backup, f"exact; {format_size(sum(truth.values()))} differ"))


def _journal_bound(story: Story, backup: Backup) -> int:
    """What the guest can have rewritten on its disk: never more than the disk itself."""
    return backup.truth.disks["journal"].stat().st_size


def _truly_changed(old: Backup, new: Backup) -> dict[str, int]:
    """Bytes of the blocks in which the two points' contents differ, by disk: the least a backup can send."""
    return {
        name: len(disk.changed_blocks(old.truth.disks[name], new.truth.disks[name])) * disk.BLOCK_BYTES
        for name in new.truth.disks
    }


def _row_of(backup: Backup, result: str) -> Row:
    return Row(backup.title, result, changed_bytes=backup.changed_bytes, sent_bytes=backup.sent_bytes)


def _check_differential(story: Story, backup: Backup, *, exact: bool) -> None:
    stage = story.stage
    stage.expect(backup.report["kind"] == "differential", "a differential, not a full")
    stage.expect(backup.report["base"] == story.backups[-2].report["point"], "based on the newest point")
    stage.expect(backup.is_exact == exact, f"exact is {exact}")
    truth = _truly_changed(story.backups[-2], backup)
    for entry in backup.report["disks"]:
        name = "system" if entry["image"] == SYSTEM else "journal"
        stage.expect(
            entry["changed_bytes"] >= truth[name],
            f"{name}: {entry['changed_bytes']} bytes reported, {truth[name]} truly changed: none missed",
        )


def killed_daemon(story: Story) -> None:
    stage = story.stage
    stage.chapter("g", "diskd killed under load, then a power loss")
    base = story.backups[-1].report["point"]
    begin_ns = time.monotonic_ns()
    written = story.change_system()
    stage.lab_do("kill", "diskd")
    stage.lab_do("start", "diskd")
    story.wait_writing(20)
    downtime = story.downtime_seconds(begin_ns, time.monotonic_ns())
    changes = stage.json("diskctl", "changes", JOURNAL, "--since", base, "--json")
    stage.expect(changes["exact"], "after kill -9 of the daemon the answer is exact")
    backup = story.backup("differential after kill -9")
    _check_differential(story, backup, exact=True)
    truth = _truly_changed(story.backups[-2], backup)
    system = next(entry for entry in backup.report["disks"] if entry["image"] == SYSTEM)
    stage.expect(
        system["changed_bytes"] <= written, f"exact: {system['changed_bytes']} of {written} written bytes"
    )
    row = _row_of(backup, f"exact; {format_size(sum(truth.values()))} differ")
    row.downtime_s = downtime
    stage.rows.append(row)
    _power_loss(story)


def _power_loss(story: Story) -> None:
    stage = story.stage
    base = story.backups[-1].report["point"]
    story.change_system()
    stage.lab_do("kill", "diskd")
    thrown = throw_away_shared_memory(stage)
    stage.lab_do("start", "diskd")
    story.wait_writing(20)
    stage.say(f"diskd killed and {thrown} shared-memory bitmaps thrown away, as a power loss would")
    for image in (SYSTEM, JOURNAL):
        changes = stage.json("diskctl", "changes", image, "--since", base, "--json")
        stage.expect(not changes["exact"], f"{image}: after a power loss the answer says it is not exact")
        size = stage.json("diskctl", "image", "show", image, "--json")["size"]
        bound = changes["over_report_bytes"]
        stage.expect(0 < bound <= size, f"{image}: the over-report of {bound} bytes is bounded")
        stage.say(f"{image}: not exact, over-reports at most {format_size(bound)}")
    backup = story.backup("differential after power loss")
    _check_differential(story, backup, exact=False)
    truth = _truly_changed(story.backups[-2], backup)
    stage.rows.append(_row_of(backup, f"bounded; {format_size(sum(truth.values()))} differ, none missed"))


def throw_away_shared_memory(stage: Stage) -> int:
    """Remove the active bitmaps of this lab's images from shared memory; returns how many there were."""
    status = stage.lab["diskd"]
    directory = Path(status.get("shared_dir", "/dev/shm"))
    identities = {
        (path.parent / "image.toml").read_text().replace("-", "")
        for path in stage.lab_directory.rglob("disk.raw")
    }
    count = 0
    for path in sorted(directory.glob("holdfast-*")):
        uuid = path.name.removeprefix("holdfast-").split("-")[0]
        if any(uuid in identity for identity in identities):
            path.unlink()
            count += 1
    stage.expect(count == 2, f"two shared-memory bitmaps to throw away, found {count} in {directory}")
    return count


def restores(story: Story) -> None:
    stage = story.stage
    stage.chapter("h", "synthetic full, and every point restored")
    newest = story.backups[-1].report["point"]
    stage.command("diskctl", "target", "synthesize", VM, newest)
    listed = {entry["point"]: entry for entry in stage.json("diskctl", "target", "list", "--json")}
    stage.expect(
        set(listed) == {b.report["point"] for b in story.backups}, "the target lists exactly our points"
    )
    stage.expect(listed[newest]["kind"] == "full", "the newest point is a synthetic full now")
    stage.say(f"{newest} is a full now, put together at the target")
    for backup in story.backups:
        point = backup.report["point"]
        to = stage.directory / f"restore-{point}"
        stage.command("diskctl", "target", "restore", VM, point, "--to", str(to), "--format", "raw")
        for name, truth in backup.truth.disks.items():
            difference = disk.first_difference(to / f"{name}.raw", truth)
            stage.expect(difference is None, f"{point} {name} restored byte for byte ({difference})")
        clean = disk.is_clean(to / "system.raw")
        stage.expect(clean is not False, f"{point}: e2fsck -fn finds the file system clean")
        stage.expect(
            (to / "vm.toml").read_text() == (stage.directory / "web.toml").read_text(), "the VM's file"
        )
        verdict = "e2fsck clean" if clean else "e2fsck is not installed: not run"
        stage.say(f"{point} ({backup.title}): identical byte for byte, {verdict}")
    stage.command("diskctl", "target", "verify")
    stage.rows.append(
        Row("restore of every point", f"{len(story.backups)} of {len(story.backups)} identical")
    )
    _check_journal(story)


def _check_journal(story: Story) -> None:
    """The journal at the last point, judged by the checker against the acknowledgements made before it."""
    stage = story.stage
    owners: list[tuple[int, str]] = []
    for line in story.acks():
        if line.kind == "ack" and (not owners or owners[-1] != (line.epoch, line.node)):
            owners.append((line.epoch, line.node))
    epochs = [epoch for epoch, _ in owners]
    stage.expect(epochs == sorted(set(epochs)), f"no two owners wrote at once: {owners}")
    stage.say(
        f"the journal's owners, one after the other: {', '.join(f'{n} (epoch {e})' for e, n in owners)}"
    )


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

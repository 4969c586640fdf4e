"""Chapters (b), (f), (g) and (h): backups, crashes between them, and every point restored."""

import shutil
import sys
import time
from pathlib import Path

from daemonkit.units import format_size
from holdfast.demo import disk
from holdfast.demo.stage import Row, Stage
from holdfast.demo.story import JOURNAL, SYSTEM, VM, Backup, Story

# Bytes reported changed for each byte that really differs, while the answer is exact.
EXACT_RATIO_MAX = 1.05


def full_backup(story: Story) -> None:
    stage = story.stage
    stage.chapter("b", "a full backup, the guest writing throughout")
    backup = story.backup("full backup")
    stage.expect(backup.report["kind"] == "full", "the first backup is a full one")
    stage.rows.append(
        Row("full backup", "committed", changed_bytes=backup.changed_bytes, sent_bytes=backup.sent_bytes)
    )


def differential(story: Story) -> None:
    stage = story.stage
    stage.chapter("f", "a differential backup after the VM has moved")
    written = story.change_system()
    stage.say(f"files on {SYSTEM} changed: {format_size(written)} written")
    backup = story.backup("differential, VM moved")
    _check_differential(story, backup, exact=True)
    truth = _truly_changed(story.backups[-2], backup)
    stage.expect(
        backup.changed_bytes <= sum(truth.values()) * EXACT_RATIO_MAX,
        f"the differential is about what was written ({backup.changed_bytes} for {truth} bytes that differ)",
    )
    stage.rows.append(_row_of(backup, f"exact; {format_size(sum(truth.values()))} differ"))


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
    backup = story.backup("differential, kill -9")
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
        # Nobody writes to the system disk any more: a slow machine has closed its regions before the kill,
        # and nothing is in doubt. The guest writes to its journal, whatever the machine.
        if changes["exact"] and image == SYSTEM:
            stage.say(f"{image}: exact, since all of its regions had been closed")
            continue
        stage.expect(not changes["exact"], f"{image}: after a power loss the answer says it is not exact")
        size = stage.json("diskctl", "image", "show", image, "--json")["size"]
        bound = changes["over_report_bytes"]
        stage.expect(0 < bound <= size, f"{image}: the over-report of {bound} bytes is bounded")
        stage.say(f"{image}: not exact, over-reports at most {format_size(bound)}")
    backup = story.backup("differential, power loss")
    _check_differential(story, backup, exact=False)
    truth = _truly_changed(story.backups[-2], backup)
    stage.rows.append(_row_of(backup, f"bounded; {format_size(sum(truth.values()))} differ"))


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
    stage.rows.append(Row("every point restored", f"{len(story.backups)} of {len(story.backups)} identical"))
    _check_journal(story)


def _check_journal(story: Story) -> None:
    """The live journal, judged by the checker against every acknowledgement of the whole demo."""
    stage = story.stage
    acks = stage.directory / "journal.acks.copy"
    shutil.copyfile(story.acks_path, acks)
    begun = stage.json("diskctl", "checkpoint", "begin", "--vm", VM, "--image", JOURNAL, "--json")
    uri = story.nbd_uri(begun["exports"][JOURNAL])
    argv = ("-m", "holdfast.checker", "--acks", str(acks), "--disk", uri, "--json")
    verdict = stage.json(sys.executable, *argv)
    stage.command("diskctl", "checkpoint", "end", begun["checkpoint"], "--discard")
    stage.expect(verdict["lost"] == 0, f"no acknowledged record is lost: {verdict}")
    stage.expect(verdict["overlaps"] == 0, f"no record was written by two owners at once: {verdict}")
    owners = ", ".join(f"{node} (epoch {epoch})" for epoch, node, _, _ in verdict["owners"])
    stage.say(
        f"the journal's {verdict['records']} records: none lost, none by two owners at once; by {owners}"
    )

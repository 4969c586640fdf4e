"""What the demo's chapters share: the guest as its acknowledgements show it, backups, and their truth."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import attrs

from daemonkit.units import format_size
from holdfast.demo import disk
from holdfast.demo.stage import COMMAND_SECONDS_MAX, DemoFailed, Stage
from holdfast.guest.acks import Line, parse_acks

VM = "web"
SYSTEM, JOURNAL = "web-system", "web-journal"


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
        node = stage.lab["nodes"][self.some_up_node()]["control"]
        argv: tuple[str, ...] = ("clusterctl", "--node", node, "vm", "backup", VM, "--json", *options)
        argv += ("--target", stage.address_of("diskd", "target"))
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

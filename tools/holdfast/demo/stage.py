"""The demo's stage: it runs the command lines as a user would, waits for what they show, and tells the story.

Nothing here knows the daemons' insides. A command that fails, or a wait that runs out, ends the demo with
one line that says what was expected and what was there instead.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import attrs
from rich.console import Console

T = TypeVar("T")

COMMAND_SECONDS_MAX = 60.0
POLL_SECONDS = 0.2


class DemoFailed(Exception):
    """The demo did not show what it promises; the message is one line."""


@attrs.define
class Row:
    """One line of the table at the end; None where a column does not apply."""

    what: str
    result: str
    downtime_s: float | None = None
    window_s: float | None = None
    without_window_s: float | None = None
    changed_bytes: int | None = None
    sent_bytes: int | None = None


@attrs.define
class Stage:
    """Where the demo plays: its directory, the lab's addresses once it is up, and the rows of the table."""

    directory: Path
    console: Console
    started_s: float = attrs.field(factory=time.monotonic)
    rows: list[Row] = attrs.field(factory=list)
    environment: dict[str, str] = attrs.field(factory=lambda: dict(os.environ))
    lab: dict[str, Any] = attrs.field(factory=dict)

    @property
    def lab_directory(self) -> Path:
        return self.directory / "lab"

    def chapter(self, letter: str, text: str) -> None:
        self.console.print(f"\n[bold cyan]({letter})[/] [bold]{text}[/]", highlight=False)

    def say(self, text: str, *, style: str = "") -> None:
        """One line of the live timeline."""
        elapsed = time.monotonic() - self.started_s
        self.console.print(f"[dim]{elapsed:6.1f} s[/]  {text}", style=style, highlight=False, soft_wrap=True)

    def command(self, *argv: str, seconds_max: float = COMMAND_SECONDS_MAX) -> str:
        """stdout of one of our command lines. Raises DemoFailed when it exits non-zero."""
        done = self.attempt(*argv, seconds_max=seconds_max)
        if done.returncode:
            raise DemoFailed(f"`{' '.join(argv)}` exited {done.returncode}: {done.stderr.strip()[-400:]}")
        return done.stdout

    def attempt(
        self, *argv: str, seconds_max: float = COMMAND_SECONDS_MAX
    ) -> subprocess.CompletedProcess[str]:
        """Run one of our command lines; its exit code is the caller's to judge."""
        try:
            return subprocess.run(
                self.binary(argv), capture_output=True, text=True, check=False, env=self.environment,
                stdin=subprocess.DEVNULL, timeout=seconds_max,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"`{' '.join(argv)}` did not finish within {seconds_max:g} s") from None

    def binary(self, argv: tuple[str, ...]) -> list[str]:
        """The command with its console script beside this interpreter, whatever PATH says."""
        beside = Path(sys.executable).parent / argv[0]
        return [str(beside) if beside.exists() else argv[0], *argv[1:]]

    def json(self, *argv: str, seconds_max: float = COMMAND_SECONDS_MAX) -> Any:
        """The JSON document that a command prints; of JSON lines, the last one."""
        text = self.command(*argv, seconds_max=seconds_max)
        try:
            return json.loads(text)
        except ValueError:
            return json.loads(text.strip().splitlines()[-1])

    def wait(self, what: str, seconds_max: float, probe: Callable[[], T | None]) -> T:
        """Until ``probe`` returns something true. Raises DemoFailed with ``what`` when it does not."""
        deadline = time.monotonic() + seconds_max
        while True:
            value = probe()
            if value:
                return value
            if time.monotonic() > deadline:
                raise DemoFailed(f"waited {seconds_max:g} s in vain: {what}")
            time.sleep(POLL_SECONDS)

    def expect(self, holds: object, what: str) -> None:
        if not holds:
            raise DemoFailed(f"expected: {what}")

    # --- the lab ---------------------------------------------------------------------------------

    def lab_up(self, nodes: int, properties: dict[str, str]) -> None:
        settings = [part for name, value in properties.items() for part in ("--set", f"{name}={value}")]
        self.command("lab", "up", "--nodes", str(nodes), "--dir", str(self.lab_directory), *settings)
        self.lab = json.loads((self.lab_directory / "lab.json").read_text())
        self.environment["HOLDFAST_NODE"] = ",".join(node["control"] for node in self.lab["nodes"].values())
        self.environment["HOLDFAST_DISKD"] = self.lab["diskd"]["control"]
        self.environment["HOLDFAST_TARGET"] = self.lab["target"]["listen"]

    def address_of(self, source: str, destination: str) -> str:
        """Where ``source`` reaches ``destination``: a link proxy, unlike the addresses in lab.json."""
        state = json.loads((self.lab_directory / "state.json").read_text())
        for route in state["layout"]["routes"]:
            if (route["source"], route["destination"], route["kind"]) == (source, destination, "tcp"):
                return str(route["listen"])
        raise DemoFailed(f"the lab has no link from {source} to {destination}")

    def lab_do(self, *argv: str) -> str:
        return self.command("lab", *argv, "--dir", str(self.lab_directory))

    def status(self, node: str) -> dict[str, Any]:
        """What one node says of the cluster."""
        control = self.lab["nodes"][node]["control"]
        document: dict[str, Any] = self.json("clusterctl", "--node", control, "status", "--json")
        return document

    def vm(self, name: str, node: str) -> dict[str, Any]:
        document: dict[str, Any] = self.status(node)["vms"].get(name, {})
        return document

    def wait_vm(
        self, name: str, node: str, state: str, seconds_max: float, *, other_than: str | None = None
    ) -> dict[str, Any]:
        """The VM's entry, once ``node`` says it is in ``state`` (and not owned by ``other_than``)."""

        def probe() -> dict[str, Any] | None:
            vm = self.vm(name, node)
            return vm if vm.get("state") == state and vm.get("owner") != other_than else None

        return self.wait(f"VM {name} {state} as seen by {node}", seconds_max, probe)

    def wait_node(self, name: str, seen_by: str, state: str, seconds_max: float) -> dict[str, Any]:
        def probe() -> dict[str, Any] | None:
            node = self.status(seen_by)["nodes"].get(name, {})
            return node if node.get("state") == state else None

        return self.wait(f"node {name} {state} as seen by {seen_by}", seconds_max, probe)

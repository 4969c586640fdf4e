"""What a lab remembers between two commands: DIR/state.json (its own), DIR/lab.json (for everybody).

``lab.json`` is published while the lab is up, with the direct addresses; ``state.json`` stays when it is
down, so that the logs can still be read and the directory is known to be a lab's.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any, Final

import attrs

from daemonkit.durable import lock_file, read_small_file, replace_file
from daemonkit.errors import OperatorError
from daemonkit.schema import structure, unstructure
from holdfast.lab.layout import Layout
from holdfast.lab.processes import ProcessRecord, lives

STATE_BYTES_MAX: Final = 16 << 20
PROXY: Final = "proxy"
SHARED_MEMORY: Final = Path("/dev/shm")


@attrs.frozen
class LabState:
    """``processes``: what was started and not ended by the lab, by name (``n1`` is its clusterd)."""

    lab_id: str
    layout: Layout
    processes: dict[str, ProcessRecord] = attrs.field(factory=dict)

    @property
    def shared_dir(self) -> Path:
        """Where the lab's diskd keeps its shared bitmaps: its own directory, gone when the lab is down."""
        parent = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
        return parent / f"holdfast-lab-{self.lab_id}"

    def pid(self, name: str) -> int | None:
        record = self.processes.get(name)
        return record.pid if record is not None and lives(record) else None


def state_home() -> Path:
    """Where this user's lab and the note about the last one live."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "holdfast"


def default_directory() -> Path:
    """For ``lab up`` without --dir."""
    return state_home() / "lab"


def remember_directory(directory: Path) -> None:
    """This lab was brought up last."""
    state_home().mkdir(parents=True, exist_ok=True)
    replace_file(state_home() / "last-lab", f"{directory}\n".encode())


def last_directory() -> Path:
    """The lab that this user brought up last. Raises OperatorError."""
    try:
        text = read_small_file(state_home() / "last-lab").decode()
    except FileNotFoundError:
        raise OperatorError("no lab was brought up yet: use `lab up`, or name one with --dir") from None
    return Path(text.strip())


def read_state(directory: Path) -> LabState:
    """Raises OperatorError where the directory is no lab."""
    path = directory / "state.json"
    try:
        document = json.loads(read_small_file(path, size_bytes_max=STATE_BYTES_MAX))
    except FileNotFoundError:
        raise OperatorError(f"{directory} is no lab: `lab up --dir {directory}` makes one") from None
    except (OSError, ValueError) as error:
        raise OperatorError(f"{path}: cannot be read: {error}") from error
    return structure(LabState, document, where=str(path))


def write_state(directory: Path, state: LabState) -> None:
    """Both files, so that nobody reads a pid that is not there any more."""
    replace_file(directory / "state.json", json.dumps(unstructure(state)).encode())
    if PROXY in state.processes:
        replace_file(directory / "lab.json", (json.dumps(lab_document(state), indent=2) + "\n").encode())


def lab_document(state: LabState) -> dict[str, Any]:
    """lab.json: the addresses that bypass the proxies, and the pids; null where a process does not run."""
    direct = state.layout.direct
    return {
        "nodes": {
            node: {"control": direct[f"{node}.control"], "pid": state.pid(node), **_diskd(state, node)}
            for node in state.layout.nodes
        },
        "diskd": {
            "control": direct["diskd.control"],
            "nbd": direct["diskd.nbd"],
            "pid": state.pid("diskd"),
            "shared_dir": str(state.shared_dir),
        },
        "target": {"listen": direct["target"], "pid": state.pid("target")},
        "store": {"url": f"http://{direct['store']}", "pid": state.pid("store")},
    }


def _diskd(state: LabState, node: str) -> dict[str, Any]:
    if not state.layout.diskd_per_node:
        return {}
    addresses = {part: state.layout.direct[f"{node}.diskd.{part}"] for part in ("nbd", "control")}
    return {"diskd": {**addresses, "pid": state.pid(f"{node}.diskd")}}


def lock_directory(directory: Path) -> int:
    """One command changes a lab at a time. Raises OperatorError where another one does."""
    return lock_file(directory / "lock")

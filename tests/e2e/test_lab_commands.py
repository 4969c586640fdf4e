"""The lab's command line with real daemons behind it, as a user types it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.lab import processes
from holdfast.lab.state import read_state

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
SCENARIO = Path(__file__).parents[2] / "scenarios" / "pulled-cable"


def run(tmp_path: Path, *argv: str, code: int = 0) -> str:
    done = subprocess.run(
        [str(Path(sys.executable).parent / argv[0]), *argv[1:]],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")},
    )
    assert done.returncode == code, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout if code == 0 else done.stderr


def test_lab_commands_up_env_status_guest_down(tmp_path: Path) -> None:
    directory = tmp_path / "lab"
    run(tmp_path, "lab", "up", "--nodes", "2", "--networks", "2", "--dir", str(directory))
    lab_id = read_state(directory).lab_id
    try:
        document = json.loads((directory / "lab.json").read_text())
        assert list(document) == ["nodes", "diskd", "target", "store"]
        assert all(Path(f"/proc/{node['pid']}").exists() for node in document["nodes"].values())
        assert "a lab is up" in run(tmp_path, "lab", "up", "--dir", str(directory), code=1)
        environment = dict(
            line.removeprefix("export ").split("=", 1) for line in run(tmp_path, "lab", "env").splitlines()
        )
        assert environment["HOLDFAST_DISKD"] == document["diskd"]["control"]
        nodes = environment["HOLDFAST_NODE"]
        assert nodes.split(",") == [node["control"] for node in document["nodes"].values()]
        cluster = json.loads(run(tmp_path, "clusterctl", "--node", nodes.split(",")[1], "status", "--json"))
        assert {name: node["state"] for name, node in cluster["nodes"].items()} == {"n1": "up", "n2": "up"}
        assert cluster["properties"]["heartbeat_interval"] == 0.2

        run(tmp_path, "lab", "guest", "add", "web", "--on", "n2", "--size", "8MiB")
        verdict = json.loads(run(tmp_path, "lab", "guest", "check", "web", "--json"))
        assert (verdict["lost"], verdict["overlaps"]) == (0, 0) and verdict["records"] > 0
        assert verdict["owners"][0][1] == "n2" and verdict["longest_gap_s"] < 60
        assert "n1→n2" in run(tmp_path, "lab", "cut", "n1", "n2", "--one-way", "--network", "a")
        assert "every link is whole" in run(tmp_path, "lab", "heal")
        status = json.loads(run(tmp_path, "lab", "status", "--json"))
        assert status["up"] and status["cluster"]["vms"]["web"]["owner"] == "n2"
        assert "no node 'n9'" in run(tmp_path, "lab", "isolate", "n9", code=1)
        run(tmp_path, "lab", "pause", "n2.web")
        run(tmp_path, "lab", "resume", "n2.web")
    finally:
        run(tmp_path, "lab", "down", "--dir", str(directory))
    assert processes.marked(lab_id) == []
    run(tmp_path, "lab", "down", "--dir", str(directory))


def test_lab_runs_the_pulled_cable_on_real_processes(tmp_path: Path) -> None:
    directory = tmp_path / "lab"
    said = run(tmp_path, "lab", "run", str(SCENARIO), "--dir", str(directory))
    assert said.splitlines()[-1] == "pulled-cable: passed"
    assert "0 lost, 0 overlaps" in said
    assert processes.marked(read_state(directory).lab_id) == []

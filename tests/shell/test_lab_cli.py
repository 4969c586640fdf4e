"""The lab's command line where no cluster is needed: one clear line for everything that cannot be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from daemonkit.errors import OperatorError
from holdfast.lab.cluster import Lab, prepare_directory
from holdfast.lab.layout import plan
from holdfast.lab.processes import ProcessRecord
from holdfast.lab.state import LabState, read_state, write_state


def lab(tmp_path: Path, *argv: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "holdfast.lab.cli", *argv],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")},
    )


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["down"], 1, "no lab was brought up yet"),
        (["isolate", "n1", "--dir", "nowhere"], 1, "is no lab"),
        (["up", "--store", "etcd"], 1, "--store etcd is not built"),
        (["up", "--nodes", "0"], 1, "a lab has 1 to 32 nodes"),
        (["up", "--set", "heartbeat_interval"], 2, "PROPERTY=VALUE"),
        (["up", "--dir", "full"], 1, "is not empty"),
        (["delay", "n1", "n2", "fast"], 2, "not a duration"),
        (["loss", "n1", "n2", "2"], 2, "0.0<=x<=1.0"),
        (["soak", "--seed", "1", "--minutes", "1"], 1, "soak is not built"),
        (["run", "full"], 1, "scenario.toml"),
        (["explode"], 2, "explode"),
    ],
)
def test_lab_cli_refuses_in_one_line(tmp_path: Path, argv: list[str], code: int, said: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    done = lab(tmp_path, *argv)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "full" / "thesis.tex").read_text() == "precious"


def test_lab_cli_help_tells_the_words(tmp_path: Path) -> None:
    done = lab(tmp_path, "--help")
    assert done.returncode == 0
    for word in ("PROCESS", "isolate", "Ends of a link", "lab guest check"):
        assert word in done.stdout


def a_lab(directory: Path) -> Lab:
    layout = plan(2, 1, iter(range(20_000, 30_000)))
    made = Lab(directory, LabState("an-id-that-nothing-carries", layout))
    made._remember({})
    return made


def test_lab_state_survives_and_tells_only_live_processes(tmp_path: Path) -> None:
    written = a_lab(tmp_path).state
    dead = ProcessRecord(os.getpid(), "1")
    written = LabState(written.lab_id, written.layout, {"n1": dead})
    write_state(tmp_path, written)
    assert read_state(tmp_path) == written
    document = Lab.load(tmp_path).document()
    assert list(document) == ["nodes", "diskd", "target", "store"]
    assert document["nodes"]["n1"] == {"control": written.layout.direct["n1.control"], "pid": None}
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(OperatorError, match="cannot be read"):
        read_state(tmp_path)


def test_lab_that_is_down_refuses_verbs_and_gives_its_directory_back(tmp_path: Path) -> None:
    directory = tmp_path / "lab"
    directory.mkdir()
    a_lab(directory)
    for argv in (["isolate", "n1"], ["kill", "diskd"], ["guest", "check", "web"], ["env"]):
        done = lab(tmp_path, *argv, "--dir", "lab")
        assert (done.returncode, done.stdout) == (1, "")
        assert "is down" in done.stderr and done.stderr.count("\n") == 1
    assert lab(tmp_path, "down", "--dir", "lab").returncode == 0
    assert lab(tmp_path, "status", "--dir", "lab").stdout.startswith(f"lab in {directory}: down")
    prepare_directory(directory)
    assert [entry.name for entry in directory.iterdir()] == ["lock"]


def test_lab_process_names(tmp_path: Path) -> None:
    made = a_lab(tmp_path)
    for name in ("n1", "n2.clusterd", "diskd", "store", "target", "n1.web"):
        with pytest.raises(OperatorError, match=r"does not run|no VM 'web' runs on n1"):
            made.records_of(name)
    for name in ("n3", "store.1", "n1.", "proxy", ""):
        with pytest.raises(OperatorError, match=r"no process of this lab|is one process|does not run"):
            made.records_of(name)

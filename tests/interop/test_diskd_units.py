"""The systemd units, as far as they can be judged without a systemd that runs."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from diskd_process import BINARIES

ROOT = Path(__file__).resolve().parents[2]
UNITS = sorted((ROOT / "docs/systemd").glob("*.service"))
SOCKETS = sorted((ROOT / "docs/systemd").glob("*.socket"))

pytestmark = pytest.mark.interop


@pytest.fixture(scope="session")
def analyze() -> str:
    path = shutil.which("systemd-analyze")
    if path is None:
        pytest.skip("systemd-analyze is not installed (Debian package systemd)")
    return path


def installed(unit: Path, folder: Path) -> Path:
    """The unit with the programs of this checkout: where it will be installed, nothing is yet."""
    path = folder / unit.name
    path.write_text(unit.read_text().replace("/opt/holdfast/.venv/bin", str(BINARIES)))
    return path


@pytest.mark.parametrize("unit", [*UNITS, *SOCKETS], ids=lambda path: path.name)
def test_systemd_understands_every_line(analyze, unit, tmp_path):
    if unit in SOCKETS:  # it is verified together with what it starts
        installed(unit.with_suffix(".service"), tmp_path)
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(installed(unit, tmp_path))], capture_output=True, text=True
    )
    complaints = [line for line in done.stderr.splitlines() if unit.name in line]
    assert done.returncode == 0 and not complaints, done.stderr


@pytest.mark.parametrize(
    "unit", [unit for unit in UNITS if unit.name != "clusterd.service"], ids=lambda p: p.name
)
def test_what_does_not_start_vms_is_locked_in(analyze, unit, tmp_path):
    """systemd's own measure of exposure, 0 to 10; clusterd's limits would be the VMs' too."""
    path = installed(unit, tmp_path)
    done = subprocess.run(
        [analyze, "security", "--offline=true", "--threshold=30", str(path)], capture_output=True, text=True
    )
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze cannot judge a unit offline")
    assert done.returncode == 0, done.stdout[-400:]


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_every_unit_is_watched_and_starts_again(unit):
    text = unit.read_text()
    for line in ("Type=notify", "NotifyAccess=main", "WatchdogSec=30", "Restart=always"):
        assert re.search(f"^{line}$", text, re.MULTILINE), line

"""The link proxies as a process."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from daemonkit.ports import Address


def _run_process(tmp_path: Path, text: str) -> "subprocess.Popen[str]":
    config = tmp_path / "proxy.json"
    config.write_text(text)
    argv = [sys.executable, "-m", "holdfast.lab.proxy", "--config", str(config)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_proxy_process_says_where_it_serves_and_ends_cleanly(tmp_path: Path) -> None:
    document = {"ends": ["n1", "n2"], "control": "127.0.0.1:0", "routes": [], "seed": 1}
    with _run_process(tmp_path, json.dumps(document)) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["event"] == "ready" and Address.parse(ready["control"]).port > 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


@pytest.mark.parametrize("text", ["{", "{}", '{"ends": [], "control": "nowhere", "routes": []}'])
def test_proxy_process_refuses_a_bad_config_in_one_line(tmp_path: Path, text: str) -> None:
    with _run_process(tmp_path, text) as process:
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 1
        assert errors.startswith("holdfast.lab.proxy: ") and errors.count("\n") == 1

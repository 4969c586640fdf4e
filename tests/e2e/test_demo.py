"""`make demo` is a promise of the README: it must hold on every commit."""

import subprocess
import sys

import pytest


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_demo_shows_what_it_promises():
    done = subprocess.run(
        [sys.executable, "-m", "holdfast.demo"], capture_output=True, text=True, timeout=380, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "What happened" in done.stdout
    assert "demo: all of it is so" in done.stdout

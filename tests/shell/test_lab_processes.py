"""The lab's processes: started apart, known by identity, ended and nobody else's."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from daemonkit.errors import OperatorError
from holdfast.lab import processes
from holdfast.lab.processes import ProcessRecord

READY = "import json, sys, time; print(json.dumps({'event': 'ready'}), flush=True); "
SLEEP = READY + "time.sleep(60)"


def argv(code: str) -> list[str]:
    return [sys.executable, "-c", code]


async def spawn(tmp_path: Path, code: str, **environment: str) -> ProcessRecord:
    return await processes.spawn(
        "it", argv(code), log=tmp_path / "it.log", environment={**os.environ, **environment}
    )


async def test_lab_process_is_detached_and_ended(tmp_path: Path) -> None:
    record = await spawn(tmp_path, SLEEP)
    assert processes.lives(record)
    assert os.getsid(record.pid) == record.pid
    inherited = {os.readlink(f"/proc/{record.pid}/fd/{number}") for number in (0, 1, 2)}
    ours = {os.readlink(f"/proc/self/fd/{number}") for number in (0, 1, 2)} - {"/dev/null"}
    assert not inherited & ours
    assert str(tmp_path / "it.log") in inherited
    await processes.end([record], seconds_max=5)
    assert not processes.lives(record)
    await processes.end([record], seconds_max=5)


async def test_lab_process_that_does_not_listen_to_reason_is_killed(tmp_path: Path) -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP
    record = await spawn(tmp_path, stubborn)
    processes.send(record, signal.SIGSTOP)
    await processes.end([record], seconds_max=0.1)
    assert not processes.lives(record)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit('it: port in use')", "it: port in use"),
        ("print('hello', flush=True); import time; time.sleep(60)", "it said nothing"),
        ("pass", "it said nothing"),
    ],
)
async def test_lab_process_that_does_not_come_up_is_told_and_gone(
    tmp_path: Path, code: str, said: str
) -> None:
    with pytest.raises(OperatorError, match=said):
        await spawn(tmp_path, code, **{processes.LAB_ID: "never-up"})
    assert await processes.wait_gone([one.record for one in processes.marked("never-up")], 5) == []


async def test_lab_processes_are_found_by_the_labs_id_and_no_other(tmp_path: Path) -> None:
    lab_id = f"test-{os.getpid()}"
    vm = await spawn(tmp_path, SLEEP, HOLDFAST_LAB=lab_id, HOLDFAST_HOST="n1", HOLDFAST_VM="web")
    plain = await spawn(tmp_path, SLEEP, HOLDFAST_LAB=lab_id)
    other = await spawn(tmp_path, SLEEP, HOLDFAST_LAB=f"{lab_id}-another")
    try:
        found = processes.marked(lab_id)
        assert {one.record for one in found} == {vm, plain}
        assert {(one.host, one.vm) for one in found} == {("n1", "web"), (None, None)}
    finally:
        await processes.end([vm, plain, other], seconds_max=5)
    assert processes.marked(lab_id) == []


def test_lab_never_signals_a_later_process_of_the_same_number() -> None:
    with subprocess.Popen(argv("input()"), stdin=subprocess.PIPE) as child:
        real = processes.start_time(child.pid)
        assert real is not None
        earlier = ProcessRecord(child.pid, str(int(real) - 1))
        assert not processes.lives(earlier)
        assert not processes.send(earlier, signal.SIGKILL)
        assert processes.send(ProcessRecord(child.pid, real), signal.SIGKILL)
    assert not processes.lives(ProcessRecord(child.pid, real))


def test_lab_ports_are_free_and_different() -> None:
    ports = processes.free_ports(lambda count: count - 3)
    chosen = [next(ports) for _ in range(50)]
    assert len(set(chosen)) == 50
    assert all(port in processes.PORTS for port in chosen)

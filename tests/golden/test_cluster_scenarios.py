"""Every scenario of scenarios/, in the simulator: passes, and with exactly the recorded trace.

``clusterd simulate scenarios/NAME --rewrite`` records a trace anew; only commit the changes if you
understand what caused them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clusterd.core.effects import SendHeartbeat
from clusterd.core.types import EventName
from clusterd.sim.run import ScenarioRun, expected_trace, load_scenario, rewrite, simulate
from clusterd.sim.world import Host, World

ROOT = Path(__file__).resolve().parents[2] / "scenarios"
SCENARIOS = sorted(path.name for path in ROOT.iterdir() if (path / "scenario.toml").exists())


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario_passes_with_its_exact_trace(name: str) -> None:
    result = simulate(ROOT / name)
    assert result.failures == []
    assert result.trace == expected_trace(ROOT / name)
    assert (ROOT / name / "README.md").exists()


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_other_seeds_pass_as_well(seed: int) -> None:
    for name in ("pulled-cable", "minority", "flapping", "store-lost", "mass-failure-back"):
        assert simulate(ROOT / name, seed).failures == [], name


def test_traces_do_not_depend_on_the_hash_seed() -> None:
    program = (
        "import sys; from pathlib import Path; from clusterd.sim.run import simulate; "
        "print('\\n'.join(simulate(Path(sys.argv[1])).trace))"
    )
    for hash_seed in ("0", "4711"):
        run = subprocess.run(
            [sys.executable, "-c", program, str(ROOT / "pulled-cable")],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.splitlines() == expected_trace(ROOT / "pulled-cable")


def test_a_failing_scenario_says_what_did_not_come_true_and_is_not_recorded(tmp_path: Path) -> None:
    text = (ROOT / "short-cut" / "scenario.toml").read_text()
    (tmp_path / "scenario.toml").write_text(text + '[[steps]]\nexpect = "vm web held"\nwithin = "1s"\n')
    assert rewrite(tmp_path).failures == ["expected within 1s: vm web held"]
    assert expected_trace(tmp_path) is None


def crash_after(k: int, name: str) -> ScenarioRun:
    """The scenario, with the clusterd of a node killed before its k-th effect (heartbeats apart), and
    started again half a second later from what it had persisted."""
    scenario = load_scenario(ROOT / name)
    world = World(scenario.node_names, seed=scenario.seed)
    counts = dict.fromkeys(scenario.node_names, 0)

    def cut(host: Host, effect: object) -> bool:
        if isinstance(effect, SendHeartbeat):
            return False
        counts[host.name] += 1
        if counts[host.name] != k:
            return False
        world.after(500_000_000, lambda: world.start(host))
        return True

    world.cut_after = cut
    run = ScenarioRun(scenario, world)
    run.run()
    return run


@pytest.mark.parametrize("name", ["long-cut", "host-dies"])
def test_crash_anywhere(name: str) -> None:
    """Cut the effects of every node after every few of them: whatever the timing then does to the story's
    deadlines, no invariant breaks (S1 to S7), and nothing but an expectation may fail."""
    for k in range(1, 120, 5):
        run = crash_after(k, name)
        broken = [text for text in run.failures if "invariant" in text or "overlap" in text]
        assert not broken, (k, broken)
        processes = {vm.name: run.world.processes_of(vm.name) for vm in run.scenario.vms}
        for vm, live in processes.items():
            images = run.world.storage.image(vm)
            writers = [process for _, process in live if process.epoch == images.epoch]
            assert len(writers) <= 1 or not images.journal, (k, vm)


def test_every_declared_event_occurs_in_a_golden() -> None:
    told = "".join("\n".join(expected_trace(ROOT / name) or []) for name in SCENARIOS)
    for stories in ("test_cluster_stories.py", "test_cluster_recovery.py"):
        told += (Path(__file__).parent / stories).read_text(encoding="utf-8")
    assert [event.value for event in EventName if event.value not in told] == []

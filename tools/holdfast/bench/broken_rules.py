"""`make broken`: break a rule of DESIGN.md section 4 on purpose, and see a test fail.

Each break edits one place in a copy of the tree and runs the tests that guard the rule. The edit must find
its text exactly once, or the break is stale and that is a failure too; the tests must fail (pytest's exit
code 1), not stumble over an import. First of all the same tests must pass in a copy in which nothing is
broken: a test that fails there catches nothing. A break that no test notices is reported, with exit code 1.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from daemonkit.cli import run_main
from daemonkit.errors import OperatorError, UsageError
from holdfast.bench import breaks
from holdfast.bench.breaks import Break
from holdfast.bench.cluster_breaks import CLUSTER_BREAKS
from holdfast.bench.diskd_breaks import DISKD_BREAKS
from holdfast.bench.target_breaks import TARGET_BREAKS

BREAKS = (*CLUSTER_BREAKS, *breaks.BREAKS, *DISKD_BREAKS, *TARGET_BREAKS)
ROOT = Path(__file__).resolve().parents[3]
COPIED = ("src", "tools", "tests", "scenarios", "docs", "pyproject.toml", "README.md", "Makefile", "LICENSE")
TESTS_FAILED = 1  # pytest's exit code for exactly that
TEST_SECONDS_MAX = 600
# Not named after the project: a test looks for its files among all mappings by that name.
PREFIX = "broken-rules-"


def copy_tree(to: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, to / name)


def apply(break_: Break, tree: Path) -> str | None:
    """Edit the copy; the reason why that is not possible any more, or None."""
    path = tree / break_.file
    text = path.read_text() if path.exists() else ""
    count = text.count(break_.old)
    if count != 1:
        return f"stale: its text occurs {count} times in {break_.file}"
    path.write_text(text.replace(break_.old, break_.new))
    return None


def run_tests(tests: tuple[str, ...], tree: Path) -> tuple[int, str]:
    """pytest's exit code, and the first test that failed or what pytest said last."""
    path = f"{tree / 'src'}:{tree / 'tools'}"
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    argv = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        argv, cwd=tree, env=environment, capture_output=True, text=True, check=False, timeout=TEST_SECONDS_MAX
    )
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    if failed:
        return done.returncode, failed[0].removeprefix("FAILED ").split(" - ")[0]
    return done.returncode, f"pytest exited {done.returncode}: {done.stdout.strip().splitlines()[-1:]}"


def check_whole(breaks: list[Break]) -> None:
    """Raises OperatorError unless all their tests pass where nothing is broken."""
    tests = tuple(sorted({test for break_ in breaks for test in break_.tests}))
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        copy_tree(Path(name))
        code, said = run_tests(tests, Path(name))
    if code:
        raise OperatorError(f"the tests do not pass even with nothing broken: {said}")
    print("whole   nothing broken: every test passes", flush=True)


@click.command()
@click.argument("names", nargs=-1)
@click.option("--list", "only_list", is_flag=True, help="Show the breaks and what each does.")
def main(names: tuple[str, ...], only_list: bool) -> None:
    """Break rules on purpose (all of them, or NAMES) and report which test caught each."""
    unknown = sorted(set(names) - {break_.name for break_ in BREAKS})
    if unknown:
        raise UsageError(f"no break is called {', '.join(unknown)}: --list shows them")
    chosen = [break_ for break_ in BREAKS if not names or break_.name in names]
    if only_list:
        for break_ in chosen:
            print(f"{break_.name}: {break_.rule}: {break_.what}")
        return
    check_whole(chosen)
    missed = 0
    for break_ in chosen:
        with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
            tree = Path(name)
            copy_tree(tree)
            reason = apply(break_, tree)
            code, by = (0, reason) if reason else run_tests(break_.tests, tree)
        caught = code == TESTS_FAILED
        missed += not caught
        print(f"{'caught' if caught else 'MISSED'}  {break_.name} ({break_.rule}): {by}", flush=True)
    print(f"broken: {len(chosen) - missed} of {len(chosen)} breaks caught")
    if missed:
        raise OperatorError(f"{missed} broken rules went unnoticed or are stale")


if __name__ == "__main__":
    run_main(main)

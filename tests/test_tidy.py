"""The tree's own rules, checked as tests: sizes, silenced checks, docstrings, scenarios."""

import ast
import re
from pathlib import Path

import pytest

from holdfast.bench.broken_rules import BREAKS

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("tools/**/*.py")])
TESTS = sorted(ROOT.glob("tests/**/*.py"))
FUNCTION_LINES_MAX = 70
MODULE_LINES_MAX = 500


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def _body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MODULE_LINES_MAX, "split the module along its responsibilities"
    long = {
        f.name: _body_lines(f) for f in _functions(ast.parse(text)) if _body_lines(f) > FUNCTION_LINES_MAX
    }
    assert not long


@pytest.mark.parametrize("path", TESTS, ids=_name)
def test_sizes_of_tests(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MODULE_LINES_MAX, "split the tests by subject"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_a_module_tells_its_story(path: Path) -> None:
    text = path.read_text()
    if path.name != "__init__.py" or text.strip():
        assert ast.get_docstring(ast.parse(text)), "a module starts with a docstring"


@pytest.mark.parametrize("path", [p for p in SOURCES if "/core/" in str(p)], ids=_name)
def test_public_functions_of_the_core_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    bare = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("_")
        and ast.get_docstring(node) is None
    ]
    assert not bare


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=_name)
def test_silenced_checks_say_why(path: Path) -> None:
    """``noqa`` names its rule and a reason; so does a ``type: ignore`` outside tests."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if path == Path(__file__):
            continue
        match = re.search(r"#\s*noqa(.*)$", line)
        if match:
            assert re.match(r": [A-Z]+[0-9]+(, ?[A-Z]+[0-9]+)*( |$)", match[1]), f"line {number}: bare noqa"


@pytest.mark.parametrize("path", TESTS, ids=_name)
def test_tests_wait_for_conditions(path: Path) -> None:
    """No mocks, no patching: fakes pass the same contract test as the real thing."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            assert not any("mock" in name.split(".") for name in names)
        if isinstance(node, ast.arg):
            assert node.arg not in ("monkeypatch", "mocker")


def test_every_scenario_is_described() -> None:
    for scenario in sorted((ROOT / "scenarios").iterdir()):
        if scenario.is_dir():
            assert (scenario / "README.md").exists(), scenario.name
            assert (scenario / "scenario.toml").exists(), scenario.name


def test_nothing_is_left_to_do() -> None:
    marks = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error")))
    for path in SOURCES:
        assert not marks.search(path.read_text()), _name(path)


def test_test_files_have_unique_names() -> None:
    names = [path.name for path in TESTS if path.name.startswith("test_")]
    assert len(names) == len(set(names)), "importlib mode wants unique module names"


def test_every_break_of_a_rule_still_finds_its_place() -> None:
    """`make broken` takes minutes; that its edits are not stale is seen here."""
    for break_ in BREAKS:
        assert (ROOT / break_.file).read_text().count(break_.old) == 1, break_.name
        assert all((ROOT / test).exists() for test in break_.tests), break_.name

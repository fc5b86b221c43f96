"""The house stands as it is drawn: import arrows, places of Ray and MLflow, a light start."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ("configs", "pipelines", "training", "evaluation", "infra")
FILES = sorted(path for package in ORDER for path in (ROOT / package).rglob("*.py"))


def modules(path: Path) -> set[str]:
    """Everything a file imports, inside functions and for types too, by full name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def imported(path: Path) -> set[str]:
    """Top-level names of everything a file imports."""
    return {name.split(".")[0] for name in modules(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_left_only(path):
    package = path.relative_to(ROOT).parts[0]
    allowed = set(ORDER[: ORDER.index(package) + 1])
    assert imported(path) & set(ORDER) <= allowed
    assert "tests" not in imported(path)
    if package != "infra":
        assert not imported(path) & {"ray", "mlflow"}
    if package == "configs":
        assert "torch" not in imported(path)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_unpickle_nothing(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    assert path.name != "utils.py"
    assert path.name != "__init__.py" or not text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert safe.get("weights_only") == "True"
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"pickle.load", "pickle.loads"}


def test_no_files_import_each_other_in_a_circle():
    ours = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    graph = {name: modules(path) & (set(ours) - {name}) for name, path in ours.items()}
    assert sum(map(len, graph.values())) > 300
    tuple(TopologicalSorter(graph).static_order())  # raises on a circle, and names it


def test_the_command_line_starts_light():
    code = "import sys, infra.cli; print([m for m in ('torch', 'ray', 'mlflow', 'matplotlib') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"

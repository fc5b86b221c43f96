"""The structure of the code: import direction, no cycles, small folders, unique names, docstrings, a light start."""

import ast
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ("configs", "pipelines", "training", "evaluation", "infra")
FILES = sorted(path for package in ORDER for path in (ROOT / package).rglob("*.py"))
MODULES = [path for path in FILES if path.name != "__init__.py"]
MOST_MODULES = 14
"""In one folder."""


def name_of(path: Path) -> str:
    """`metagmvae.training.models.conv` for `training/models/conv.py`."""
    return ".".join(["metagmvae", *path.relative_to(ROOT).with_suffix("").parts])


def imports_of(path: Path) -> set[str]:
    """Everything a file imports, by full name; imports inside functions and for type checking count."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def import_graph() -> dict[str, set[str]]:
    """Each module of the project with the modules of the project that it imports."""
    ours = {name_of(path) for path in MODULES}
    return {name_of(path): imports_of(path) & (ours - {name_of(path)}) for path in MODULES}


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """Names along one import cycle; empty where there is none."""
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_package_imports_only_packages_before_it(path):
    package = path.relative_to(ROOT).parts[0]
    imported = {name.split(".")[0] for name in imports_of(path)}
    ours = {name.split(".")[1] for name in imports_of(path) if name.startswith("metagmvae.")}
    assert ours <= set(ORDER[: ORDER.index(package) + 1])
    assert not imported & {*ORDER, "tests"}, "import metagmvae.<package>: other top-level names are the user's"
    if package != "infra":
        assert not imported & {"ray", "mlflow"}
    if package == "configs":
        assert "torch" not in imported


def test_no_import_cycle_between_modules():
    graph = import_graph()
    assert sum(map(len, graph.values())) > 300
    assert cycle_in(graph) == []


def test_no_import_cycle_between_folders():
    """A module directly in a package counts as one of the folder that is the package itself."""
    folders = defaultdict(set)
    for module, imported in import_graph().items():
        folder = module.rpartition(".")[0]
        folders[folder] |= {name.rpartition(".")[0] for name in imported} - {folder}
    assert len(folders) > 25
    assert cycle_in(folders) == []


def test_a_cycle_is_found():
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(cycle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}


def test_folders_are_small():
    sizes = Counter(path.parent.relative_to(ROOT) for path in MODULES)
    assert {str(folder): size for folder, size in sizes.items() if size > MOST_MODULES} == {}


def test_no_two_packages_share_a_module_name():
    packages = defaultdict(set)
    for path in MODULES:
        packages[path.name].add(path.relative_to(ROOT).parts[0])
    assert {name: found for name, found in packages.items() if len(found) > 1} == {}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_names_have_docstrings(path):
    """Modules, classes, functions, and methods of public classes."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "module without docstring"
    if path.name == "__init__.py":
        assert len(path.read_text().splitlines()) == 1, "one docstring line says what the folder holds, nothing else"
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, definitions) and not node.name.startswith("_")]
    public = [node for node in public if "overload" not in map(ast.unparse, node.decorator_list)]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_unpickle_nothing(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    assert path.name != "utils.py"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert safe.get("weights_only") == "True"
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"pickle.load", "pickle.loads"}


def test_every_folder_is_in_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {name_of(path.parent / "x").rpartition(".")[0] for path in FILES}
    assert sorted(listed) == sorted({"metagmvae", *folders})


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("metagmvae", ("torch", "ray", "mlflow", "matplotlib", "numpy", "pydantic")),
        ("metagmvae.infra.cli", ("torch", "ray", "mlflow", "matplotlib", "numpy", "pydantic")),
        # Every worker of a training imports it: what it does not need would delay the start of all of them.
        ("metagmvae.infra.runs.train_in_process", ("ray", "mlflow", "matplotlib", "sklearn", "scipy", "pandas")),
        ("metagmvae.infra.workflows.run_training", ("ray", "mlflow", "matplotlib", "sklearn", "scipy.stats", "pandas")),
    ],
)
def test_importing_is_light(module, heavy):
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"

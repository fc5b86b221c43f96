"""Mutation testing of the mathematics and of the data paths. Run by hand; it takes about ten minutes.

    .venv/bin/python tests/mutation.py                    all mutations of `mutations.toml`
    .venv/bin/python tests/mutation.py objectives photos  those of the files whose path contains one of the words

Each mutation replaces one text in one file by a wrong one, and the tests named in its entry must then fail. Mutations
are made one at a time in a temporary copy of the working tree, never in the working tree itself. One line for each
mutation says whether it was killed (a test failed) or survived (all tests passed).

Exit code: 0 if all were killed, 1 if one survived, 2 if an entry cannot be tried: its old text does not occur exactly
once, its new text cannot be imported, or a named test fails without any mutation.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from mutation_table import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 600
PASSED, FAILED = 0, 1
"""Exit codes of pytest; others mean that tests could not be run."""


def copy_working_tree(folder: Path) -> Path:
    """Copy tracked and new files to `folder`/metagmvae, which is then the imported package if `folder` is in the path.

    Files that git ignores are left out.
    """
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    package = folder / "metagmvae"
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).is_file():  # not deleted in the working tree
            (package / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, package / name)
    return package


def run_tests(package: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Exit code and last lines of pytest in the copy; tests that do not end count as failed."""
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "OMP_NUM_THREADS": "1"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # a mutated file can have the size and the second of the original
    check = "import sys, metagmvae; sys.exit(metagmvae.__file__ != sys.argv[1])"
    subprocess.run([sys.executable, "-c", check, package / "__init__.py"], cwd=package, env=environment, check=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *(f"tests/{test}" for test in tests),
    ]
    try:
        ended = subprocess.run(
            command, cwd=package, env=environment, check=False, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return FAILED, f"no end after {TIMEOUT_S} s"
    return ended.returncode, "\n".join(ended.stdout.splitlines()[-20:])


def try_mutation(package: Path, mutation: Mutation) -> str:
    """Make one mutation, run its tests, undo it: `killed`, `survived`, or why it could not be tried."""
    path = package / mutation.file
    original = path.read_text(encoding="utf-8")
    if original.count(mutation.old) != 1:
        return f"stale: the old text occurs {original.count(mutation.old)} times"
    path.write_text(original.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        code, _ = run_tests(package, mutation.tests)
    finally:
        path.write_text(original, encoding="utf-8")
    return {PASSED: "survived", FAILED: "killed"}.get(code, f"broken: pytest ended with exit code {code}")


def main(words: Sequence[str]) -> int:
    """Try the mutations whose file contains one of the words (all without words); return the exit code."""
    mutations = [m for m in MUTATIONS if not words or any(word in m.file for word in words)]
    if not mutations:
        print(f"no mutation of a file named {' or '.join(words)}; see tests/mutations.toml")
        return 2
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        package = copy_working_tree(Path(folder))
        code, output = run_tests(package, sorted({test for mutation in mutations for test in mutation.tests}))
        if code != PASSED:
            print(f"{output}\nthe named tests do not pass without any mutation; mend them first")
            return 2
        outcomes = []
        for mutation in mutations:
            start = time.perf_counter()
            outcomes.append(try_mutation(package, mutation))
            seconds = time.perf_counter() - start
            print(f"{outcomes[-1]:9} {mutation.file}: {mutation.what} ({seconds:.0f} s)", flush=True)
    killed, survived = outcomes.count("killed"), outcomes.count("survived")
    untried = len(outcomes) - killed - survived
    print(f"{len(outcomes)} mutations: {killed} killed, {survived} survived, {untried} could not be tried")
    return 1 if survived else 2 if untried else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The notebook infra/api/glyphs.ipynb runs from the first cell to the last, and shows its results."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from typing import Any

import nbformat
import pytest

import metagmvae

NOTEBOOK = Path(metagmvae.__file__).parent / "infra" / "api" / "glyphs.ipynb"


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_notebook_is_stored_without_outputs_and_named_in_the_guide() -> None:
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    assert len(cells) > 5
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    assert "(glyphs.ipynb)" in (NOTEBOOK.parent / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from nbclient import NotebookClient

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    kernel = KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], language="python")
    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", lambda *_: kernel)  # the Python of this test
    notebook = read()
    folder = tmp_path / "work"
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the Jupyter packages
        NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    html = "".join(output.data.get("text/html", "") for output in outputs if "data" in output)
    assert "(1, 28, 28)" in html or "1, 28, 28" in html
    assert re.search(r"[\d.]+ ± [\d.]+ %", html)
    assert "nearest class mean" in html
    (answer,) = [re.search(r"(\d+)% of 30 files are right", output.text) for output in outputs if "text" in output]
    assert answer is not None
    assert int(answer[1]) > 40  # chance is 20
    assert any("image/png" in output.data for output in outputs if "data" in output)

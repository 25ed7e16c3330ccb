"""The notebook is its script, carries no outputs, and runs from top to bottom."""

import os
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "colab" / "quickstart.py"
NOTEBOOK = SCRIPT.with_suffix(".ipynb")


def test_notebook_is_in_sync_with_its_script():
    script, notebook = jupytext.read(SCRIPT), nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    there, here = ([(cell.cell_type, cell.source) for cell in cells] for cells in (notebook.cells, script.cells))
    assert there == here, "run: jupytext --to ipynb colab/quickstart.py"
    assert notebook.metadata.kernelspec == script.metadata.kernelspec


def test_notebook_carries_no_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, "run: jupytext --to ipynb colab/quickstart.py"


@pytest.mark.slow
def test_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("COCONUT_NOTEBOOK_SIZE", "smoke")
    # The kernel starts in an empty folder and must find this checkout, installed or not.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # Raises CellExecutionError with the traceback of a cell that fails.
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 5  # Three of the quickstart, then two beliefs.
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    tables = [output.data["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {})]
    assert len(tables) == 1 and "| coconut " in tables[0] and "| no_cot " in tables[0]
    assert "answer: " in text and "optimal" in text
    assert (tmp_path / "coconut-quickstart" / "results.json").exists()

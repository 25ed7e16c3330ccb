"""Each notebook is its script, carries no outputs, and runs from top to bottom."""

import os
from collections.abc import Sequence
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "colab").glob("*.py"))
TO_WRITE_IT = "run: jupytext --to ipynb colab/*.py"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_is_its_script_and_carries_no_outputs(script: Path) -> None:
    source, notebook = jupytext.read(script), nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    there, here = ([(cell.cell_type, cell.source) for cell in cells] for cells in (notebook.cells, source.cells))
    assert there == here, TO_WRITE_IT
    assert notebook.metadata.kernelspec == source.metadata.kernelspec
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, TO_WRITE_IT


def test_all_install_alike_and_from_no_address_of_ours() -> None:
    cells = [jupytext.read(script).cells for script in SCRIPTS]
    installing = {cell.source for own in cells for cell in own if "pip" in cell.source and cell.cell_type == "code"}
    assert len(installing) == 1 and len(cells) == 3
    assert all("https://" not in cell.source.replace("git+https://ADDRESS", "") for cell in cells[0][2:3])


def run_notebook(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Sequence[nbformat.NotebookNode]:
    """The outputs of a notebook at its smallest size."""
    monkeypatch.setenv("COCONUT_NOTEBOOK_SIZE", "smoke")
    # The kernel starts in an empty folder and must find this checkout, installed or not.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
    notebook = nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}})
    client.execute()  # Raises CellExecutionError with the traceback of a cell that fails.
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def shown(outputs: Sequence[nbformat.NotebookNode], kind: str) -> list[str]:
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = run_notebook("quickstart", tmp_path, monkeypatch)
    assert len(shown(outputs, "image/png")) == 5  # Three of the quickstart, then two beliefs.
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    [table] = shown(outputs, "text/markdown")
    assert "| coconut " in table and "| no_cot " in table
    assert "answer: " in text and "optimal" in text
    assert (tmp_path / "coconut-quickstart" / "results.json").exists()


@pytest.mark.slow
def test_inside_a_thought_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = run_notebook("inside_a_thought", tmp_path, monkeypatch)
    table, *captions = shown(outputs, "text/markdown")
    assert "| noise (all) " in table and len(captions) == len(shown(outputs, "image/png"))
    assert len(captions) >= 2 and len(shown(outputs, "text/html")) >= 1
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "'examples': 8" in text


@pytest.mark.slow
def test_the_table_is_reproduced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = run_notebook("reproduce_the_table", tmp_path, monkeypatch)
    table = "".join(shown(outputs, "text/markdown"))
    assert "| cot " in table and "| coconut " in table and len(shown(outputs, "image/png")) == 1

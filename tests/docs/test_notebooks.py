"""The notebooks hold no outputs, and run on small data."""

import os

import nbclient
import nbformat
import pytest

from tests.markdown_files import REPOSITORY, short_name


NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
SMALL = {"STEPS": 20, "FINE_TUNING_STEPS": 2}  # instead of the values in the cell with the tag "parameters"


def code_cells(path):
    notebook = nbformat.read(path, as_version=4)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_three():
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=short_name)
def test_a_notebook_is_valid_and_holds_no_outputs(path):
    notebook, cells = code_cells(path)
    nbformat.validate(notebook)
    assert [cell for cell in cells if cell.outputs or cell.execution_count] == []
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=short_name)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    notebook, cells = code_cells(path)
    (parameters,) = (cell for cell in cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source += "".join(f"\n{name} = {value}" for name, value in SMALL.items())
    nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert any(cell.outputs for cell in cells)

"""The notebooks of docs/notebooks run from their first cell to their last and end in what they promise."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.support.notebooks import run_notebook

NOTEBOOKS = Path(__file__).resolve().parent.parent / "docs" / "notebooks"

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory that Python imports from, as a notebook's is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_notebook_of_the_shipped_model_ends_in_a_plot(folder: Path) -> None:
    variables = run_notebook(NOTEBOOKS / "shipped_model.ipynb")
    assert variables["shares"] == sorted(variables["shares"], reverse=True)
    assert variables["shares"][0] >= 0.5
    with Image.open(folder / "certified-accuracy.png") as plot:
        assert plot.size == (500, 300)


def test_the_notebook_of_an_own_model_ends_in_certificates(folder: Path) -> None:
    run_notebook(NOTEBOOKS / "own_model.ipynb")
    lines = (folder / "runs" / "shapes" / "results.tsv").read_text().splitlines()[1:]
    assert len(lines) == 6
    certified = [
        line for line in lines if line.split("\t")[2] == line.split("\t")[1] and float(line.split("\t")[3]) > 0
    ]
    assert certified

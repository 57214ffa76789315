"""Run the code cells of a notebook without Jupyter: its Python, its `%%writefile` and its `!densepure-rt` commands."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from tests.support.cli import in_a_process


def code_cells(notebook: Path) -> list[str]:
    """Return the source of each code cell."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run_notebook(notebook: Path) -> dict[str, Any]:
    """Run all cells in the working directory. Returns the variables that they leave."""
    variables: dict[str, Any] = {"__name__": "__main__"}
    for source in code_cells(notebook):
        first, _, rest = source.partition("\n")
        if first.startswith("%%writefile "):
            Path(first.split()[1]).write_text(rest, encoding="utf-8")
        elif first.startswith("!"):
            words = shlex.split(source[1:].replace("\\\n", " "))
            assert words[0] == "densepure-rt"
            done = in_a_process(*words[1:])
            assert done.returncode == 0, done.stderr
            print(done.stdout, done.stderr)
        else:
            exec(compile(source, notebook.name, "exec"), variables)
    return variables

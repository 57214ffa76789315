"""Write each notebook as a page of Markdown. The notebooks are run by the tests, not by Sphinx."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path


def blocks(notebook: Path) -> Iterator[str]:
    """Yield the cells: text as it is, code in a fence."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        shell = source.startswith(("!", "%%"))
        yield source if cell["cell_type"] == "markdown" else f"```{'text' if shell else 'python'}\n{source}\n```"


def write_pages(notebooks: Path, folder: Path) -> None:
    """Write a page for each notebook of a folder."""
    folder.mkdir(exist_ok=True)
    for notebook in sorted(notebooks.glob("*.ipynb")):
        page, text = folder / f"{notebook.stem}.md", "\n\n".join(blocks(notebook)) + "\n"
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")

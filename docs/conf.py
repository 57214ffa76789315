"""Configure Sphinx for `make docs`: MyST pages, the furo theme, and MathJax from a wheel: no page needs a network."""

from __future__ import annotations

import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from command_line import write_page  # noqa: E402  found through sys.path above
from notebook_pages import write_pages  # noqa: E402  found through sys.path above


def mathjax() -> Path:
    """Return the one file of MathJax that typesets TeX as SVG and carries its own fonts."""
    spec = find_spec("sphinx-mathjax-offline")
    if spec is None or spec.origin is None:
        raise SystemExit("MathJax is missing: build with `make docs`, which installs the extra docs")
    return Path(spec.origin).parent / "static" / "mathjax" / "tex-svg.js"


project = "densepure-rt"
author = "the densepure-rt authors"
version = release = metadata.version("densepure-rt")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_generated"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_use_type_comments = False
mathjax_path = "tex-svg.js"
smartquotes = False  # "--option" keeps its two dashes
html_theme = "furo"
html_title = f"densepure-rt {release}"
html_static_path = ["_static", str(mathjax())]
html_css_files = ["tables.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False

write_page(HERE / "_generated" / "command-line.md")
write_pages(HERE / "notebooks", HERE / "_generated")

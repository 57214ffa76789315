"""README and the pages of docs/: their size, links and commands, and that they build."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.support.cli import cli, commands

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "export/zoo/MODEL_CARD.md")
    ),
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_generated" not in path.parts),
]
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """Return a page without its code blocks and inline code."""
    return re.sub(r"`[^`]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as Git hosts and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)) for heading in headings)
    return {heading.strip().lower().replace(" ", "-") for heading in kept}


def commands_of(page: Path) -> Iterator[list[str]]:
    """Yield the words of every `densepure-rt` command in a page, in its code blocks and in running text."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *re.findall(r"`([^`]+)`", FENCE.sub("", text))]:
        found = re.match(r"\s*(?:\$ )?(?:\w+=\S+ )*(?:\S*/)?densepure-rt (.*)", line, re.DOTALL)
        if found:
            words = shlex.split(found[1], comments=True)
            end = next((i for i, word in enumerate(words) if re.match(r"[0-9]?[|&;<>]", word)), len(words))
            yield words[:end]


def test_the_readme_is_short_and_comes_to_the_reader_s_model_early() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.encode()) <= 8 * 1024
    assert next(i for i, line in enumerate(text.splitlines(), 1) if "my model" in line.lower()) < 80
    assert "**not run on a GPU**" in text


def test_the_readme_quotes_six_lines_of_make_demo() -> None:
    (block,) = [block for block in FENCE.findall(README.read_text(encoding="utf-8")) if "runs/demo" in block]
    assert len(block.splitlines()) == 6


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_resolves(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} leads nowhere"
        assert target.is_relative_to(ROOT)
        assert not anchor or anchor in anchors(target), f"{link}: there is no such heading"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_every_command_in_a_page_parses(page: Path) -> None:
    known = commands()
    for name, *arguments in filter(None, commands_of(page)):
        if name.startswith("-"):
            assert name in ("--version", "--help", "-h")
            continue
        if name == "COMMAND":
            continue
        assert name in known
        arguments = [word for word in arguments if word not in ("-h", "--help", "...")]
        if not arguments and any(parameter.required for parameter in known[name].params):  # it is only named
            continue
        known[name].make_context(name, arguments)  # raises on an option or a value that does not exist


def test_pictures_are_small() -> None:
    pictures = [path for path in (ROOT / "docs").rglob("*.png") if "_generated" not in path.parts]
    assert pictures
    assert max(path.stat().st_size for path in pictures) < 200 * 1024


def test_pages_have_commands() -> None:
    assert sum(1 for page in PAGES for _ in commands_of(page)) > 60


def test_every_page_is_in_the_table_of_contents() -> None:
    index = ROOT / "docs" / "index.md"
    listed = set(re.findall(r"^([a-z-]+(?:/[a-z-]+)?)$", index.read_text(encoding="utf-8"), re.MULTILINE))
    pages = {
        page.relative_to(index.parent).with_suffix("").as_posix() for page in PAGES if page.is_relative_to(index.parent)
    }
    assert listed == pages - {"index"}


def test_the_command_that_shows_an_engine_runs() -> None:
    done = cli("inspect", ROOT / "engines" / "unet.onnx")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_forecast_of_the_tutorial_runs() -> None:
    (words,) = [words for words in commands_of(ROOT / "docs" / "tutorial.md") if "--dry-run" in words]
    done = cli(*words)
    assert done.returncode == 0
    assert "no radius beyond" in done.stderr


def test_the_python_of_the_readme_certifies_an_image(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    shipped = np.load(ROOT / "densepure_rt" / "data" / "fashion_mnist_test.npz")
    image = shipped["x"][0].transpose(2, 0, 1)
    names = {"image": image, "images": [image]}
    exec(code, names)
    assert capsys.readouterr().out == f"{shipped['y'][0]} 0.25\n"
    assert names["labels"] == [shipped["y"][0]]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("sphinx") is None, reason="the extra docs is not installed; `make docs` builds them too")
def test_the_documentation_builds_without_warnings_and_needs_no_network(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="(https?:[^"]*)"', page.read_text(encoding="utf-8"))
        assert loaded == [], page.name

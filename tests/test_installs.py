"""The files of pins, held against each other and against `pyproject.toml` without the package index."""

from __future__ import annotations

import re
import sys

import pytest

from tests.installs import HASHED, HASHED_EXTRAS, HASHED_FROM, LOCKS, PINS, ROOT, extras

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PIN = re.compile(r"[a-z0-9-]+==\S+(?: ; .+)?")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}")


def lines_of(name: str) -> list[str]:
    """The lines of a file of pins, without comments and marks of continuation."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return [line.removesuffix("\\").rstrip() for line in text.splitlines() if not line.startswith("#")]


def named(requirement: str) -> str:
    """`Prometheus_Client[x]>=1` as pins have it: prometheus-client."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found
    return re.sub(r"[._-]+", "-", found[0]).lower()


def test_every_pin_of_the_edge_has_hashes_and_is_a_pin_of_the_constraints() -> None:
    pins, seen = set(lines_of(HASHED_FROM)), 0
    lines = lines_of(HASHED)
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if HASH.fullmatch(line):
            continue
        assert PIN.fullmatch(line), line
        assert HASH.fullmatch(after), f"{line} has no hash"
        name, _, version = line.partition(" ; ")[0].partition("==")
        assert any(pin.startswith(f"{name}=={version}") for pin in pins), f"{line} is no pin of {HASHED_FROM}"
        seen += 1
    assert seen > 20


def test_the_edge_pins_all_that_the_package_asks_for_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"]]
    for extra in HASHED_EXTRAS:
        asked += project["optional-dependencies"][extra]
    pinned = {named(line) for line in lines_of(HASHED) if PIN.fullmatch(line)}
    assert {named(requirement) for requirement in asked} <= pinned


EXTRA = re.compile(r"(?:densepure-rt|['`.])\\?\[([a-z][a-z0-9,-]+)\]")
SAYING = ["README.md", "docs/deploy.md", "docs/guides", "CONTRIBUTING.md", "densepure_rt", "export", "runtime"]


def test_every_extra_that_a_text_names_exists() -> None:
    """In the documents, and in what the program says: `pip install '.[NAME]'`."""
    files = [
        path
        for name in SAYING
        for path in ([ROOT / name] if "." in name else (ROOT / name).rglob("*.*"))
        if path.suffix in (".md", ".py")
    ]
    named = {
        (path.name, extra) for path in files for found in EXTRA.findall(path.read_text()) for extra in found.split(",")
    }
    assert len(named) > 20
    assert sorted((name, extra) for name, extra in named if extra not in extras()) == []


def test_every_extra_of_a_gpu_is_in_the_guide_and_in_the_lock_of_its_cuda() -> None:
    guide = (ROOT / "docs" / "guides" / "tensorrt.md").read_text(encoding="utf-8")
    of_gpus = [extra for extra in extras() if re.search(r"-cu1\d$|-jetpack\d$|-rtx$", extra)]
    assert len(of_gpus) == 9
    assert [extra for extra in of_gpus if f"'.[{extra}]'" not in guide] == []
    pins = {cuda: "\n".join(lines_of(name)) for cuda, name in PINS.items()}
    for cuda, text in pins.items():
        assert re.search(rf"^tensorrt-cu{cuda}==", text, re.M)
        assert re.search(rf"^tensorrt-lean-cu{cuda}-libs==", text, re.M)
        assert re.search(rf"^nvidia-cudnn-cu{cuda}==", text, re.M)
    assert re.search(r"^onnxruntime-gpu==1\.26\.", pins[12], re.M)  # the last for CUDA 12


@pytest.mark.parametrize("name", [*LOCKS, HASHED])
def test_no_file_of_pins_names_an_index_or_a_place(name: str) -> None:
    for line in lines_of(name):
        assert PIN.fullmatch(line) or HASH.fullmatch(line), line

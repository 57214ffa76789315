"""docs/own-model.md as it stands: from somebody's own modules and images to a report."""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from densepure_rt.runtime.bundle import read_sidecar
from tests.support.cli import cli, environment

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "own-model.md").read_text(encoding="utf-8")
NAMES = re.findall(r"^`(\w+\.py)`", TEXT, re.MULTILINE)
FILES = dict(zip(NAMES, re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL), strict=True))


def commands() -> Iterator[list[str]]:
    (block,) = re.findall(r"^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    yield from map(shlex.split, block.splitlines())


def test_the_example_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mymodel", None)  # whatever it is: not of another test
    monkeypatch.delitem(sys.modules, "mymodel")
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    said = {}
    for program, *arguments in commands():
        if program == "python":
            subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environment(), timeout=60, check=True)
            continue
        assert program == "densepure-rt"
        done = cli(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr
        said[arguments[0]] = done.stdout
    assert list(said) == ["export", "inspect", "predict", "certify", "report", "parity"]
    assert read_sidecar(tmp_path / "mymodel" / "unet.onnx").image == (3, 16, 16)
    with (tmp_path / "runs" / "mymodel" / "results.tsv").open(newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    assert [row["label"] for row in rows] == ["0"] * 5 + ["1"] * 5
    assert all(row["correct"] == "1" and float(row["radius"]) == 0.5 for row in rows)
    assert (tmp_path / "mymodel.html").read_text().count("100.0 %") >= 1
    assert not (tmp_path / "engines").exists()

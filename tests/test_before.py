"""Runs of before the modules moved: made again they are the same, and they are read as then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.before import KEPT, RUNS, certify, said


def identity(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "manifest.json").read_text())["identity"]
    return found


@pytest.mark.parametrize("name", RUNS)
def test_a_run_made_again_is_the_same(name: str, tmp_path: Path) -> None:
    certify(name, tmp_path)
    here, there = identity(tmp_path / name), identity(KEPT / name)
    machine = {key: (here.pop(key), there.pop(key)) for key in ("runs_on", "processor", "arithmetic")}
    assert here == there
    if any(now != then for now, then in machine.values()):
        pytest.skip(f"this machine computes otherwise than the one of the kept run, bytes are not compared: {machine}")
    assert (tmp_path / name / "results.jsonl").read_bytes() == (KEPT / name / "results.jsonl").read_bytes()


@pytest.mark.parametrize("name", RUNS)
def test_a_kept_run_is_audited_and_compared_as_then(name: str) -> None:
    assert said(name) == (KEPT / f"{name}.txt").read_text()

"""Runs of before the modules moved: made again they are the same, and they are read as then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.before import KEPT, RUNS, make, said
from tests.support.cli import densepure_rt

OWN = [name for name in RUNS if name != "imported"]


def identity(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "manifest.json").read_text())["identity"]
    return found


def same(run: Path) -> None:
    """Hold a run against the one of its name that was kept; the bytes of its results where the machine is alike."""
    kept = KEPT / run.name
    here, there = identity(run), identity(kept)
    machine = {key: (here.pop(key), there.pop(key)) for key in ("runs_on", "processor", "arithmetic")}
    assert here == there
    if any(now != then for now, then in machine.values()):
        pytest.skip(f"this machine computes otherwise than the one of the kept run, bytes are not compared: {machine}")
    for name in ("results.jsonl", *(["secret.revealed"] if run.name == "revealed" else [])):
        assert (run / name).read_bytes() == (kept / name).read_bytes()


@pytest.mark.parametrize("name", OWN)
def test_a_run_made_again_is_the_same(name: str, tmp_path: Path) -> None:
    make(name, tmp_path)
    runs = sorted(tmp_path.iterdir())
    assert [run.name for run in runs] == (["merged", "shard-1", "shard-2"] if name == "merged" else [name])
    for run in runs:
        same(run)


def test_a_run_on_a_cluster_is_the_one_of_before(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    make("radius-1", tmp_path, "--cluster ray --workers 1")
    same(tmp_path / "radius-1")


def test_kept_shards_are_merged_as_then(tmp_path: Path) -> None:
    done = densepure_rt("merge", KEPT / "shard-1", KEPT / "shard-2", "--out", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    for name in ("results.jsonl", "results.tsv", "timing.jsonl", "summary.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (KEPT / "merged" / name).read_bytes()


def test_results_of_another_program_are_imported_as_then(tmp_path: Path) -> None:
    make("imported", tmp_path)
    kept = {path.name: path.read_bytes() for path in (KEPT / "imported").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "imported").iterdir()} == kept


@pytest.mark.parametrize("name", RUNS)
def test_what_was_kept_is_audited_compared_and_reported_as_then(name: str) -> None:
    assert said(name) == (KEPT / f"{name}.txt").read_text()

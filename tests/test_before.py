"""Runs of before the modules moved: made again they are the same, and they are read as then."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from densepure_rt.runs.ledger import packed
from tests.before import KEPT, RUNS, make, said
from tests.support.cli import densepure_rt

OWN = [name for name in RUNS if name != "imported"]


def identity(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "manifest.json").read_text())["identity"]
    return found


def same(run: Path) -> None:
    """Hold a run against the one of its name that was kept; the bytes of its results where the machine is alike.

    Of a record each byte is compared but those of its name, the last field, which the runs of then have not.
    """
    kept = KEPT / run.name
    here, there = identity(run), identity(kept)
    machine = {key: (here.pop(key), there.pop(key)) for key in ("runs_on", "processor", "arithmetic")}
    assert here == there
    if any(now != then for now, then in machine.values()):
        pytest.skip(f"this machine computes otherwise than the one of the kept run, bytes are not compared: {machine}")
    nameless = re.sub(rb', "name": "fashion_mnist_test[.]npz:[0-9]+"}\n', b"}\n", (run / "results.jsonl").read_bytes())
    assert nameless == (kept / "results.jsonl").read_bytes()
    if run.name == "revealed":
        assert (run / "secret.revealed").read_bytes() == (kept / "secret.revealed").read_bytes()


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


def test_a_run_of_before_goes_on_without_names_and_with_its_columns(tmp_path: Path) -> None:
    make("sequential-1", tmp_path)
    run, kept = tmp_path / "sequential-1", KEPT / "sequential-1"
    whole = (run / "results.jsonl").read_text()
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["provenance"]["images_named"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    with sqlite3.connect(
        run / "ledger.sqlite"
    ) as database:  # all is to do but one sample: so runs of then are cut short
        database.execute("delete from images")
        database.execute("insert into samples select idx, 0, ?, 1, 1 from (select 0 as idx)", (packed([9]),))
    (run / "seal.json").unlink()
    make("sequential-1", tmp_path)
    lines = [json.loads(line) for line in whole.splitlines()]
    assert (run / "results.jsonl").read_text() == "".join(
        json.dumps({key: value for key, value in line.items() if key != "name"}) + "\n" for line in lines
    )
    header = (kept / "results.tsv").read_text().splitlines()[0]
    assert (run / "results.tsv").read_text().splitlines()[0] == header
    assert densepure_rt("audit", run).returncode == 0


@pytest.mark.parametrize("name", RUNS)
def test_what_was_kept_is_audited_compared_and_reported_as_then(name: str) -> None:
    assert said(name) == (KEPT / f"{name}.txt").read_text()

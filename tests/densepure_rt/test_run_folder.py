from __future__ import annotations

import csv
import datetime
import json
import os
import stat
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from densepure_rt.certification import Certificate
from densepure_rt.datasets import LabelledImage
from densepure_rt.errors import EnvironmentFault, UsageError
from densepure_rt.run_folder import RunFolder, record, tsv_line
from densepure_rt.scheduling import Cost
from densepure_rt.smoothing import Certified

ROOT = Path(__file__).resolve().parents[2]
HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"  # locuslab/smoothing, code/certify.py
RESULTS = ("results.tsv", "results.jsonl", "timing.jsonl")
SECRET = bytes(range(32))


def result(
    idx: int = 0, label: int | None = 3, predict: int | None = 3, radius: float | None = 0.25, seconds: float = 1.5
) -> Certified:
    certificate = Certificate(predict, radius, n0=4, n=20, n_a=19, alpha=0.001, p_lower=0.6)
    return Certified(LabelledImage(idx, np.zeros((1, 2, 2), np.uint8), label), certificate, Cost(24, 7, 5, 0, seconds))


def columns(line: str) -> dict[str, str]:
    (row,) = csv.DictReader([HEADER, line], delimiter="\t")
    return row


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_new_folder_holds_the_manifest_and_the_header_before_any_result(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "a" / "run", {"identity": {"sigma": 0.5}}, SECRET):
        found = contents(tmp_path / "a" / "run")
    assert sorted(found) == ["manifest.json", "results.jsonl", "results.tsv", "secret.key", "timing.jsonl"]
    assert json.loads(found["manifest.json"]) == {"identity": {"sigma": 0.5}}
    assert found["results.tsv"].decode() == HEADER
    assert found["results.jsonl"] == found["timing.jsonl"] == b""


def test_each_result_is_on_disk_as_soon_as_it_is_added(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", {}, None) as folder:
        for done in (1, 2, 3):
            folder.add(result(idx=done))
            lines = [(tmp_path / "run" / name).read_text().splitlines() for name in RESULTS]
            assert [len(found) for found in lines] == [done + 1, done, done]


def test_the_key_can_be_read_by_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)  # the most generous: the mode must not come from the umask
    try:
        RunFolder(tmp_path / "run", {}, SECRET).__exit__(None, None, None)
    finally:
        os.umask(before)
    key = tmp_path / "run" / "secret.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert bytes.fromhex(key.read_text()) == SECRET


def test_without_a_secret_there_is_no_key(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", {}, None).__exit__(None, None, None)
    assert not (tmp_path / "run" / "secret.key").exists()


def test_an_empty_folder_is_used_and_other_files_in_it_are_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder(tmp_path, {}, None).__exit__(None, None, None)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "results.tsv").read_text() == HEADER


def test_a_run_is_never_written_over(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", {"first": 1}, SECRET) as folder:
        folder.add(result())
        before = contents(tmp_path / "run")
        with pytest.raises(UsageError, match=r"already holds a run.*--out"):
            RunFolder(tmp_path / "run", {"second": 2}, bytes(32))
        assert contents(tmp_path / "run") == before
        folder.add(result(idx=1))
    assert len((tmp_path / "run" / "results.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("left", ["secret.key", "results.jsonl", "timing.jsonl"])
def test_a_file_that_an_earlier_run_left_is_never_written_over(tmp_path: Path, left: str) -> None:
    (tmp_path / left).write_text("precious")
    with pytest.raises((UsageError, EnvironmentFault), match="--out"):
        RunFolder(tmp_path, {}, SECRET)
    assert (tmp_path / left).read_text() == "precious"


@pytest.mark.parametrize("below", ["", "run", "run/deeper"])
def test_a_folder_that_cannot_be_made_is_an_environment_fault(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(EnvironmentFault, match=r"cannot write .*file.*--out"):
        RunFolder(tmp_path / "file" / below, {}, None)
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_name_that_is_too_long_is_an_environment_fault(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="--out"):
        RunFolder(tmp_path / ("x" * 300), {}, None)


def test_the_columns_are_those_of_the_field() -> None:
    line = columns(tsv_line(result(idx=40, label=9, predict=9, radius=0.15591893, seconds=1.171169)))
    assert line == {
        "idx": "40",
        "label": "9",
        "predict": "9",
        "radius": "0.155",
        "correct": "1",
        "time": "0:00:01.171169",
    }


def test_an_abstention_is_minus_one_with_radius_zero_in_the_tsv_and_null_in_the_record() -> None:
    abstained = result(predict=None, radius=None)
    line = columns(tsv_line(abstained))
    assert (line["predict"], line["radius"], line["correct"]) == ("-1", "0.0", "0")
    written = record(abstained)
    assert (written["predict"], written["radius"], written["correct"]) == (None, None, False)


@pytest.mark.parametrize("predict", [None, 3])
def test_an_image_without_a_label_is_never_correct(predict: int | None) -> None:
    unlabelled = result(label=None, predict=predict, radius=None if predict is None else 0.25)
    line = columns(tsv_line(unlabelled))
    assert (line["label"], line["correct"]) == ("-1", "0")
    written = record(unlabelled)
    assert (written["label"], written["correct"]) == (None, None)


def test_a_wrong_label_is_not_correct() -> None:
    assert columns(tsv_line(result(label=3, predict=4)))["correct"] == "0"
    assert record(result(label=3, predict=4))["correct"] is False


def test_the_record_has_these_keys_in_this_order_and_no_times() -> None:
    assert list(record(result())) == "idx label predict radius correct n0 n n_a alpha p_lower stopped".split()


@given(st.floats(0, 10, allow_subnormal=False))
def test_the_radius_of_the_tsv_is_rounded_down_to_three_decimals(radius: float) -> None:
    printed = columns(tsv_line(result(radius=radius)))["radius"]
    assert len(printed.partition(".")[2]) == 3
    assert 0 <= Decimal(radius) - Decimal(printed) < Decimal("0.001")
    assert record(result(radius=radius))["radius"] == radius


@given(st.floats(0, 1e6))
def test_the_time_reads_back_as_a_timedelta(seconds: float) -> None:
    printed = columns(tsv_line(result(seconds=seconds)))["time"]
    days, _, clock = printed.rpartition(", ")
    hours, minutes, rest = clock.split(":")
    found = datetime.timedelta(
        days=int(days.split()[0]) if days else 0, hours=int(hours), minutes=int(minutes), seconds=float(rest)
    )
    assert found.total_seconds() == pytest.approx(seconds, abs=2e-6)


def complete_lines(path: Path) -> list[str]:
    """The lines of a file up to its last line end."""
    return path.read_text().rpartition("\n")[0].splitlines()


def certify_into(out: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """A run of many cheap images, after the statements `before`."""
    code = f"{before}\nfrom densepure_rt.cli import main; main()"
    options = "certify --method fixed --steps 0 --n 10 --n0 1 --max 300 --batch 8 --threads 1 --seed 1 --out".split()
    command = [sys.executable, "-c", code, *options, str(out)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def check_that_a_full_disk_loses_nothing(done: subprocess.CompletedProcess[str], out: Path) -> None:
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "cannot write" in done.stderr
    assert str(out) in done.stderr
    assert "--out" in done.stderr
    assert json.loads((out / "manifest.json").read_text())["identity"]["images"]["count"] == 300
    table = complete_lines(out / "results.tsv")
    assert table[0] + "\n" == HEADER
    kept = [json.loads(line)["idx"] for line in complete_lines(out / "results.jsonl")]
    assert 0 < len(kept) < 300
    assert kept == sorted(kept)
    assert len(table) - 1 in (len(kept), len(kept) - 1)  # the line that did not fit is at most one behind


def test_a_file_that_can_grow_no_further_exits_3_and_keeps_what_was_written(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk where none can be mounted."""
    pytest.importorskip("resource", reason="limits on file sizes are a POSIX matter")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))"
    check_that_a_full_disk_loses_nothing(certify_into(tmp_path / "run", limit), tmp_path / "run")


def test_a_full_disk_exits_3_and_keeps_what_was_written(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True, timeout=30)
    except OSError as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        check_that_a_full_disk_loses_nothing(certify_into(tmp_path / "run"), tmp_path / "run")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True, timeout=30)

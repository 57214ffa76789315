"""docs/deploy.md: capacity follows from what docs/performance.md states. docs/guides/serving.md: the systemd unit."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
SERVING = (ROOT / "docs/guides/serving.md").read_text(encoding="utf-8")
PERFORMANCE = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
GFLOP = {"CIFAR-10": 16.8, "ImageNet": 2240.0}  # a UNet call
TFLOPS = {"H100 SXM": 989.0, "A100": 312.0}  # dense, in 16 bit
SHARE_OF_PEAK = 0.4
COLUMNS = ["data set, images", "GPU", "UNet calls per second (prediction)", "procedure", "UNet calls per certificate"]
COLUMNS += ["GPU-hours", "GPUs for a day"]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def capacity() -> list[list[str]]:
    """The rows of the table of capacity."""
    lines = DEPLOY.partition("## Capacity")[2].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|") and cells(line) == COLUMNS)
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(cells(line))
    return rows


def number(text: str) -> float:
    return float(text.replace(",", ""))


def calls(row: list[str]) -> tuple[float, float, float]:
    """Samples, UNet calls a sample, and their product, as the row has them."""
    samples, each, product = (number(part) for part in re.split(" [x=] ", row[4]))
    return samples, each, product


ROWS = capacity()


def test_every_data_set_gpu_and_procedure_has_a_row() -> None:
    assert len({tuple(row[:2] + row[3:4]) for row in ROWS}) == len(ROWS) == len(GFLOP) * len(TFLOPS) * 3


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join([*row[:2], row[3]]))
def test_gpu_hours_follow_from_the_row(row: list[str]) -> None:
    images, rate, (hours, gpus) = number(row[0].split(", ")[1]), number(row[2]), row[5:]
    samples, each, product = calls(row)
    assert product == samples * each
    expected = images * product / rate / 3600
    digits = len(hours.partition(".")[2])
    assert number(hours) == round(expected, digits)
    assert number(gpus) == math.ceil(expected / 24)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join([*row[:2], row[3]]))
def test_rates_are_those_of_the_roofline(row: list[str]) -> None:
    expected = SHARE_OF_PEAK * TFLOPS[row[1]] * 1e3 / GFLOP[row[0].split(", ")[0]]
    assert number(row[2]) == pytest.approx(expected, rel=1e-3)


def test_the_roofline_is_that_of_the_performance_page() -> None:
    prediction = PERFORMANCE.partition("## What a GPU should do")[2]
    for quoted in ("16.8 for the CIFAR-10", "2,240 for ImageNet-256", "H100 SXM, 989 TFLOP/s", "A100, 312 TFLOP/s"):
        assert quoted in prediction
    assert f"Taking {SHARE_OF_PEAK:.0%} of the peak".replace("%", " %") in prediction
    predicted = re.search(r"H100 SXM, 989 TFLOP/s \| (\d+) us", prediction)
    assert predicted is not None
    assert round(1e6 / number(ROWS[0][2])) == int(predicted[1])


def test_samples_and_calls_are_those_of_the_performance_page() -> None:
    assert {calls(row)[0] for row in ROWS} == {254, 100_100}
    assert "with 254 samples on average" in PERFORMANCE
    assert "| published, priced     100,100  40,040,000".lstrip("| ") in PERFORMANCE
    assert 100_100 * 400 == 40_040_000
    for procedure, nothing_shared, agreeing in (("K = 5, b = 2", 10, 4), ("K = 40, b = 10", 400, 181)):
        table = re.search(rf"\| {procedure} \| (\d+) \| \d+ \| (\d+) \|", PERFORMANCE)
        assert table is not None
        assert (int(table[1]), int(table[2])) == (nothing_shared, agreeing)
        assert {calls(row)[1] for row in ROWS if row[3] == procedure} == {agreeing}
    assert {calls(row)[1] for row in ROWS if row[3] == "published"} == {400}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    found = re.search(r"^```ini\n(\[Unit\].*?)^```", SERVING, re.DOTALL | re.MULTILINE)
    assert found is not None
    program = re.search(r"^ExecStart=(\S+)", found[1], re.MULTILINE)
    assert program is not None
    unit = tmp_path / "densepure-rt.service"
    unit.write_text(found[1].replace(program[1], sys.executable))  # it must be there
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")

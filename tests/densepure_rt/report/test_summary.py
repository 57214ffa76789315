from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from densepure_rt.report.charts import accuracy_lines, accuracy_png, samples_lines
from densepure_rt.report.page import page
from densepure_rt.report.summary import markdown, names_of, report_of
from densepure_rt.runs.reader import read_run
from tests.support.cli import Done, cli, refused
from tests.support.html import Tables
from tests.support.runs import ALPHA, SEQUENTIAL, Made, make_run

IMAGES = (
    Made(0.6),
    Made(0.3),
    Made(0.3, predict=2),
    Made(0.0),
    Made(0.25, samples=1000),
    *(Made(None) for _ in range(3)),
    Made(None, stopped=True),
    Made(0.5),
)
RADII = (0.0, 0.25, 0.5, 0.75, 1.0)


@pytest.fixture
def fixed(tmp_path: Path) -> Path:
    return make_run(tmp_path / "fixed", IMAGES)


@pytest.fixture
def sequential(tmp_path: Path) -> Path:
    images = (Made(0.5), Made(0.5), Made(0.25), Made(0.0), Made(None))
    return make_run(tmp_path / "sequential", images, rule=SEQUENTIAL)


def page_of(*paths: Path) -> str:
    return page([report_of(read_run(path), path.name) for path in paths])


def share(radius: float) -> float:
    return float(np.mean([m.radius is not None and m.predict == m.label and m.radius >= radius for m in IMAGES]))


# the numbers


def test_the_table_has_the_papers_radii_and_those_of_the_grids(fixed: Path, sequential: Path) -> None:
    table = Tables(page_of(fixed, sequential)).tables[0]
    assert table[0] == ["radius", "0", "0.25", "0.5", "0.75", "1", "9"]
    # n = 200 reaches 0.5 * Phi^-1(0.001^(1/200)) = 0.91; the grid of the sequential run holds 0, 0.25 and 0.5
    assert table[1] == ["fixed", *(f"{100 * share(r):.1f} %" for r in RADII[:4]), "-", "-"]
    assert table[2] == ["sequential", "80.0 %", "60.0 %", "40.0 %", "-", "-", "-"]


def test_the_bound_on_the_test_set_stands_beneath_and_is_rounded_down(fixed: Path) -> None:
    less = ALPHA + math.sqrt(ALPHA * (1 - ALPHA) * math.log(20) / 10) + math.log(20) / 30
    bound = math.floor(1000 * (share(0.25) - less)) / 10
    assert f"<small>≥ {bound:.1f} %</small>" in page_of(fixed)


def test_what_alpha_allows_is_said(fixed: Path) -> None:
    assert "of 10 answers at alpha = 0.001, at most 0.01 are expected to be wrong" in page_of(fixed)


def test_equal_images_have_no_bound_on_the_test_set(tmp_path: Path) -> None:
    text = page_of(make_run(tmp_path / "a", [Made(0.5, pixels="x"), Made(0.5, pixels="x")]))
    assert "1 of the images equals another one" in text
    assert "≥" not in text


def test_the_band_is_said_in_points(fixed: Path) -> None:
    points = math.ceil(1000 * math.sqrt(math.log(40) / 20)) / 10
    assert f"{points:.1f} points for 10 images" in page_of(fixed)


def test_outcomes_are_counted_by_reason(fixed: Path) -> None:
    text = page_of(fixed)
    for words in (
        "5 certified for their label (50.0 %)",
        "1 certified for another class (10.0 %)",
        "3 undecided after all n samples (30.0 %)",
        "1 out of time (10.0 %)",
    ):
        assert words in text


def test_costs_are_added_up(fixed: Path) -> None:
    costs = Tables(page_of(fixed)).tables[1]
    assert costs[0] == ["", "samples", "UNet calls", "classifier calls", "time", "not finite", "cut short by time"]
    assert costs[1] == ["fixed", f"{9 * 64 + 1000:,}", "100", "200", "5.0 s", "10", "1"]


def test_the_weakest_images_come_first(fixed: Path) -> None:
    rows = Tables(page_of(fixed)).tables[2]
    assert rows[1][:3] == ["2", "3", "certified 2 within 0.299, which is not its label"]
    assert [row[0] for row in rows[2:6]] == ["5", "6", "7", "8"]
    assert [row[0] for row in rows[6:]] == ["3", "4", "1", "9", "0"]


# curves


def test_a_sequential_run_is_drawn_at_its_grid_and_a_fixed_one_all_the_way(fixed: Path, sequential: Path) -> None:
    reports = [report_of(read_run(path), path.name) for path in (fixed, sequential)]
    line, grid = accuracy_lines(reports)
    assert grid.dots == ((0.0, 0.8), (0.25, 0.6), (0.5, 0.4))
    assert line.dots is None
    assert line.corners[-1][0] == pytest.approx(0.913, abs=0.001)
    text = page_of(sequential)
    assert "the points" in text
    assert "sequential was asked about 9 too, which its n samples cannot reach" in text
    assert "the points" not in page_of(fixed)


def test_the_samples_are_drawn_up_to_all_images(fixed: Path) -> None:
    (line,) = samples_lines([report_of(read_run(fixed), "a")])
    assert (64, 0.9) in line.corners
    assert line.corners[-1][1] == 1.0


def test_the_png_is_a_picture(fixed: Path, sequential: Path) -> None:
    reports = [report_of(read_run(path), "$name$ \\{") for path in (fixed, sequential)]
    picture = Image.open(io.BytesIO(accuracy_png(reports)))
    assert (picture.format, picture.size) == ("PNG", (1200, 690))
    assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_the_markdown_table_takes_no_name_for_markup(fixed: Path) -> None:
    table = markdown([report_of(read_run(fixed), "a|b <i>*c*\n")])
    head, rule, row = table.splitlines()
    assert head.count("|") == rule.count("|") == len(re.findall(r"(?<!\\)\|", row)) == len(RADII) + 5
    assert row.startswith(
        "| a\\|b \\<i\\>\\*c\\* | sigma 0.5, 1 step, 1 vote, fp32, fixed | 10 of 10 | 50.0 % | 40.0 % |"
    )


# unfinished, unlabelled, empty


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", IMAGES, asked=500)
    with (path / "results.jsonl").open("a") as file:
        file.write('{"idx": 10, "image_sha')
    assert "10 of 500 images: not finished" in page_of(path)


def test_a_run_without_images_yet_has_a_page(tmp_path: Path) -> None:
    text = page_of(make_run(tmp_path / "a", [], asked=5))
    assert "no image is done yet" in text
    assert "NaN %" not in text


def test_images_without_labels_have_a_share_and_no_accuracy(tmp_path: Path) -> None:
    text = page_of(make_run(tmp_path / "a", [Made(0.5, label=None), Made(None, label=None)]))
    assert "Share certified" in text
    assert "Certified accuracy" not in text
    assert "1 certified (50.0 %)" in text


# the command


def test_one_file_is_written(here: Callable[..., Done], fixed: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in fixed.iterdir()}
    done = here("report", fixed, "--out", tmp_path / "new" / "x.html")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'new' / 'x.html'}\n")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.html"]
    assert {path: path.read_bytes() for path in fixed.iterdir()} == before


def test_others_are_written_beside_it(here: Callable[..., Done], fixed: Path, sequential: Path, tmp_path: Path) -> None:
    assert here("report", fixed, sequential, "--out", tmp_path / "x.html", "--also", "png,svg, md").returncode == 0
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"x.html", "x.png", "x.svg", "x.md"}
    assert (tmp_path / "x.md").read_text() == markdown(
        [report_of(read_run(path), path.name) for path in (fixed, sequential)]
    )


def test_what_cannot_be_is_refused(here: Callable[..., Done], fixed: Path, tmp_path: Path) -> None:
    refused(here("report", tmp_path), 2, "holds no run", "manifest.json")
    refused(here("report", tmp_path / "nothing"), 2, "holds no run")
    refused(here("report", fixed, fixed / ".." / "fixed"), 2, "given twice")
    refused(here("report", fixed, "--also", "pdf"), 2, "pdf", "png, svg, md")
    refused(here("report", fixed, "--out", "x.svg"), 2, "x.svg", "--also")
    refused(here("report", fixed, "--out", fixed), 3, "cannot write")
    (fixed / "results.jsonl").write_text("{}\n")
    refused(here("report", fixed), 1, "line 1", "damaged")


def test_without_matplotlib_the_page_works_and_a_png_says_what_to_install(fixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.html"
    assert cli("report", fixed, "--out", out, "--also", "svg,md", without=("matplotlib",)).returncode == 0
    done = cli("report", fixed, "--out", tmp_path / "y.html", "--also", "png", without=("matplotlib",))
    refused(done, 3, "matplotlib", "densepure-rt[report]")
    assert not (tmp_path / "y.html").exists()


def test_runs_of_one_name_are_called_by_their_paths(tmp_path: Path) -> None:
    assert names_of([tmp_path / "a" / "run", tmp_path / "b" / "other"]) == ["run", "other"]
    same = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert names_of(same) == [str(path) for path in same]

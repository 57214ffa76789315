"""What a report says of where its numbers come from, and imported results beside an own run."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from densepure_rt.legacy.folder import read_imported, write
from densepure_rt.report.accuracy import curve_of_imported
from densepure_rt.report.charts import accuracy_lines
from densepure_rt.report.page import page
from densepure_rt.report.sources import read_results
from densepure_rt.report.summary import markdown, report_of
from densepure_rt.runtime.bundle import Accuracy
from tests.support.cli import Done, refused
from tests.support.html import Seen, Tables, attacks, inert
from tests.support.legacy import RADII, edited, log_imported
from tests.support.runs import Made, make_run

# (label, predict, radius as printed) as DDS writes them: a running total as `correct`, -1 and 0.0 for an abstention
DDS_ROWS = [(3, 3, "0.5"), (4, -1, "0.0"), (5, 5, "0.731"), (6, 2, "0.612"), (1, 1, "0.25"), (0, 0, "0.251")]
TABLE_RADII = (0.0, 0.25, 0.5, 0.75, 1.0)
PARITY = Accuracy("ONNX Runtime on the CPU", 1470, 4.877e-07, 2500, 3)


def dds_log(rows: list[tuple[int, int, str]]) -> str:
    lines, right = ["idx\tlabel\tpredict\tradius\tcorrect\ttime"], 0
    for place, (label, predict, radius) in enumerate(rows):
        right += label == predict
        lines.append(f"{20 * place}\t{label}\t{predict}\t{radius}\t{right}\t0:00:01.5")
    return "\n".join(lines) + "\n"


def share(path: Path, radius: float) -> float:
    """From the log itself: a printed radius stands for any down to half a thousandth below."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    right = [row for row in rows if row["predict"] == row["label"]]
    return sum(max(0.0, float(row["radius"]) - 0.0005) >= radius for row in right) / len(rows)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "dds" / "cert.tsv"


@pytest.fixture
def kept(log: Path) -> Path:
    """The log as `densepure-rt import` keeps it; n = 10,000 at sigma 0.25 reaches 0.7996."""
    log.parent.mkdir()
    write(log_imported(log, dds_log(DDS_ROWS), sigma=0.25, n=10_000), RADII, log.parent / "kept")
    return log.parent / "kept"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return make_run(tmp_path / "own", [Made(0.6), Made(0.3), Made(None)], parity=PARITY)


def page_of(*paths: Path) -> str:
    return page([report_of(read_results(path), path.name) for path in paths])


# imported results


def test_imported_results_and_an_own_run_share_table_curve_and_abstentions(own: Path, kept: Path, log: Path) -> None:
    reports = [report_of(read_results(path), path.name) for path in (kept, own)]
    shares = [f"{math.floor(1000 * share(log, radius)) / 10:.1f} %" for radius in TABLE_RADII[:4]]
    assert shares == ["66.6 %", "50.0 %", "16.6 %", "0.0 %"]  # 0.25 and 0.5 may have been rounded up
    text = page(reports)
    tables = Tables(text).tables
    assert tables[0][1:] == [["kept", *shares, "-"], ["own", "66.6 %", "66.6 %", "33.3 %", "0.0 %", "-"]]
    (line, _) = accuracy_lines(reports)
    assert line.dots is None
    assert line.corners[0] == (0.0, share(log, 0.0))
    assert line.corners[-1][0] == pytest.approx(0.7996, abs=5e-5)
    assert f"| kept | imported log, sigma 0.25, n = 10,000 | 6 of 6 | {' | '.join(shares)} | - | 1 |" in markdown(
        reports
    )
    for words in ("4 certified for their label (66.6 %)", "1 certified for another class (16.7 %)", "1 abstained (16"):
        assert words in text


def test_the_curve_is_that_of_the_log_at_every_radius(kept: Path, log: Path) -> None:
    curve = curve_of_imported(read_imported(kept))
    for radius in [step / 997 for step in range(790)]:
        assert curve.at(radius) == share(log, radius)
    assert curve.at(0.8) is None


def test_a_log_whose_reach_is_not_known_has_nothing_beyond_its_last_radius(log: Path) -> None:
    log.parent.mkdir()
    imported = log_imported(log, dds_log(DDS_ROWS))
    write(imported, TABLE_RADII, log.parent / "kept")
    report = report_of(read_results(log.parent / "kept"), "kept")
    assert [report.curve.at(radius) for radius in TABLE_RADII] == imported.accuracy(TABLE_RADII)
    assert [report.curve.at(radius) for radius in (-1.0, float("nan"))] == [None, None]
    text = page([report])
    assert "Of kept it is not known how far its samples could reach" in text
    assert "imported log</small>" in text


def test_what_was_imported_is_said_with_its_flags_and_no_cost(own: Path, kept: Path, log: Path) -> None:
    text = page_of(kept)
    seen = Seen(text).text
    assert f"cert.tsv, SHA-256 {hashlib.sha256(log.read_bytes()).hexdigest()}" in seen
    assert str(log.parent) not in text
    assert "unsound: correct column: 5 images (20, 40, 60, 80, 100): is the running total" in seen
    assert "note: rounding: " in seen
    for absent in ("Samples and cost", "Weakest images", "How far the engine is", "identity SHA-256", "≥"):
        assert absent not in text
    assert "If alpha = 0.001 holds for its 6 answers, as was said when they were imported, at most 0.006" in seen
    facts = dict(Tables(text).tables[-1])
    assert facts["imported.json SHA-256"] == hashlib.sha256((kept / "imported.json").read_bytes()).hexdigest()
    assert (facts["sigma"], facts["n"], facts["kind"]) == ("0.25", "10000", "log")
    both = Tables(page_of(kept, own)).tables
    assert [row[0] for row in both[1]] == ["", "own"]  # the costs


def test_names_in_imported_files_are_text(kept: Path) -> None:
    names = attacks("http://example.invalid")

    def hostile(origin: dict[str, object]) -> None:
        origin["flags"] = [{"name": name, "unsound": True, "says": name, "images": [1]} for name in names]
        origin["sources_sha256"] = {name.replace("/", "|"): "a" * 64 for name in names}
        origin["accuracy"] = dict.fromkeys(names, 0.5)

    edited(hostile, kept)
    seen = inert(page([report_of(read_results(kept), name) for name in names]))
    for name in names:
        assert seen.text.count(name) > len(names)


def test_of_many_files_the_first_are_named(kept: Path) -> None:
    many = {f"x/{place}.npy": "a" * 64 for place in range(130)}
    edited(lambda origin: origin.update(sources_sha256=many), kept)
    text = page_of(kept)
    assert "and 127 other files" in text
    assert Tables(text).tables[-1][-1] == ["and", "30 other files, which imported.json lists"]


def test_the_command_takes_both_and_draws_no_gallery_of_imported_results(
    here: Callable[..., Done], own: Path, kept: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.html"
    assert here("report", kept, own, "--out", out, "--also", "svg,md").returncode == 0
    assert out.read_text() == page_of(kept, own)
    refused(here("report", kept, own, "--gallery", 2), 2, "was imported: name an own run first")
    refused(here("report", own, tmp_path), 2, "holds no run and no imported results")


# parity


def test_parity_stands_in_its_own_section_with_the_worst_rounded_up(own: Path, kept: Path, tmp_path: Path) -> None:
    text = page_of(own, kept, make_run(tmp_path / "older", [Made(0.5)]))
    assert text.count("How far the engine is from PyTorch") == 1
    head = ["", "evaluated by", "comparisons", "worst relative L2", "labels compared", "differing"]
    table = next(table for table in Tables(text).tables if table[0] == head)
    assert table[1:] == [["own", "ONNX Runtime on the CPU", "1,470", "4.9e-7", "2,500", "3"]]
    assert "run by parity" not in text


def test_labels_that_were_not_compared_are_none(tmp_path: Path) -> None:
    text = page_of(make_run(tmp_path / "a", [Made(0.5)], parity=Accuracy("x", 1, 0.0, 0, 0)))
    assert ["a", "x", "1", "0", "none", "-"] in [row for table in Tables(text).tables for row in table]


def test_a_manifest_from_before_parity_was_written_down_has_no_section(own: Path) -> None:
    manifest = json.loads((own / "manifest.json").read_text())
    del manifest["provenance"]["parity"]
    (own / "manifest.json").write_text(json.dumps(manifest))
    assert "How far the engine is" not in page_of(own)

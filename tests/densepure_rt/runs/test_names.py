"""What an image's file is called is in all that a run leaves and says, and does no harm there."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sqlite3
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from densepure_rt.runs.ledger import packed
from tests.support.cli import Done
from tests.support.cli import densepure_rt as cli

TINY = ("--steps", 0, "--votes", 1, "--batch", 16, "--n", 100, "--sigma", 0.1, "--seed", 1, "--threads", 1)
HOSTILE = [
    "plain.png",
    "with space \u00e4.png",
    '"quoted.png',
    "it's.png",
    "tab\tand\nline.png",
    "\x1b]0;owned\x07.png",
    "[red]:smile:.png",
    "<b onload=x>.png",
]
SHOWN = [
    "plain.png",
    "with space \u00e4.png",
    '"quoted.png',
    "it's.png",
    "tab\\tand\\nline.png",
    "\\x1b]0;owned\\x07.png",
    "[red]:smile:.png",
    "<b onload=x>.png",
]
STEERING = set("\x1b\x07\r")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="such names are no names elsewhere")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class folder of pictures that no certificate takes long for, and one whose name is no Unicode."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "bag").mkdir()
    with np.load(Path(__file__).parents[3] / "densepure_rt" / "data" / "fashion_mnist_test.npz") as shipped:
        bags = shipped["x"][shipped["y"] == 8][..., 0]
    for name, pixels in zip([*HOSTILE, os.fsdecode(b"no-unicode-\xff.png")], bags, strict=False):
        Image.fromarray(pixels).save(folder / "bag" / name)
    return folder


@pytest.fixture(scope="module")
def told(images: Path) -> Done:
    """A run over them, in images.parent / "run", and what it says with -v."""
    done = cli(
        "certify", "--images", images, *TINY, "-v", "--out", images.parent / "run", "--log-json", images.parent / "log"
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def run(images: Path, told: Done, tmp_path: Path) -> Path:
    shutil.copytree(images.parent / "run", tmp_path / "run")
    return tmp_path / "run"


def fit_to_show(done: Done) -> bool:
    return not STEERING & set(done.stdout + done.stderr)


def names(run: Path) -> list[str]:
    return [json.loads(line)["name"] for line in (run / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def test_each_record_and_each_row_has_the_name(run: Path) -> None:
    assert sorted(names(run)) == sorted(f"bag/{name}" for name in [*SHOWN, "no-unicode-\\udcff.png"])
    for quotes in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):
        with (run / "results.tsv").open(newline="", encoding="utf-8") as table:
            rows = list(csv.DictReader(table, delimiter="\t", quoting=quotes))
        assert list(rows[0]) == ["idx", "label", "predict", "radius", "correct", "time", "name"]
        assert [row["name"] for row in rows] == [
            name.replace('"', r"\x22").replace("'", r"\x27") for name in names(run)
        ]


def test_verbose_lines_and_the_log_name_each_image(told: Done, images: Path, run: Path) -> None:
    assert fit_to_show(told)
    for idx, name in enumerate(names(run)):
        assert f"image {idx} ({name}): " in told.stderr
    lines = [json.loads(line) for line in (images.parent / "log").read_text(encoding="utf-8").splitlines()]
    assert {line["idx"]: line["name"] for line in lines if "idx" in line} == dict(enumerate(names(run)))


def test_names_are_no_part_of_the_identity(run: Path, images: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "renamed"
    shutil.copytree(images, renamed)
    (renamed / "bag" / "plain.png").rename(renamed / "bag" / "pla.png")
    done = cli("certify", "--images", renamed, *TINY, "--out", run)
    assert done.returncode == 0, done.stderr
    assert "bag/plain.png" in names(run)


def test_audit_names_the_image_that_is_wrong(run: Path) -> None:
    assert cli("audit", run).returncode == 0
    with sqlite3.connect(run / "ledger.sqlite") as database:
        database.execute("update images set labels = ? where idx = 1", (packed([1]),))
    done = cli("audit", run)
    assert (done.returncode, fit_to_show(done)) == (1, True)
    assert f"image 1 ({names(run)[1]}): 1 labels are not those that decide it" in done.stdout


def test_report_names_the_weakest_images_and_those_of_the_gallery(run: Path, images: Path, tmp_path: Path) -> None:
    done = cli("report", run, "--gallery", 9, "--images", images, "--out", tmp_path / "r.html")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<b onload" not in text
    assert "<small>bag/&lt;b onload=x&gt;.png</small>" in text
    for idx, name in enumerate(names(run)):
        if not set("<'\"") & set(name):
            assert f"<small>{name}</small>" in text
            assert f"<strong>Image {idx} ({name})</strong>" in text
    assert not STEERING & set(text)


def test_compare_names_the_images_that_changed(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    lost = [line | {"predict": None, "radius": None, "correct": False} for line in lines]
    (other / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lost))
    done, found = cli("compare", run, other), json.loads(cli("compare", run, other, "--json").stdout)
    assert fit_to_show(done)
    assert len(found["lost"]) == len([line for line in lines if line["correct"]]) > 5
    for change in found["lost"]:
        assert change["name_a"] == change["name_b"] == names(run)[change["idx_a"]]
        assert f" {change['name_a']}" in done.stdout


@pytest.mark.parametrize("name", ["bag/plain.png", "bag/[red]:smile:.png", "bag/it's.png", r"bag/it\x27s.png"])
def test_replay_takes_a_name_as_the_folder_the_record_or_the_table_has_it(run: Path, images: Path, name: str) -> None:
    done = cli("replay", run, "--images", images, "--image", name, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert names(run)[found["image"]] == found["name"] == name.replace(r"\x27", "'")
    assert found["label"] == found["counted"]


def test_replay_takes_a_name_that_steers_a_terminal(run: Path, images: Path) -> None:
    done = cli("replay", run, "--images", images, "--image", "bag/\x1b]0;owned\x07.png")
    assert (done.returncode, fit_to_show(done)) == (0, True), done.stderr
    assert r"(bag/\x1b]0;owned\x07.png)" in done.stdout


def test_replay_finds_names_among_the_images_where_an_old_run_has_none(run: Path, images: Path) -> None:
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        del line["name"]
    (run / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = cli("replay", run, "--images", images, "--image", "bag/plain.png", "--json")
    assert json.loads(done.stdout)["name"] == "bag/plain.png"


def test_replay_refuses_a_name_of_none_and_of_several(run: Path, images: Path) -> None:
    done = cli("replay", run, "--images", images, "--image", "bag/\x1b.png")
    assert (done.returncode, fit_to_show(done)) == (2, True)
    assert r"has the idx or the name bag/\x1b.png" in done.stderr
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    twice = [line | {"name": "twice.png"} for line in lines]
    (run / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in twice))
    done = cli("replay", run, "--images", images, "--image", "twice.png")
    assert done.returncode == 2
    assert "twice.png is the name of images 0, 1, 2, 3, 4, 5, 6, 7, 8: ask for one by its idx" in done.stderr

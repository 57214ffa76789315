"""Pictures of all kinds and names at the command line: certified as asked, or failed alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image

from tests.support.cli import ROOT, TINY, Done, cli

SHIPPED = np.load(ROOT / "densepure_rt" / "data" / "fashion_mnist_test.npz")
NAMES = [f"Ä{i}" for i in range(10)]


def picture(i: int) -> Image.Image:
    return Image.fromarray(SHIPPED["x"][i].squeeze())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "pictures"
    made.mkdir()
    for i, name in enumerate(("a", "b", "ü d")):
        picture(i).save(made / f"{name}.png")
    return made


def run(command: str, *options: object, cwd: Path | None = None) -> Done:
    return cli(command, *TINY, "--seed", 1, *options, cwd=cwd)


def rows(done: Done) -> list[dict[str, str]]:
    header, *lines = (line.split("\t") for line in done.stdout.splitlines())
    return [dict(zip(header, line, strict=True)) for line in lines]


def manifest(path: Path) -> Any:
    return json.loads((path / "manifest.json").read_text())


def test_a_broken_file_has_failed_alone_and_is_tried_again(folder: Path, tmp_path: Path) -> None:
    whole, broken, out = (folder / "b.png").read_bytes(), folder / "b.png", tmp_path / "run"
    broken.write_bytes(whole[:-20])
    options = ("--images", folder, "--out", out)
    done = run("certify", *options)
    assert done.returncode == 1
    assert "b.png cannot be read" in done.stderr
    assert "1 image failed: 1" in done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["done"], summary["asked"], summary["failed"]) == (2, 3, [1])
    assert manifest(out)["identity"]["images"]["unreadable"] == [1]
    assert cli("audit", out, "--images", folder).returncode == 0
    assert run("certify", *options).returncode == 1
    broken.write_bytes(whole)
    done = run("certify", *options)
    assert (done.returncode, "image failed" in done.stderr) == (0, False), done.stderr
    assert json.loads((out / "summary.json").read_text())["failed"] == []
    assert cli("audit", out, "--images", folder).returncode == 0
    other = run("certify", "--images", folder, "--out", tmp_path / "other")
    assert other.returncode == 0
    results = [(path / "results.jsonl").read_text() for path in (out, tmp_path / "other")]
    assert results[0] == results[1]


def test_a_broken_file_counts_as_uncertified(folder: Path, tmp_path: Path) -> None:
    names = ["a.png", "b.png", "ü d.png"]
    table = "".join(f"{name},{SHIPPED['y'][i]}\n" for i, name in enumerate(names))
    (tmp_path / "mine.csv").write_text("file,label\n" + table)
    (folder / "b.png").write_bytes(b"")
    done = run("certify", "--images", folder, "--labels-csv", tmp_path / "mine.csv", "--out", tmp_path / "r", "--json")
    assert done.returncode == 1
    found = [json.loads(line) for line in (tmp_path / "r" / "results.jsonl").read_text().splitlines()]
    assert [record["label"] for record in found] == [SHIPPED["y"][0], SHIPPED["y"][2]]
    share = sum(bool(record["correct"]) for record in found) / 3
    assert json.loads(done.stdout)["accuracy"]["0"] == pytest.approx(share)


def test_predict_names_files_and_calls_no_unlabelled_image_wrong(folder: Path) -> None:
    (folder / "b.png").write_bytes(b"")
    done = run("predict", "--images", folder)
    assert done.returncode == 1
    assert "1 image of 3 could not be read" in done.stderr
    assert [(row["idx"], row["label"], row["correct"], row["file"]) for row in rows(done)] == [
        ("0", "-", "-", "a.png"),
        ("2", "-", "-", "ü d.png"),
    ]
    lines = run("predict", "--images", folder, "--json").stdout.splitlines()
    assert [(json.loads(line)["label"], json.loads(line)["file"]) for line in lines] == [
        (None, "a.png"),
        (None, "ü d.png"),
    ]


def test_files_are_named_without_an_option(folder: Path, tmp_path: Path) -> None:
    done = run("predict", "ü d.png", "a.png", cwd=folder)
    assert [row["file"] for row in rows(done)] == ["ü d.png", "a.png"]
    done = run("certify", "a.png", "--out", tmp_path / "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert manifest(tmp_path / "run")["identity"]["images"]["count"] == 1
    assert cli("certify", "--resume", "--out", tmp_path / "run").returncode == 0
    done = run("certify", "a.png", "ü d.png", "--out", tmp_path / "two", cwd=folder)
    assert done.returncode == 0, done.stderr
    done = cli("certify", "a.png", "ü d.png", "--resume", "--out", tmp_path / "two", cwd=folder)
    assert done.returncode == 0, done.stderr
    done = run("predict", "a.png", "--images", folder, cwd=folder)
    assert (done.returncode, "give one of them" in done.stderr) == (2, True)


def test_labels_name_the_classes_without_a_new_export(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / "pictures" / NAMES[i]).mkdir(parents=True)
        picture(i).save(tmp_path / "pictures" / NAMES[i] / "one.png")
    done = run("predict", "--images", tmp_path / "pictures")
    assert done.returncode == 2
    assert "--labels" in done.stderr
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    options = ("--images", tmp_path / "pictures", "--labels", tmp_path / "names.txt")
    found = rows(run("predict", *options))
    assert [row["label"] for row in found] == ["0", "1"]
    assert {row["name"] for row in found} <= {*NAMES, "abstain"}
    assert run("certify", *options, "--out", tmp_path / "run").returncode == 0
    assert manifest(tmp_path / "run")["identity"]["class_names"] == NAMES
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    done = run("predict", *options)
    assert (done.returncode, "names 2 classes, the classifier has 10" in done.stderr) == (2, True)


def test_prepared_images_are_in_the_identity_and_nothing_is_without(folder: Path, tmp_path: Path) -> None:
    plain, out = tmp_path / "plain", tmp_path / "run"
    assert run("certify", "--images", folder, "--out", plain).returncode == 0
    assert set(manifest(plain)["identity"]["images"]) == {"count", "sha256"}
    Image.merge("RGBA", [picture(1).resize((40, 30))] * 3 + [Image.new("L", (40, 30), 128)]).save(folder / "b.png")
    options = ("--images", folder, "--out", out, "--fit", "pad")
    done = run("certify", *options)
    assert (done.returncode, "have --convert do so" in done.stderr) == (2, True)
    done = run("certify", *options, "--convert", "--background", "black")
    assert done.returncode == 0, done.stderr
    assert "fit pad, converted, on black, by Pillow: radii are in these pixels" in done.stderr
    assert manifest(out)["identity"]["images"]["prepared"] == {
        "fit": "pad",
        "convert": True,
        "background": "black",
        "pillow": PIL.__version__,
        "radius": "in the pixels as they were prepared",
    }
    assert cli("audit", out, "--images", folder).returncode == 0
    assert cli("replay", out, "--image", 1, "--images", folder).returncode == 0
    done = run("certify", *options, "--convert", "--background", "white")
    assert (done.returncode, "images.prepared.background" in done.stderr) == (2, True)
    done = run("certify", "--images", folder, "--out", tmp_path / "x", "--background", "black")
    assert (done.returncode, "--background is of --convert" in done.stderr) == (2, True)
